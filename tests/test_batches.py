"""Batches made beside the step, values read late, and steps that are not finite: on any device the same weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_store import random_store, settings_of, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from fuselip_core.encoding.from_codes import TokenPairs
from fuselip_core.errors import FuselipError
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.late_look import LateLook
from fuselip_core.training.loop import Trainer
from fuselip_core.training.losses import repeated

CPU = torch.device("cpu")
# What reads a number or a size out of a tensor, for which a GPU would have to finish first.
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "is_nonzero", "equal"}


def trainer_of(tmp_path: Path, name: str, late: int = 0, **fields: Any) -> Trainer:
    store = random_store(tmp_path / f"store-{name}")
    settings = settings_of(**{"steps": 6, **fields})
    encoder = TokenPairs(tiny_model(), store, settings.mask_probability)
    lines: list[tuple[int, dict[str, float]]] = []
    trainer = Trainer(encoder, store, settings, Checkpoints(tmp_path / name), lambda m, step: lines.append((step, m)))
    trainer.late_look.late = late
    trainer.lines = lines  # type: ignore[attr-defined]
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_batch_made_ahead_is_the_one_made_when_it_is_needed(tmp_path: Path) -> None:
    plain, threaded = (trainer_of(tmp_path, name, grouped=True, accumulation=2) for name in ("plain", "ahead"))
    with threaded.ahead:
        for step in range(6):
            wanted, found = plain.batches.next(step), threaded.ahead.take(step)
            assert np.array_equal(found.rows, wanted.rows) and torch.equal(found.keys, wanted.keys)
            assert found.mixture == wanted.mixture
            for part, other in zip(found.parts, wanted.parts, strict=True):
                assert torch.equal(part.ids, other.ids) and torch.equal(part.labels, other.labels)
                assert part.hidden > 0 and torch.equal(part.hidden_places, other.hidden_places)


def test_batches_made_ahead_and_values_read_late_train_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = trainer_of(tmp_path, "late", late=4, ema=0.5)
    late.run()
    plain = trainer_of(tmp_path, "plain", ema=0.5)
    monkeypatch.setattr(plain.ahead, "take", plain.batches.next)
    plain.run()
    for name, value in weights_of(plain).items():
        assert torch.equal(late.model.get_parameter(name), value), name
    curves = [
        [
            (step, {name: value for name, value in line.items() if name in ("loss", "grad_norm", "lr")})
            for step, line in t
        ]
        for t in (late.lines, plain.lines)  # type: ignore[attr-defined]
    ]
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [0, 1, 6]


@pytest.mark.parametrize(("late", "optimizer"), [(0, "adamw"), (3, "adamw"), (3, "muon")])
def test_a_step_that_is_not_finite_never_reaches_weights_nor_a_checkpoint(
    tmp_path: Path, late: int, optimizer: str
) -> None:
    trainer = trainer_of(tmp_path, "run", late=late, checkpoint_every=3, preflight=False, optimizer=optimizer)
    compute, seen = trainer.compute_gradients, []

    def broken_at_step_3(batch: Any) -> Any:
        losses = compute(batch)
        seen.append(weights_of(trainer))
        if len(seen) == 4:
            trainer.model.ln_final.weight.grad[0] = math.nan
        return losses

    trainer.compute_gradients = broken_at_step_3  # type: ignore[method-assign]
    with pytest.raises(FuselipError, match=r"the gradient norm is nan at step 3 \(pairs "):
        trainer.run()
    assert len(seen) == (4 if late == 0 else 6), "found at once, or before the checkpoint of step 6 is written"
    for name, value in weights_of(trainer).items():
        assert torch.equal(value, seen[3][name]), name
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["step-00000003"]


def test_a_finite_run_is_the_same_with_and_without_the_guard(tmp_path: Path) -> None:
    guarded, bare = trainer_of(tmp_path, "guarded"), trainer_of(tmp_path, "bare")
    del bare.optimizer.found_inf
    for trainer in (guarded, bare):
        trainer.run()
    for name, value in weights_of(bare).items():
        assert torch.equal(guarded.model.get_parameter(name), value), name


class Waits(TorchDispatchMode):
    """Names of the operations that a GPU would have to be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("fields", [{}, {"accumulation": 2, "equal_targets": "once", "ema": 0.9}])
def test_nothing_in_a_step_waits_for_a_gpu(tmp_path: Path, fields: dict[str, Any]) -> None:
    trainer = trainer_of(tmp_path, "run", late=4, **fields)
    with trainer.ahead:
        trainer._train_step(0)  # its batch is made here, the next in a thread
        with Waits() as waits:
            trainer._train_step(1)
    assert waits.found == []
    with Waits() as waits:
        bool(torch.ones(()))
    assert waits.found == ["_local_scalar_dense"]


def test_values_are_handed_out_in_order_and_none_is_left() -> None:
    look = LateLook(CPU, late=2)
    handed = []
    for step in range(5):
        look.add(step, np.arange(2), {"loss": torch.tensor(float(step))})
        handed += [seen.step for seen in look.due()]
    assert handed == [0, 1, 2]
    assert [(seen.step, seen.values) for seen in look.due(all_steps=True)] == [(3, {"loss": 3.0}), (4, {"loss": 4.0})]
    assert look.broken.item() == 0.0
    for value in (math.inf, 1.0):
        look.add(5, np.arange(2), {"loss": torch.tensor(value)})
    assert look.broken.item() == 1.0, "a finite value behind it mends nothing"


def test_targets_that_an_earlier_key_has_are_repeated() -> None:
    keys = torch.tensor([[3, -1, 0], [2, 5, 1], [3, -1, 2], [-1, 5, 3], [2, 5, 4], [3, -1, 5], [3, 0, 6]])
    assert repeated(keys).tolist() == [False, False, True, False, True, True, False]
