"""Checkpoints: the newest undamaged one counts, the last N stay, random states come back."""

from __future__ import annotations

import gc
import logging
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from fuselip_core.training.checkpoint import Checkpoints, random_state, set_random_state


def test_the_last_ones_stay_and_the_newest_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    step, state = checkpoints.latest() or (0, {})
    assert (step, int(state["value"])) == (3, 3)


@pytest.mark.parametrize("damage", ["cut", "flipped", "no digest", "odd digest"])
def test_a_damaged_newest_one_falls_back(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"value": torch.zeros(100)})
    newest = checkpoints.save(2, {"value": torch.ones(100)})
    content = bytearray((newest / "state.pt").read_bytes())
    if damage == "cut":
        (newest / "state.pt").write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        (newest / "state.pt").write_bytes(content)
    elif damage == "odd digest":
        (newest / "state.sha256").write_bytes(b"\xff\xfe")
    else:
        (newest / "state.sha256").unlink()
    with caplog.at_level(logging.WARNING, "fuselip"):
        assert (checkpoints.latest() or (0, {}))[0] == 1
    assert "damaged" in caplog.text


def test_damaged_ones_ahead_do_not_push_out_whole_ones(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (8, 10):
        (checkpoints.save(step, {"value": torch.ones(3)}) / "state.pt").write_bytes(b"")
    assert checkpoints.latest() is None
    for step in (2, 4):  # the run that begins anew
        checkpoints.save(step, {"value": torch.tensor(step)})
        assert (checkpoints.latest() or (0, {}))[0] == step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_full_disk_harms_no_finished_checkpoint(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk)
    checkpoints.save(1, {"value": torch.zeros(100_000)})
    with pytest.raises(OSError, match="No space left") as full:
        checkpoints.save(2, {"value": torch.ones(400_000)})
    assert full.value.filename == str(small_disk / "step-00000002")
    assert [path.name for path in small_disk.iterdir()] == ["step-00000001"], "nothing half written stays"
    assert (checkpoints.latest() or (0, {}))[0] == 1
    # The error's traceback keeps torch's writer, and so the removed file's space, until it is gone: a run ends here.
    del full
    gc.collect()
    checkpoints.save(2, {"value": torch.ones(100_000)})  # as soon as there is room
    assert (checkpoints.latest() or (0, {}))[0] == 2


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path / "absent").latest() is None


def test_random_states_come_back_through_a_file(tmp_path: Path) -> None:
    Checkpoints(tmp_path).save(1, random_state())
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())  # noqa: NPY002
    set_random_state((Checkpoints(tmp_path).latest() or (0, {}))[1])
    assert (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist()) == drawn  # noqa: NPY002
