"""Real processes, really killed at random steps: the losses are those of a run that nobody touched, bit for bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_training import EVERY, STEPS
from tiny_store import random_store

KILLS = 10


def lives(folder: Path, processes: int, kills: Sequence[int]) -> list[list[Any]]:
    """What each process wrote about its steps, in all its lives, while it was killed at the steps `kills`."""
    folder.mkdir()
    random_store(folder / "store")
    script = Path(__file__).with_name("killed_training.py")
    command = [sys.executable, str(script), str(folder), str(processes), ",".join(map(str, kills))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [(folder / f"losses-{rank}").read_text().splitlines() for rank in range(processes)]
    return [[json.loads(line) for line in each] for each in lines]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_at_ten_random_steps_is_the_uninterrupted_one(tmp_path: Path, processes: int) -> None:
    kills = sorted(random.Random(processes).sample(range(1, STEPS - 3), KILLS))
    whole = lives(tmp_path / "whole", processes, [])
    cut = lives(tmp_path / "cut", processes, kills)
    for untouched, killed in zip(whole, cut, strict=True):
        expected = {step: values for step, *values in untouched}
        assert sorted(expected) == list(range(STEPS))
        assert {step for step, _, _ in killed} == set(expected)
        assert len(killed) > STEPS, "steps behind the last checkpoint are done again"
        for step, *values in killed:
            assert values == expected[step], f"step {step}"
    weights, kept = (torch.load(tmp_path / name / "model.pt") for name in ("whole", "cut"))
    assert all(torch.equal(kept[name], value) for name, value in weights.items())
    folders = sorted(path.name for path in tmp_path.glob("cut/checkpoints/*/*"))
    last = (STEPS - 1) // EVERY * EVERY
    assert folders == [f"step-{last - EVERY:08d}", f"step-{last:08d}"], "the last two stay, and nothing half written"
