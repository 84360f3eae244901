"""Ends a trial whose validation curve is behind those of the others."""

from __future__ import annotations

from pathlib import Path

from optuna import Trial

from flows.run.child import OnLine
from flows.run.folder import Run
from flows.run.runner import Outcome, Runner
from fuselip_core.tracking.events import read_events

# What is validated while a model trains, by the start of the metric that trials are compared by.
DEFAULT_CURVE = "retrieval/image_to_text/recall_at_1"
CURVES = {"answers": "answers/accuracy", "retrieval/text_to_image": "retrieval/text_to_image/recall_at_1"}


class Behind(Exception):
    """The study's pruner has given up on the trial."""


class PruningRunner:
    """Runs stages as another runner does, and looks at the validation curve whenever a training says something."""

    def __init__(self, trial: Trial, metric: str) -> None:
        self.trial = trial
        self.metric = f"valid/{next((name for part, name in CURVES.items() if metric.startswith(part)), DEFAULT_CURVE)}"
        self.pruned: str | None = None
        self._read = 0

    def around(self, runner: Runner) -> PruningRunner:
        """This runner, with stages run by `runner`."""
        self.runner = runner
        return self

    def run(self, stage: str, run: Run, on_line: OnLine, force: bool = False) -> Outcome:
        """The stage's outcome; a training that is behind ends as failed, and `pruned` says at which step."""
        if stage != "train":
            return self.runner.run(stage, run, on_line, force)
        events = run.artifacts / "tracking" / "train" / "events.jsonl"

        def watch(line: str) -> None:
            on_line(line)
            if self.pruned is None:
                self._look(events)

        try:
            return self.runner.run(stage, run, watch, force)
        except Behind as behind:
            self.pruned = str(behind)
            return Outcome(stage, "failed", 0.0, self.pruned)

    def _look(self, events: Path) -> None:
        if not events.is_file():
            return
        new, self._read = read_events(events, min(self._read, events.stat().st_size))
        for event in new:
            if event["type"] == "metrics" and self.metric in event["values"]:
                self.trial.report(event["values"][self.metric], event["step"])
                if self.trial.should_prune():
                    self.pruned = f"pruned at step {event['step']}: {self.metric} is behind the median of other trials"
                    raise Behind(self.pruned)
