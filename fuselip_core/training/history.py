"""The curves of a training as JSON lines beside its checkpoints; when it ends, they become artifacts/history.jsonl."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fuselip_core.training.checkpoint import Checkpoints

# What differs between a run that was cut off and one that was not.
OF_A_SESSION = ("system/", "checkpoint")


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

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line without what is of a session alone."""
        metrics = {name: value for name, value in metrics.items() if not name.startswith(OF_A_SESSION)}
        if not metrics:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **metrics}) + "\n")

    def publish(self, target: Path) -> None:
        """Moves the finished curves to `target`."""
        self._path.replace(target)


def _step_of(line: str) -> float:
    """The step of a line of the history; infinite for half a line, as a full disk leaves it."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return math.inf
