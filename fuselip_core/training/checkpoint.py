"""Checkpoints that are whole or absent, and the state that makes a resumed run equal to an uninterrupted one."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
import random
import re
import shutil
import signal
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_folder, sha256_of
from fuselip_core.model.weights import refuse_non_finite

logger = logging.getLogger("fuselip")
STATE_FILE, DIGEST_FILE = "state.pt", "state.sha256"


def folder_of_run(parent: Path, identity: Mapping[str, Any]) -> Path:
    """Folder of a run's checkpoints: named by what must be equal for the run to go on, so that others start anew."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    folder = parent / digest[:12]
    if not folder.exists() and any(parent.glob("*/step-*")):
        logger.warning("%s holds a run with other settings or data; this one begins anew beside it", parent)
    return folder


class Checkpoints:
    """A folder of ``step-00000100/`` folders, the newest `keep` of which stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Writes `state` (tensors, numbers, strings, lists and dicts of them) as the checkpoint of `step`.

        Raises CheckpointError where a tensor is not finite: nobody could go on from it.
        """
        refuse_non_finite(_tensors(state), f"the state of step {step}", "lower the learning rate")
        path = self.folder / f"step-{step:08d}"
        for left in self.folder.glob(".step-*"):  # of a process killed while it saved: nobody else writes here
            shutil.rmtree(left, ignore_errors=True)
        with atomic_folder(path) as partial:
            torch.save(state, partial / STATE_FILE)
            (partial / DIGEST_FILE).write_text(sha256_of(partial / STATE_FILE))
        found = self._found()
        # What is ahead of the step just saved was passed over as damaged; counted, it would push out whole ones.
        kept = [other for number, other in found if number <= step][-self.keep :]
        for _, other in found:
            if other not in kept:
                shutil.rmtree(other, ignore_errors=True)
        return path

    def latest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest undamaged checkpoint; damaged ones are passed over with a warning."""
        for step, path in reversed(self._found()):
            try:
                if sha256_of(path / STATE_FILE) != (path / DIGEST_FILE).read_text().strip():
                    raise FuselipError("its digest does not match")
                state = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
                refuse_non_finite(_tensors(state), path, "it is passed over")
                return step, state
            except pickle.UnpicklingError:  # whose text advises to run whatever the file holds
                logger.warning("checkpoint %s holds more than tensors, which is never run; trying the one before", path)
            except (OSError, RuntimeError, EOFError, ValueError) as error:
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
        return None

    def _found(self) -> list[tuple[int, Path]]:
        found = []
        for path in self.folder.glob("step-*"):
            if match := re.fullmatch(r"step-(\d+)", path.name):
                found.append((int(match.group(1)), path))
        return sorted(found)


def _tensors(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of nested dicts and lists by their place, such as model.ln_final.weight."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    found: dict[str, torch.Tensor] = {}
    for key, value in items:
        if isinstance(value, torch.Tensor | dict | list | tuple):
            found |= _tensors(value, f"{name}.{key}" if name else str(key))
    return found


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators, loadable without pickle."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - libraries still draw from it
    state: dict[str, Any] = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        # A run may go on where there are fewer GPUs; each of them takes its own state.
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def seed_everything(seed: int) -> None:
    """Seeds Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


class StopSignal:
    """Notes SIGTERM, so that the loop can end between two steps instead of inside one."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


class History:
    """The curves of a run as JSON lines; a resumed run drops what it logged after its checkpoint."""

    def __init__(self, path: Path, checkpoints: Checkpoints) -> None:
        self._path = path
        found = checkpoints.latest()
        self.resumed_step = found[0] if found else 0
        path.parent.mkdir(parents=True, exist_ok=True)
        goes_on = self.resumed_step > 0 and path.is_file()
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if goes_on else []
        kept = [line for line in lines if _step_of(line) <= self.resumed_step]
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line, without system metrics: they differ between a run that was cut off and one that was not."""
        kept = {name: value for name, value in metrics.items() if not name.startswith("system/")}
        if not kept:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **kept}) + "\n")

    def publish(self, target: Path) -> None:
        """Moves the finished curves to `target`."""
        self._path.replace(target)


def _step_of(line: str) -> float:
    """The step of a line of the history; infinite for half a line, as a full disk leaves it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
