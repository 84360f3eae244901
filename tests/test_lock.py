"""Only one process holds a lock, and nothing stays behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fuselip_core.errors import FuselipError
from fuselip_core.lock import sole_process

# Adds to a number in a file, many times and each time under the lock: two holders at once would lose additions.
COUNTER = """
import sys, time
from pathlib import Path
from fuselip_core.errors import FuselipError
from fuselip_core.lock import sole_process
folder, times = Path(sys.argv[1]), int(sys.argv[2])
while times:
    try:
        with sole_process(folder / ".lock", FuselipError("held")):
            number = int((folder / "number").read_text())
            time.sleep(0.001)
            (folder / "number").write_text(str(number + 1))
            times -= 1
    except FuselipError:
        pass
"""


def test_processes_that_delete_the_lock_file_still_exclude_one_another(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    workers = [subprocess.Popen([sys.executable, "-c", COUNTER, str(tmp_path), "100"]) for _ in range(3)]
    assert [worker.wait(120) for worker in workers] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "300"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_held_lock_refuses_and_an_error_releases_it(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with pytest.raises(KeyError), sole_process(lock, FuselipError("held")):
        with pytest.raises(FuselipError, match="held"), sole_process(lock, FuselipError("held")):
            pass
        raise KeyError
    with sole_process(lock, FuselipError("held")):
        assert lock.exists()
    assert not lock.exists()


def test_the_file_of_a_killed_process_locks_nothing(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    with sole_process(tmp_path / ".lock", FuselipError("held")):
        pass
