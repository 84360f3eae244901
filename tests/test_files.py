"""Files that are whole or absent, and what a full disk looks like: a real one, of one megabyte."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_folder, atomic_write, read_json, take_space


def test_what_a_library_raises_on_a_full_disk_is_named(small_disk: Path) -> None:
    import torch
    from safetensors.torch import save_file

    weights = {"weight": torch.zeros(1 << 20)}
    with pytest.raises(OSError) as safetensors, atomic_folder(small_disk / "model") as folder:
        save_file(weights, folder / "model.safetensors")
    with pytest.raises(OSError) as pickled, atomic_write(small_disk / "state.pt") as partial:
        torch.save(weights, partial)
    assert {each.value.errno for each in (safetensors, pickled)} == {errno.ENOSPC}
    assert safetensors.value.filename == str(small_disk / "model")
    assert not list(small_disk.iterdir()), "nothing half written stays"


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), atomic_write(tmp_path / "file") as partial:
        partial.write_text(str(1 / 0))


def test_space_for_a_mapped_file_is_taken_or_refused(small_disk: Path) -> None:
    path = small_disk / "pixels.npy"
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(1 << 19,))
    take_space(path)
    mapped[:] = 1
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(1 << 22,))
    with pytest.raises(OSError, match="No space left") as refused:
        take_space(path)
    assert refused.value.filename == str(path)


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"[]", b"3", b"\xff\xfe\x00"])
def test_damaged_json_is_named_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "metrics.json"
    with pytest.raises(FuselipError, match=r"metrics\.json is missing; run it"):
        read_json(path, "run it")
    path.write_bytes(content)
    with pytest.raises(FuselipError, match=r"metrics\.json is damaged .*; run it"):
        read_json(path, "run it")
    path.write_text('{"a": 1}')
    assert read_json(path, "run it") == {"a": 1}


def test_what_killed_processes_left_is_swept_up_and_what_runs_is_not(tmp_path: Path) -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    left = [tmp_path / f".model.{gone.pid}.{kind}" for kind in ("partial", "old")]
    other = [
        tmp_path / f".model.{os.getppid()}.partial",
        tmp_path / ".model.x.partial",
        tmp_path / f".a.{gone.pid}.old",
    ]
    (tmp_path / "model").mkdir()
    for folder in (*left, *other):
        folder.mkdir()
        (folder / "weights").touch()
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "weights").touch()
    assert not any(each.exists() for each in left) and all(each.exists() for each in other)
    assert (tmp_path / "model" / "weights").exists()
