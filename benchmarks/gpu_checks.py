"""What must hold on a GPU, and on a CPU as well, each as a function of (device, folder) that raises AssertionError.

benchmarks/gpu.py runs them on a bare machine, tests/test_gpu.py among the tests.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reference
from tiny_store import cut_at, random_store, settings_of, tiny_model

from fuselip_core.encoding.from_codes import TokenPairs
from fuselip_core.encoding.packed_sides import MOST_BUDGETS
from fuselip_core.errors import FuselipError
from fuselip_core.model.compiled import graphs_compiled
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.packed import pack
from fuselip_core.model.vocabulary import join, text_sequence
from fuselip_core.model.weights import load_strictly
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.loop import Trainer

ROWS = np.arange(0, 24, 3)


def trainer_of(device: torch.device, folder: Path, name: str, **fields: Any) -> Trainer:
    """A run of a model of milliseconds a step, every token of which is hidden so that no draw makes a difference."""
    store = random_store(Path(tempfile.mkdtemp(dir=folder)) / "store", views=1)
    settings = settings_of(**{"mask_probability": 1.0, "preflight": False, "compile": False, **fields})
    # Heads of 8 dimensions, which every kernel takes.
    model = tiny_model(width=32, heads=4).to(device)
    encoder = TokenPairs(model, store, settings.mask_probability, settings.cuda_graphs)
    return Trainer(encoder, store, settings, Checkpoints(folder / name), lambda metrics, step: None)


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """Of one batch, on the CPU in float64."""
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.compute_gradients(trainer.batches.make(ROWS, step=0))
    return {name: p.grad.double().cpu() for name, p in trainer.model.named_parameters() if p.grad is not None}


def near(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    """Every gradient within `tolerance` of the wanted one's size."""
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, value in wanted.items():
        distance = float((found[name] - value).norm() / value.norm().clamp(min=1e-6))
        assert distance < tolerance, f"{name} is off by {distance:.2g}"


def published_values_are_reproduced(device: torch.device, folder: Path) -> None:
    """The published model of size small gives the embeddings and the loss of the published code, in float32."""
    assert reference.keys(), "needs ../shared/fixtures"
    name = "fuselip-small"
    with torch.device("meta"):
        model = FuseLIPModel(FuseLIPConfig.from_published(reference.manifest()["models"][name]["config"]))
    load_strictly(model, reference.weights(name), name)
    model.eval().to(device)
    with torch.inference_mode():
        found = {"image_features": model.embed_ids(reference.expected(f"{name}.image_input_ids").to(device))}
        masked, labels = (reference.expected(f"{name}.mmm_{part}").to(device) for part in ("input_ids", "labels"))
        output = model(masked, labels=labels)
        found |= {"mmm_features": output.embeddings, "mmm_loss": output.loss[None]}
    for key, value in found.items():
        torch.testing.assert_close(value.cpu(), reference.expected(f"{name}.{key}"), atol=1e-4, rtol=0)


def packed_equals_padded(device: torch.device, folder: Path) -> None:
    """Embeddings and gradients of packed sequences are those of padded ones, in float32."""
    model = tiny_model(width=32, heads=4).to(device)
    generator = torch.Generator().manual_seed(0)
    codes = model.vocabulary.joint_ids(torch.randint(0, 20, (8, 4), generator=generator))
    lengths = torch.arange(8) % 5
    bare = torch.randint(500, 4000, (8, 5), generator=generator) * (torch.arange(5) < lengths[:, None])
    padded = join(codes, text_sequence(bare, lengths), 16)
    ids, layout, order = pack([padded])
    found: list[tuple[Tensor, dict[str, Tensor]]] = []
    for encode in (
        lambda: model.embed_ids(padded.to(device)),
        lambda: model.embed_packed(ids.to(device), layout.each(lambda t: t.to(device)))[0][order.to(device)],
    ):
        model.zero_grad()
        embeddings = encode()
        (embeddings * torch.linspace(-1, 1, 32, device=device)).sum().backward()
        grads = {name: p.grad.double().cpu() for name, p in model.named_parameters() if p.grad is not None}
        found.append((embeddings.detach(), grads))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=0)
    near(found[1][1], found[0][1], 1e-3)


def bfloat16_stays_near_float32(device: torch.device, folder: Path) -> None:
    """Gradients in bfloat16, where attention is one kernel over boundaries, point where those of float32 point."""
    whole, half = (gradients(trainer_of(device, folder, p, precision=p)) for p in ("float32", "bfloat16"))
    for name, value in whole.items():
        if value.norm() > 1e-6:
            cosine = float(torch.nn.functional.cosine_similarity(value.flatten(), half[name].flatten(), dim=0))
            assert cosine > 0.98, f"{name}: cosine {cosine:.3f}"


def parts_equal_the_whole_batch(device: torch.device, folder: Path) -> None:
    """A batch in four parts has the gradients of the batch."""
    whole, parts = (gradients(trainer_of(device, folder, str(n), accumulation=n, precision="float32")) for n in (1, 4))
    near(parts, whole, 1e-3)


def compiled_equals_eager(device: torch.device, folder: Path) -> None:
    """Compiled, a step has the eager one's gradients, and ten batches need no more graphs than there are budgets."""
    before = graphs_compiled()
    eager, compiled = (
        trainer_of(device, folder, str(c), compile=c, precision="float32", steps=10) for c in (False, True)
    )
    near(gradients(compiled), gradients(eager), 1e-3)
    compiled.run()
    graphs = graphs_compiled() - before
    assert graphs <= MOST_BUDGETS + 1, f"{graphs} graphs for {len(compiled.encoder.budgets.used)} budgets"  # type: ignore[attr-defined]


def replayed_equals_eager(device: torch.device, folder: Path) -> None:
    """With a copy stream and CUDA graphs the weights after ten steps are the plain ones."""
    compile_too = device.type == "cuda"
    fields: dict[str, Any] = {"steps": 10, "precision": "float32"}
    plain = trainer_of(device, folder, "plain", **fields)
    replayed = trainer_of(device, folder, "replayed", compile=compile_too, cuda_graphs=True, **fields)
    for trainer in (plain, replayed):
        trainer.run()
    before = {name: p.detach().double().cpu() for name, p in plain.model.named_parameters()}
    near({name: p.detach().double().cpu() for name, p in replayed.model.named_parameters()}, before, 1e-2)


def resumed_equals_whole(device: torch.device, folder: Path) -> None:
    """A run that is cut after four of eight steps ends with the weights of one that was not."""
    fields: dict[str, Any] = {"steps": 8, "checkpoint_every": 4, "ema": 0.5, "precision": "float32"}
    whole, cut = trainer_of(device, folder, "whole", **fields), trainer_of(device, folder, "cut", **fields)
    whole.run()
    cut_at(cut, 5)
    again = trainer_of(device, folder, "cut", **fields)
    again.run()
    wanted = {name: p.detach().double().cpu() for name, p in whole.model.named_parameters()}
    found = {name: p.detach().double().cpu() for name, p in again.model.named_parameters()}
    near(found, wanted, 1e-3 if device.type == "cuda" else 1e-12)  # kernels of a GPU add in any order


def nothing_waits_in_a_step(device: torch.device, folder: Path) -> None:
    """torch raises where a step would wait for the GPU."""
    trainer = trainer_of(device, folder, "run", accumulation=2, equal_targets="once", ema=0.5)
    with trainer.ahead:
        trainer._train_step(0)
        with _waiting_is_an_error(device):
            for step in (1, 2):
                trainer._train_step(step)


def a_step_that_is_not_finite_changes_nothing(device: torch.device, folder: Path) -> None:
    """Not one weight moves from such a step on, it ends the run, and no checkpoint is written of it."""
    trainer = trainer_of(device, folder, "run", steps=12, checkpoint_every=2)
    compute, kept = trainer.compute_gradients, []

    def broken(batch: Any) -> Any:
        losses = compute(batch)
        kept.append(trainer.model.token_embedding.weight.detach().clone())
        if len(kept) == 6:
            trainer.model.ln_final.weight.grad.fill_(float("inf"))
        return losses

    trainer.compute_gradients = broken  # type: ignore[method-assign]
    try:
        trainer.run()
    except FuselipError as error:
        assert "at step 5" in str(error)
    else:
        raise AssertionError("the run went on")
    assert torch.equal(trainer.model.token_embedding.weight, kept[5])
    assert sorted(path.name for path in (folder / "run").iterdir())[-1] == "step-00000004"


@contextlib.contextmanager
def _waiting_is_an_error(device: torch.device) -> Iterator[None]:
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS: tuple[Callable[[torch.device, Path], None], ...] = (
    published_values_are_reproduced,
    packed_equals_padded,
    bfloat16_stays_near_float32,
    parts_equal_the_whole_batch,
    resumed_equals_whole,
    nothing_waits_in_a_step,
    a_step_that_is_not_finite_changes_nothing,
    compiled_equals_eager,
    replayed_equals_eager,
)
