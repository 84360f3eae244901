"""One step of training against its plain definition: in parts, over processes, averaged, layer by layer."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_store import cut_at, random_store, settings_of, tiny_model

from fuselip_core.config import TrainSettings
from fuselip_core.data.tokens.joined import JoinedStore
from fuselip_core.data.tokens.store import TokenStore, gather
from fuselip_core.distributed import World, join_world
from fuselip_core.encoding.from_codes import TokenEncoder, TokenPairs
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.before_after import compare
from fuselip_core.training.build import extend_context, interpolate, trained_weights
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.ema import AveragedWeights
from fuselip_core.training.loop import Trainer, run_folder
from fuselip_core.training.losses import SigmoidLoss, contrastive_over_all
from fuselip_core.training.optimizer import build_adamw, clip_in_step
from fuselip_core.training.plan import plan_schedule
from fuselip_core.training.preflight import chance_loss

ALONE = World()


def trainer_of(store: Any, settings: TrainSettings, folder: Path, world: World = ALONE, **model: object) -> Trainer:
    encoder = TokenPairs(tiny_model(**model), store, settings.mask_probability)
    lines: list[tuple[int, dict[str, float]]] = []
    trainer = Trainer(
        encoder, store, settings, Checkpoints(folder), lambda m, step: lines.append((step, m)), None, world
    )
    trainer.lines = lines  # type: ignore[attr-defined]
    return trainer


def gradients_of(trainer: Trainer, rows: np.ndarray) -> dict[str, torch.Tensor]:
    trainer.compute_gradients(trainer.batches.make(rows, step=0))
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("all_combinations", [False, True])
def test_gradients_in_parts_are_those_of_the_whole_batch(tmp_path: Path, all_combinations: bool) -> None:
    store = random_store(tmp_path / "store", views=1)
    rows = np.arange(0, 24, 3)
    found = []
    for parts in (1, 4):
        # Every token is hidden, so that no draw differs between the two.
        settings = settings_of(accumulation=parts, mask_probability=1.0, all_combinations=all_combinations)
        found.append(gradients_of(trainer_of(store, settings, tmp_path / str(parts)), rows))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_what_saves_memory_changes_no_gradient(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store", views=1)
    rows = np.arange(0, 24, 3)
    plain = gradients_of(trainer_of(store, settings_of(mask_probability=1.0), tmp_path / "plain"), rows)
    saving = trainer_of(
        store, settings_of(mask_probability=1.0, gradient_checkpointing=True, contrast_rows=3), tmp_path / "saving"
    )
    runs: list[int] = []
    for number, block in enumerate(saving.model.transformer.resblocks):
        block.register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    found = gradients_of(saving, rows)
    assert runs == [0, 1, 1, 0], "forward, and again in the backward pass, last block first"
    assert found.keys() == plain.keys() and len(found) > 20
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_without_a_compiler_compiling_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = random_store(tmp_path / "store")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(FuselipError, match=r"needs a C\+\+ compiler, here no-such-compiler; install g\+\+"):
        trainer_of(store, settings_of(compile=True), tmp_path / "run")


def test_a_run_goes_on_with_another_choice_of_memory_and_begins_anew_with_another_batch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = random_store(tmp_path / "store")
    settings = settings_of(steps=3, checkpoint_every=2)
    trainer_of(store, settings, run_folder(tmp_path / "runs", settings, store)).run()
    saving = settings.model_copy(update={"gradient_checkpointing": True, "contrast_rows": 2})
    assert run_folder(tmp_path / "runs", saving, store) == run_folder(tmp_path / "runs", settings, store)
    with caplog.at_level(logging.WARNING, "fuselip"):
        again = trainer_of(store, saving, run_folder(tmp_path / "runs", saving, store))
        again._resume()
        assert again.step == 2 and not caplog.text
        smaller = settings.model_copy(update={"batch_size": 4})
        anew = trainer_of(store, smaller, run_folder(tmp_path / "runs", smaller, store))
        anew._resume()
    assert anew.step == 0
    assert "holds a run with other settings or data; this one begins anew" in caplog.text


def process(rank: int, size: int, port: int, folder: Path, settings: TrainSettings) -> None:
    """One of several processes: its loss and gradients of a batch, and then a short run."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join_world()
    trainer = trainer_of(TokenStore(folder / "store", "train"), settings, folder / "run", world, seed=rank)
    world.broadcast(trainer.model)
    losses = trainer.compute_gradients(trainer.batches.make(world.share(np.arange(0, 24, 3)), step=0))
    total = world.mean(losses.contrastive).item(), losses.masked.item()
    gradients = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    if rank == 0:
        torch.save({"losses": total, "gradients": gradients}, folder / "found.pt")
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.run()
    weights = world.collect(trainer.model.logit_scale.item())
    if rank == 0:
        (folder / "after.json").write_text(json.dumps({"weights": weights, "lines": trainer.lines}))  # type: ignore[attr-defined]
    dist.destroy_process_group()


def resume_apart(rank: int, size: int, port: int, folder: Path, settings: TrainSettings) -> None:
    """One of several processes whose folders of checkpoints are not the same; writes what it refuses with."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = join_world()
    trainer = trainer_of(TokenStore(folder / "store", "train"), settings, folder / f"machine-{rank}", world)
    with pytest.raises(FuselipError) as refusal:
        trainer.run()
    (folder / f"refusal-{rank}").write_text(str(refusal.value))
    dist.destroy_process_group()


def start(size: int, folder: Path, settings: TrainSettings, process: Any = process) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.start_processes(process, (size, port, folder, settings), nprocs=size, start_method="spawn")


@pytest.mark.parametrize("fields", [{}, {"accumulation": 2, "all_combinations": True}])
def test_two_processes_compute_what_one_does_with_the_joined_batch(tmp_path: Path, fields: dict[str, Any]) -> None:
    store = random_store(tmp_path / "store", views=1)
    settings = settings_of(mask_probability=1.0, steps=2, checkpoint_every=1, **fields)
    start(2, tmp_path, settings)
    found = torch.load(tmp_path / "found.pt")
    alone = trainer_of(store, settings, tmp_path / "alone")
    losses = alone.compute_gradients(alone.batches.make(np.arange(0, 24, 3), step=0))
    assert found["losses"][0] == pytest.approx(losses.contrastive.item(), abs=1e-5)
    for name, p in alone.model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(found["gradients"][name], p.grad, atol=1e-5, rtol=1e-5)
    after = json.loads((tmp_path / "after.json").read_text())
    assert after["weights"][0] == after["weights"][1], "all processes hold the same weights"
    # The run that two processes began is not one that a single one can go on with.
    with pytest.raises(FuselipError, match="run of 2 processes and cannot go on with 1"):
        trainer_of(store, settings, tmp_path / "run").run()


def test_processes_that_find_different_checkpoints_are_refused(tmp_path: Path) -> None:
    """Machines that share no folder: the first one has the checkpoint, the other would begin anew."""
    store = random_store(tmp_path / "store")
    settings = settings_of(steps=4, checkpoint_every=3)
    trainer_of(store, settings, tmp_path / "machine-0").run()
    start(2, tmp_path, settings, resume_apart)
    for rank in range(2):
        assert "found checkpoints of different steps (3, 0)" in (tmp_path / f"refusal-{rank}").read_text()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one_with_averages_and_parts(tmp_path: Path, damaged: bool) -> None:
    store = random_store(tmp_path / "store")
    settings = settings_of(ema=0.9, accumulation=2, steps=6, checkpoint_every=2)
    whole = trainer_of(store, settings, tmp_path / "whole")
    whole.run()
    cut = trainer_of(store, settings, tmp_path / "cut")
    cut_at(cut, 5)
    if damaged:
        (tmp_path / "cut" / "step-00000004" / "state.pt").write_bytes(b"not what was written")
    again = trainer_of(store, settings, tmp_path / "cut", seed=5)
    again.run()
    for name, p in whole.model.named_parameters():
        assert torch.equal(p, again.model.get_parameter(name)), name


def test_averaged_weights_follow_their_definition_and_step_aside() -> None:
    model = torch.nn.Linear(2, 1)
    average = AveragedWeights(model, decay=0.5)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1.0
    average.update()
    # The first updates count for more: min(0.5, 2 / 11) of the old mean stays.
    expected = start * 2 / 11 + (start + 1.0) * 9 / 11
    with average.applied():
        torch.testing.assert_close(model.weight, expected)
    torch.testing.assert_close(model.weight, start + 1.0)
    average.keep()
    torch.testing.assert_close(model.weight, expected)


def test_out_of_gpu_memory_is_a_sentence_with_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(random_store(tmp_path / "store"), settings_of(accumulation=2), tmp_path / "run")

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer.encoder, "encode", full)
    with pytest.raises(FuselipError, match=r"batch_size 8 in 2 parts .*train\.accumulation=4"):
        trainer.run()


def test_weight_decay_is_on_matrices_only() -> None:
    model = tiny_model()
    decayed, free = build_adamw([model], 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"]) and all(p.ndim < 2 for p in free["params"])
    trained = sum(p.numel() for group in (decayed, free) for p in group["params"])
    assert trained == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("largest", [0.01, 100.0])
def test_clipping_in_the_fused_step_is_that_of_torch_before_a_plain_one(largest: float) -> None:
    torch.manual_seed(0)
    models = [torch.nn.Linear(6, 5) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused = build_adamw([models[0]], 1e-2, 0.1)
    plain = torch.optim.AdamW(
        [{**group, "fused": False} for group in build_adamw([models[1]], 1e-2, 0.1).param_groups], lr=1e-2
    )
    for _ in range(3):
        inputs = torch.randn(7, 6)
        for model in models:
            model.zero_grad()
            model(inputs).square().mean().backward()
        norm = clip_in_step(fused, largest)
        fused.step()
        assert norm == torch.nn.utils.clip_grad_norm_(models[1].parameters(), largest)
        plain.step()
        for found, wanted in zip(models[0].parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(found.grad, wanted.grad, atol=1e-7, rtol=1e-4)


def test_length_and_warm_up_of_a_run(tmp_path: Path) -> None:
    store = random_store(tmp_path)
    passes = {"steps": None, "epochs": 3, "mixture": {"caption": 1.0, "vqa": 0.5}, "mixture_by": "passes"}
    schedule = plan_schedule(store, settings_of(**passes, warmup_share=None, warmup_steps=2))
    assert (schedule.steps, schedule.warmup) == (round(3 * (12 + 6) / 8), 2)
    assert [schedule.rate(step) for step in (0, 1)] == [0.0005, 0.001]
    whole = plan_schedule(store, settings_of(steps=None, epochs=2))
    assert whole.steps == 2 * 24 // 8
    with pytest.raises(FuselipError, match="warm-up of 12000 steps does not end within the run of 7"):
        plan_schedule(store, settings_of(**passes, warmup_share=None, warmup_steps=12_000))


def test_mixture_by_passes_takes_each_pair_as_often_as_it_says(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    fields = {
        "steps": None,
        "epochs": 2,
        "mixture": {"caption": 1.0, "vqa": 0.5},
        "mixture_by": "passes",
        "batch_size": 6,
    }
    trainer = trainer_of(store, settings_of(**fields), tmp_path / "run")
    rows = np.concatenate([trainer.batches.next_rows() for _ in range(trainer.schedule.steps)])
    counts = np.bincount(rows, minlength=24)
    assert (counts[:12].sum(), counts[12:].sum()) == (24, 12)


def test_preflight_leaves_the_run_as_it_would_have_been(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    looked, plain = (
        trainer_of(store, settings_of(preflight=preflight), tmp_path / str(preflight)) for preflight in (True, False)
    )
    looked.run()
    plain.run()
    assert torch.equal(looked.model.token_embedding.weight, plain.model.token_embedding.weight)
    step, found = looked.lines[0]  # type: ignore[attr-defined]
    assert step == 0 and found["preflight/masked"] == pytest.approx(math.log(looked.model.config.vocab_size), rel=0.05)
    assert found["preflight/contrastive"] == pytest.approx(found["preflight/contrastive_at_chance"], rel=0.25)


def test_chance_loss_is_that_of_equal_similarities() -> None:
    embeddings = torch.nn.functional.normalize(torch.ones(5, 4), dim=-1)
    keys = torch.arange(15).reshape(5, 3)
    scale, bias = torch.tensor(10.0), torch.tensor(-3.0)
    loss = contrastive_over_all(embeddings, embeddings, keys, SigmoidLoss(scale, bias), World(), all_combinations=False)
    assert chance_loss(1.0, 10.0, -3.0, 5) == pytest.approx(loss.item(), rel=1e-5)


def test_a_parameter_that_nothing_reaches_is_named_before_the_first_step(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    trainer = trainer_of(store, settings_of(), tmp_path / "run")
    trainer.model.transformer.resblocks[1].register_parameter("forgotten", torch.nn.Parameter(torch.ones(3)))
    with pytest.raises(FuselipError, match=r"no gradient reaches transformer\.resblocks\.1\.forgotten"):
        trainer.run()


def test_a_batch_too_small_for_processes_and_parts_is_refused(tmp_path: Path) -> None:
    store = random_store(tmp_path / "store")
    with pytest.raises(
        FuselipError, match=r"batch_size 8 gives 4 processes no pair for each of 4 parts; raise it to 16"
    ):
        trainer_of(store, settings_of(accumulation=4), tmp_path / "run", World(0, 4))
    trainer_of(store, settings_of(accumulation=4), tmp_path / "run", World(0, 2))


def test_all_combinations_tell_queries_from_queries_and_targets_from_targets() -> None:
    generator = torch.Generator().manual_seed(0)
    query, target = (torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=-1) for _ in range(2))
    # Pairs 0 and 2 have the same target, 1 and 3 are of one set.
    keys = torch.tensor([[0, 0, -1], [1, 0, 7], [0, 0, -1], [2, 0, 7]])
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    found = contrastive_over_all(query, target, keys, SigmoidLoss(scale, bias), World(), all_combinations=True)
    expected = torch.zeros(())
    for i in range(4):
        for j in range(4):
            equal = i % 2 == j % 2
            sign = 1.0 if i == j else -1.0
            if i == j or not equal:
                expected -= torch.nn.functional.logsigmoid(sign * (scale * query[i] @ target[j] + bias))
            if not equal:
                for side in (query, target):
                    expected -= torch.nn.functional.logsigmoid(-(scale * side[i] @ side[j] + bias))
    torch.testing.assert_close(found, expected / 4)


def test_targets_apart_tell_targets_from_targets_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, target = (torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=-1) for _ in range(2))
    keys = torch.tensor([[0, 0, -1], [1, 0, -1], [0, 0, -1]])  # pairs 0 and 2 have the same target
    scale, bias = torch.tensor(5.0), torch.tensor(-2.0)
    loss_of, world = SigmoidLoss(scale, bias), World()
    plain = contrastive_over_all(query, target, keys, loss_of, world, all_combinations=False)
    found = contrastive_over_all(query, target, keys, loss_of, world, all_combinations=False, targets_apart=True)
    different = [(0, 1), (1, 0), (1, 2), (2, 1)]
    terms = [torch.nn.functional.logsigmoid(-(scale * target[i] @ target[j] + bias)) for i, j in different]
    torch.testing.assert_close(found - plain, -torch.stack(terms).sum() / 3)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_else(tmp_path: Path) -> None:
    trainer = trainer_of(random_store(tmp_path / "store"), settings_of(optimizer="muon"), tmp_path / "run")
    by_muon = {id(p) for group in trainer.optimizer.muon.param_groups for p in group["params"]}  # type: ignore[union-attr]
    for name, p in trainer.model.named_parameters():
        assert (id(p) in by_muon) == (p.ndim == 2 and ".resblocks." in name), name
    both = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len({id(p) for p in both}) == len(both) == len(list(trainer.model.parameters()))


def test_a_longer_context_changes_no_sequence_that_fitted(tmp_path: Path) -> None:
    store = random_store(tmp_path)
    model = tiny_model(context_length=12)
    rows = np.arange(24)
    before = TokenEncoder(model, torch.device("cpu")).encode(gather(store, rows, "query"))
    extend_context(model, 20)
    assert model.config.context_length == len(model.positional_embedding) == 20
    np.testing.assert_allclose(TokenEncoder(model, torch.device("cpu")).encode(gather(store, rows, "query")), before)
    assert torch.equal(model.positional_embedding[12], model.positional_embedding[11])
    with pytest.raises(FuselipError, match="below the 20 places"):
        extend_context(model, 8)


def test_weights_between_before_and_after() -> None:
    model = torch.nn.Linear(2, 2)
    before = trained_weights(model)
    with torch.no_grad():
        model.weight += 1.0
    interpolate(model, before, 0.25)
    torch.testing.assert_close(model.weight, before["weight"] + 0.25)


def test_before_and_after_are_compared_metric_by_metric() -> None:
    before = {"retrieval/image_to_text/recall_at_1": 0.2, "retrieval/pool": 9.0, "answers/fused/accuracy": 0.0}
    after = {"retrieval/image_to_text/recall_at_1": 0.5, "retrieval/pool": 9.0, "answers/fused/accuracy": 0.1}
    found = compare("target", before, after)
    place = "adaptation/target/retrieval/image_to_text/recall_at_1"
    assert found[f"{place}/gain"] == pytest.approx(0.3) and found[f"{place}/kept"] == pytest.approx(2.5)
    assert (
        "adaptation/target/answers/fused/accuracy/kept" not in found
        and "adaptation/target/retrieval/pool/gain" not in found
    )


def test_stores_joined_read_as_each_does_alone(tmp_path: Path) -> None:
    own, other = random_store(tmp_path / "own"), random_store(tmp_path / "other", pairs=16, seed=1)
    joined = JoinedStore(own, {"general": other})
    np.testing.assert_array_equal(joined.rows_of("general:vqa"), other.rows_of("vqa") + 24)
    rows = np.array([30, 2, 25, 13])
    for side in ("query", "target"):
        found = joined.gather(rows, side)  # type: ignore[arg-type]
        for place, (store, row) in enumerate([(other, 6), (own, 2), (other, 1), (own, 13)]):
            alone = gather(store, np.array([row]), side)  # type: ignore[arg-type]
            length = int(alone.text_lengths[0])
            np.testing.assert_array_equal(found.codes[place], alone.codes[0])
            np.testing.assert_array_equal(found.text_ids[place, :length], alone.text_ids[0])
            assert found.text_lengths[place] == length and found.has_image[place] == alone.has_image[0]
    assert len(set(joined.pairs.target_text[np.arange(40)].tolist())) == 40, "equal row numbers of two stores differ"
    settings = settings_of(
        mixture={"caption": 0.5, "general:caption": 0.5}, tokens={"general": tmp_path / "other"}, steps=2
    )
    trainer = trainer_of(joined, settings, tmp_path / "run")
    assert sorted(row >= 24 for row in trainer.batches.next_rows()) == [False] * 4 + [True] * 4
    trainer.run()


def test_stores_of_different_codebooks_are_not_joined(tmp_path: Path) -> None:
    own, other = random_store(tmp_path / "own"), random_store(tmp_path / "other", codebook="d")
    with pytest.raises(FuselipError, match="differ in codebook"):
        JoinedStore(own, {"general": other})
