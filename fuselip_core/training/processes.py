"""Training in several processes of this machine, one for each GPU, started by torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import torch
import yaml

from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.files import atomic_write, read_json
from fuselip_core.training.checkpoint import StopSignal


def processes_to_start(settings: Settings) -> int:
    """How many `train.processes` asks for, a GPU each if it is auto; 1 in a process that torchrun has started."""
    wanted = settings.train.processes
    if "WORLD_SIZE" in os.environ:
        return 1
    return max(1, torch.cuda.device_count()) if wanted == "auto" else wanted


def train_in_processes(settings: Settings, count: int) -> dict[str, float]:
    """The whole training in `count` processes; returns its metrics.

    SIGTERM is handed on, so that they save and end. Raises Interrupted then, and FuselipError where one of them failed.
    """
    path = settings.artifacts / "work" / "train.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(yaml.safe_dump(settings.model_dump(mode="json", by_alias=True)), encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [*launcher, "-m", "fuselip_core", "train", "--settings", str(path)]
    environment = {**os.environ, "FUSELIP_SUMMARY": "off"}
    with StopSignal() as stop, subprocess.Popen(command, env=environment) as process:
        handed_on = False
        while (code := process.poll()) is None:
            if stop.received and not handed_on:
                process.terminate()
                handed_on = True
            time.sleep(0.1)
    if stop.received:
        raise Interrupted("stopped; the same command resumes the training from its last checkpoint")
    if code:
        raise FuselipError(
            f"one of {count} training processes failed (torchrun's exit code {code}); its own message is above. "
            "train.processes=1 trains in this one"
        )
    path.unlink()
    metrics: dict[str, float] = read_json(settings.artifacts / "model" / "training.json", "train again")
    return metrics
