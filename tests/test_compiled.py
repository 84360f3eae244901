"""Batches at few numbers of tokens, and the step that is compiled for them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from needs import missing
from tiny_store import random_store, settings_of, tiny_model

from fuselip_core.encoding.from_codes import TokenPairs
from fuselip_core.encoding.packed_sides import MOST_BUDGETS, TokenBudgets
from fuselip_core.model.compiled import graphs_compiled
from fuselip_core.model.vocabulary import IGNORED, PAD
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.loop import Trainer


def trainer_of(tmp_path: Path, name: str, **fields: Any) -> Trainer:
    store = random_store(tmp_path / f"store-{name}")
    settings = settings_of(**fields)
    lines: list[dict[str, float]] = []
    encoder = TokenPairs(tiny_model(), store, settings.mask_probability)
    trainer = Trainer(
        encoder, store, settings, Checkpoints(tmp_path / name), lambda metrics, step: lines.append(metrics)
    )
    trainer.lines = lines  # type: ignore[attr-defined]
    return trainer


def test_batches_have_few_numbers_of_tokens_and_say_the_same(tmp_path: Path) -> None:
    batches = trainer_of(tmp_path, "run", mask_probability=0.3).batches
    budgets = TokenBudgets(8, 16, 0.3)
    budgets.grain, shapes = 16, set()
    for step in range(40):
        plain = batches.make(batches.next_rows(), step).parts[0]
        padded = budgets.pad(plain)
        if not padded.padded:
            assert padded is plain
            continue
        tokens, layout = len(plain.ids), padded.layout
        assert torch.equal(padded.ids[:tokens], plain.ids) and not (padded.ids[tokens:] != PAD).any()
        assert torch.equal(layout.boundaries[: len(plain.layout.boundaries)], plain.layout.boundaries)
        assert int(layout.boundaries[-1]) == len(padded.ids)
        assert int(layout.boundaries.diff().min()) >= 0 and int(layout.boundaries.diff().max()) <= layout.longest == 16
        assert padded.labels is not None and padded.hidden_places is not None
        assert torch.equal(padded.labels[: plain.hidden], plain.labels)
        assert bool((padded.labels[plain.hidden :] == IGNORED).all())
        shapes.add((len(padded.ids), len(padded.labels), len(layout.boundaries), len(padded.hidden_places)))
    assert 1 < len(shapes) == len(budgets.used) <= MOST_BUDGETS
    fewer = batches.make(batches.next_rows()[:5], 0).parts[0]
    assert budgets.pad(fewer) is fewer, "a batch of other pairs is not compiled for"


def test_a_budget_for_large_batches_wastes_little() -> None:
    for pairs, share in ((256, 0.03), (1024, 0.02), (2048, 0.015)):
        budgets = TokenBudgets(pairs, 180, 0.1)
        assert budgets.grain / 2 < share * pairs * 164, "half a grain is padding on average"
        assert budgets._sequences() * 180 >= budgets.grain


@pytest.mark.long  # compiling takes minutes
def test_a_compiled_run_is_the_eager_one_in_as_many_graphs_as_there_are_budgets(tmp_path: Path) -> None:
    if not shutil.which("g++"):
        missing("needs a C++ compiler (Debian's package g++)")
    fields = {"steps": 10, "accumulation": 1, "mask_probability": 0.3, "learning_rate": 1e-4}
    plain, compiled = (trainer_of(tmp_path, str(choice), compile=choice, **fields) for choice in (False, True))
    before = graphs_compiled()
    for trainer in (plain, compiled):
        trainer.run()
    budgets = compiled.encoder.budgets.used  # type: ignore[attr-defined]
    assert 1 <= len(budgets) <= MOST_BUDGETS
    assert graphs_compiled() - before <= len(budgets) + 1, "one for each budget, and the contrastive loss"
    assert compiled.lines[-1]["compiled_graphs"] == graphs_compiled()  # type: ignore[attr-defined]
    assert compiled.lines[-1]["loss"] == pytest.approx(plain.lines[-1]["loss"], rel=1e-4)  # type: ignore[attr-defined]
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()
    rows = np.arange(0, 24, 3)
    for trainer in (plain, compiled):
        trainer.model.load_state_dict(plain.model.state_dict())
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.compute_gradients(trainer.batches.make(rows, step=0))
    for name, p in plain.model.named_parameters():
        found = compiled.model.get_parameter(name).grad
        torch.testing.assert_close(found, p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
