"""A run's events as JSON lines on disk, and their delivery to tracking services (see run.py)."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import find_json, write_json

Status = Literal["FINISHED", "FAILED", "KILLED"]
Event = dict[str, Any]

SEND_EVERY_SECONDS = 10.0
SEND_EVERY_EVENTS = 200
RETRY_AFTER_SECONDS = 60.0

logger = logging.getLogger("fuselip")


class Service(Protocol):
    """A tracking service that receives the events."""

    name: str

    def send(self, run: dict[str, Any], events: list[Event]) -> None:
        """Delivers `events` in order; may add ids to `run`, which is saved. May raise anything."""


class EventLog:
    """Appends to a run's events.jsonl and delivers the events to services.

    Files in `folder`: events.jsonl, and run.json with the run's name, tags, ids and the bytes delivered per service.
    """

    def __init__(self, folder: Path, run: Mapping[str, Any], services: list[Service]) -> None:
        self.folder = folder
        self.run: dict[str, Any] = {"sent": {}, **run, "folder": str(folder.resolve())}
        self._services = services
        self._unsent = 0
        self._last_sent = time.monotonic()
        self._paused_until = dict.fromkeys((service.name for service in services), 0.0)
        folder.mkdir(parents=True, exist_ok=True)
        _end_last_line(folder / "events.jsonl")
        self._stream = (folder / "events.jsonl").open("a", encoding="utf-8")
        self._keep_run()

    def params(self, values: Mapping[str, Any]) -> None:
        """Settings of the run; nested mappings become dotted names."""
        self._append({"type": "params", "values": dict(flat(values))})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Metrics at a step; prefer few calls with many values."""
        numbers = {name: float(value) for name, value in values.items()}
        self._append({"type": "metrics", "values": numbers, "step": step, "time": int(time.time() * 1000)})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file or folder to upload to the run, below `folder` there."""
        self._append({"type": "artifact", "path": os.path.relpath(path, self.folder), "folder": folder})

    def results(self, values: Mapping[str, float]) -> None:
        """The final metrics of a run, shown as a table."""
        self._append({"type": "results", "values": {name: float(value) for name, value in values.items()}})

    def data(self, name: str, digest: str, source: str, counts: Mapping[str, Any]) -> None:
        """A data set that the run reads; `counts`: images and pairs by split."""
        self._append({"type": "data", "name": name, "digest": digest, "source": source, "counts": dict(counts)})

    def end(self, status: Status = "FINISHED") -> None:
        """Ends the run and delivers all remaining events."""
        self._append({"type": "end", "status": status, "time": int(time.time() * 1000)})
        self.flush(force=True)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def flush(self, force: bool = False) -> bool:
        """Delivers pending events; True if every service has all. Skips recently failed services unless `force`."""
        self._unsent, self._last_sent = 0, time.monotonic()
        due = [service for service in self._services if force or time.monotonic() >= self._paused_until[service.name]]
        delivered = [self._deliver(service) for service in due]
        return all(delivered) and len(due) == len(self._services)

    def _append(self, event: Event) -> None:
        self._stream.write(json.dumps(event) + "\n")
        self._stream.flush()
        self._unsent += 1
        if self._unsent >= SEND_EVERY_EVENTS or time.monotonic() - self._last_sent >= SEND_EVERY_SECONDS:
            self.flush()

    def _deliver(self, service: Service) -> bool:
        events, end = read_events(self.folder / "events.jsonl", self.run["sent"].get(service.name, 0))
        if not events:
            return True
        try:
            service.send(self.run, events)
        except Exception as error:  # the run continues, whatever fails: all events are on disk
            self._note_failure(service, error)
            return False
        else:
            self.run["sent"][service.name] = end
            self._paused_until[service.name] = 0.0
            return True
        finally:
            self._keep_run()

    def _note_failure(self, service: Service, error: Exception) -> None:
        logger.debug("%s failed", service.name, exc_info=True)
        if self._paused_until[service.name] == 0.0:
            reason = one_line(error)[:400] or type(error).__name__
            what = reason if isinstance(error, FuselipError) else f"{service.name} does not answer ({reason})"
            logger.warning(
                "%s. The run continues; its events stay in %s, and `fuselip sync` sends them later", what, self.folder
            )
        self._paused_until[service.name] = time.monotonic() + RETRY_AFTER_SECONDS

    def _keep_run(self) -> None:
        write_json(self.folder / "run.json", self.run)


def _end_last_line(path: Path) -> None:
    """Ends an incomplete last line, which a killed process may have left, so that the next event starts a new one."""
    if path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with path.open("ab") as stream:
            stream.write(b"\n")


def read_run(folder: Path) -> dict[str, Any]:
    return find_json(folder / "run.json")


def read_events(path: Path, start: int) -> tuple[list[Event], int]:
    """Events from byte `start` on, and the position after the last complete line. Damaged lines are skipped.

    A full disk leaves an incomplete line, on which a resumed run must not fail.
    """
    with path.open("rb") as stream:
        stream.seek(start)
        block = stream.read()
    whole = block[: block.rfind(b"\n") + 1]
    return [event for line in whole.splitlines() if (event := _event(line))], start + len(whole)


def _event(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "type" in event else None


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values with dotted names, such as train.learning_rate."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
