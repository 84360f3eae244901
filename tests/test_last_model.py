"""The last good model stays while the next is trained, also where DVC starts the training."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml
from imports import REPOSITORY


def test_dvc_leaves_the_last_model_where_a_training_fails(tmp_path: Path) -> None:
    """Real DVC on the `outs` of the train stage; without `persist` it removes them before the stage starts."""
    outs = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]["train"]["outs"]
    stage = {"cmd": "sh ./train.sh", "deps": ["train.sh"], "outs": outs}
    (tmp_path / "dvc.yaml").write_text(
        yaml.safe_dump({"vars": [{"artifacts": "artifacts"}], "stages": {"train": stage}})
    )
    script = tmp_path / "train.sh"
    script.write_text("mkdir -p artifacts/model; echo good > artifacts/model/weights; echo 1 > artifacts/history.jsonl")
    _dvc(tmp_path, "init", "--no-scm", "--quiet")
    assert _dvc(tmp_path, "repro", "--quiet") == 0
    script.write_text("exit 3")
    assert _dvc(tmp_path, "repro", "--quiet") != 0
    assert (tmp_path / "artifacts" / "model" / "weights").read_text() == "good\n"


def _dvc(folder: Path, *arguments: str) -> int:
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=folder, check=False, capture_output=True, timeout=120).returncode
