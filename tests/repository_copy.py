"""A copy of this checkout as a git and DVC repository of its own, for tests that run whole pipelines."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]

# Stand-ins for the stages, where the mechanics around them are tested: each writes its outputs, or fails if told to.
# The file `order` says what a stage is to do: `train fail`, `train interrupt`, or `train slow 30`, which takes 30 ticks
# that it notes, and goes on behind the last of them after it was stopped or killed. Where there is a file `real`, the
# real stages run.
STAND_IN_STAGES = """
import importlib
import os
import signal
import time
from pathlib import Path

from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.files import write_json

OUTPUTS = {
    "prepare": ["prepared"], "codebook": ["codebook"], "tokenize": ["tokens"], "train": ["model", "history.jsonl"],
    "evaluate": ["report", "metrics.json"], "register": ["registered.json", "cards"],
}
CONTENT = {
    "metrics.json": {"retrieval/image_to_text/recall_at_1": 0.4, "retrieval/image_to_text/chance_at_1": 0.01},
    "registered.json": {"name": "stand-in", "version": 1, "alias": "champion", "gates": []},
}
TICK = 0.2


def note(name, line):
    with Path(name).open("a") as stream:
        stream.write(line + "\\n")


def slow(ticks):
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    done = len(Path("ticks").read_text().split()) if Path("ticks").exists() else 0
    print(f"resuming from step {done}", flush=True)
    for step in range(done, ticks):
        if stop:
            note("saved", str(step))
            raise Interrupted(f"stopped at step {step} and saved")
        note("ticks", f"{step}:{time.time():.2f}:{os.getpid()}")
        print(f"training: {step + 1} of {ticks}", flush=True)
        time.sleep(TICK)


def stand_in(stage):
    def run(settings):
        if Path("real").exists():
            return getattr(importlib.import_module("fuselip_core.real_stages"), stage)(settings)
        note("calls", stage)
        order = Path("order").read_text().split() if Path("order").exists() else []
        if order[:2] == [stage, "slow"]:
            slow(int(order[2]))
        elif order[:1] == [stage]:
            raise {"fail": FuselipError, "interrupt": Interrupted}[order[1]](f"no luck in {stage}; try again")
        for name in OUTPUTS[stage]:
            if "." in name:
                write_json(settings.artifacts / name, CONTENT.get(name, {}))
            else:
                (settings.artifacts / name).mkdir(parents=True, exist_ok=True)
                made = f"train {settings.train.steps}" if stage == "train" else stage
                (settings.artifacts / name / "made").write_text(made)
                if stage == "prepare":
                    pairs = dict.fromkeys(("caption", "sentence", "concepts", "vqa", "statement", "edit"), 1)
                    counts = {split: {"images": 1, "cases": 1, "pairs": pairs} for split in ("train", "valid", "test")}
                    content = {"data_version": "0d4a7e11f00d", "counts": counts, "shards": []}
                    write_json(settings.artifacts / name / "manifest.json", content)
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


def add_environment(folder: Path) -> None:
    """A .venv of the copy's own, as `make setup` leaves it: the copy's code with the packages of this environment."""
    mine, target = Path(sys.prefix), folder / ".venv"
    shutil.copytree(mine / "bin", target / "bin", symlinks=True)
    for program in (target / "bin").iterdir():
        if not program.is_symlink() and (text := program.read_bytes()).startswith(b"#!"):
            program.write_bytes(text.replace(os.fsencode(mine), os.fsencode(target)))
    shutil.copy2(mine / "pyvenv.cfg", target)
    packages = Path("lib", f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
    (target / packages).mkdir(parents=True)
    (target / packages / "copy.pth").write_text(f"{folder}\n{mine / packages}\n")
    (target / ".complete").write_text(str(folder))


def bare_environment(home: Path) -> dict[str, str]:
    """What a shell has in which no environment is activated and nothing is configured."""
    threads = {name: value for name, value in os.environ.items() if name.endswith("_NUM_THREADS")}
    return {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": str(home), **threads}


def copy_with_stand_ins(target: Path) -> Path:
    """A copy whose stages are the stand-ins above, with a little data; the real stages are `real_stages` there."""
    folder = copy_repository(target)
    stages = folder / "fuselip_core" / "stages.py"
    stages.rename(stages.with_name("real_stages.py"))
    stages.write_text(STAND_IN_STAGES)
    (folder / "data.dvc").unlink(missing_ok=True)
    add_data(folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy of a copy."""
    subprocess.run(["cp", "-r", str(folder), str(target)], check=True)
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
    command = [sys.executable, "-m", "flows.pipeline", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(), timeout=1100)


def terminate_flow(folder: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a flow in a copy with stand-ins that gets SIGTERM in the middle of its first stage."""
    (folder / "order").write_text("prepare slow 1000")
    command = [sys.executable, "-m", "flows.pipeline", *arguments]
    log = folder.parent / "stderr"
    with log.open("w") as stderr:
        child = subprocess.Popen(command, cwd=folder, stderr=stderr, env=environment())
    late = time.monotonic() + 300
    while child.poll() is None and not (folder / "ticks").exists():
        assert time.monotonic() < late, log.read_text()
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    return child.wait(timeout=100), log.read_text()


def environment() -> dict[str, str]:
    """This process's environment without what points to a server or a store of its own."""
    mine = ("PREFECT_", "MLFLOW_", "FUSELIP_")
    return {name: value for name, value in os.environ.items() if not name.startswith(mine)}
