"""A copy of this checkout as a git and DVC repository of its own, for tests that run whole pipelines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# Stand-ins for the stages, where the mechanics around them are tested: each writes its outputs, or fails if told to.
STAND_IN_STAGES = """
from pathlib import Path

from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.files import write_json

OUTPUTS = {
    "prepare": ["prepared"], "codebook": ["codebook"], "tokenize": ["tokens"], "train": ["model", "history.jsonl"],
    "evaluate": ["report", "metrics.json"], "register": ["registered.json"],
}
CONTENT = {
    "metrics.json": {"retrieval/image_to_text/recall_at_1": 0.4, "retrieval/image_to_text/chance_at_1": 0.01},
    "registered.json": {"name": "stand-in", "version": 1, "alias": "champion", "gates": []},
}


def stand_in(stage):
    def run(settings):
        with Path("calls").open("a") as stream:
            stream.write(stage + "\\n")
        order = Path("order").read_text().split() if Path("order").exists() else []
        if order[:1] == [stage]:
            raise {"fail": FuselipError, "interrupt": Interrupted}[order[1]](f"no luck in {stage}; try again")
        for name in OUTPUTS[stage]:
            if "." in name:
                write_json(settings.artifacts / name, CONTENT.get(name, {}))
            else:
                (settings.artifacts / name).mkdir(parents=True)
                made = f"train {settings.train.steps}" if stage == "train" else stage
                (settings.artifacts / name / "made").write_text(made)
        return {"stage": stage}

    return run


prepare, codebook, tokenize, train, evaluate, register = map(stand_in, OUTPUTS)
"""


def copy_repository(target: Path) -> Path:
    """Tracked files, and those that would be tracked, committed in a new git repository at `target`."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        if (REPOSITORY / name).is_file() and not name.startswith(("runs/", "dvc.lock")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, target / name)
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "copy"]):
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        subprocess.run(["git", *identity, *arguments], cwd=target, check=True)
    return target


def dvc(folder: Path, *arguments: str) -> str:
    """What a dvc command says; fails with its words if it fails."""
    done = subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def add_data(folder: Path) -> None:
    """Some files as data/, known to DVC; data.dvc says so."""
    (folder / "data").mkdir()
    (folder / "data" / "file.txt").write_text("data")
    dvc(folder, "add", "-q", "data")


def run_flow(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m flows.pipeline`` as a user of the copy starts it."""
    keep = {
        name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_", "FUSELIP_"))
    }
    command = [sys.executable, "-m", "flows.pipeline", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=keep, timeout=500)
