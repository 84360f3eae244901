"""Progress of a stage as a Prefect artifact, read from the lines that `fuselip_core.progress.track` writes."""

from __future__ import annotations

import logging
import re
import time
from uuid import UUID

from flows.run.child import OnLine

LINE = re.compile(r"^(?P<what>[^:]+): (?P<done>\d+) of (?P<total>\d+)\b")
SHOW_EVERY_SECONDS = 5.0

logger = logging.getLogger("fuselip")


class ProgressArtifact:
    """Passes lines on and shows how far the stage is on the page of its flow run."""

    def __init__(self, stage: str, on_line: OnLine) -> None:
        self._stage = stage
        self._on_line = on_line
        self._artifact: UUID | None = None
        self._shown = float("-inf")

    def __call__(self, line: str) -> None:
        self._on_line(line)
        found = LINE.match(line)
        if found and int(found["total"]) and time.monotonic() - self._shown >= SHOW_EVERY_SECONDS:
            self._shown = time.monotonic()
            self._show(100 * int(found["done"]) / int(found["total"]), found["what"])

    def close(self) -> None:
        """Fills the bar of a stage that ended well, if it has one."""
        if self._artifact:
            self._show(100.0, self._stage)

    def _show(self, percent: float, what: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        percent = min(percent, 100.0)
        # Called while the stage is read from: an unreachable server must not end it.
        try:
            if self._artifact is None:
                made = create_progress_artifact(percent, key=f"progress-{self._stage}", description=what)
                self._artifact = made if isinstance(made, UUID) else None
            else:
                update_progress_artifact(self._artifact, progress=percent, description=what)
        except Exception:
            logger.debug("the progress of %s is not shown", self._stage, exc_info=True)
