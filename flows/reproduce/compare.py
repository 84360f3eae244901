"""Trains a registered model again from its recorded state and compares: ``fuselip reproduce models:/NAME@champion``.

The commit is checked out into a git worktree beside this repository, the run's settings and lock are laid into it, the
data comes from DVC, every stage up to evaluate runs anew, and results and metrics are compared with the recorded ones.
The registry and this checkout stay as they are. Exit codes: 0 the same, 1 not the same or not possible.
"""

from __future__ import annotations

import math
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flows.reproduce.restore import Recorded, read_recorded, restore
from flows.run.child import stream
from flows.run.runner import LastLines, stage_environment
from fuselip_core.config import load_settings
from fuselip_core.errors import FuselipError, run_to_exit
from fuselip_core.files import find_json, write_json
from fuselip_core.registry.state import results_of
from fuselip_core.tracking.store import repository_root

# What no two runs have in common.
TIMES = ("train/seconds", "train/pairs_per_second")
MOST_ROWS = 20


@dataclass(frozen=True)
class Difference:
    """A metric that came out otherwise; None where one side has none."""

    metric: str
    recorded: float | None
    repeated: float | None


def main(
    model: Annotated[str, typer.Argument(help="models:/NAME@ALIAS or models:/NAME/VERSION.")],
    into: Annotated[Path | None, typer.Option(help="Folder to make. Empty: beside this repository.")] = None,
    root: Annotated[Path | None, typer.Option(help="Folder of the raw data set. Empty: the recorded one.")] = None,
    tolerance: Annotated[float, typer.Option(help="Largest difference of a metric that counts as none.")] = 0.0,
) -> None:
    """Train a registered model again from its recorded state, and compare."""
    # Ending this process ends the stage it waits for: an exception does, the signal's default would not.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as folder:
        recorded = read_recorded(model, Path(folder))
        repository = repository_root()
        name = f"{repository.name}-{recorded.name}-v{recorded.version}"
        target = (into or repository.parent / name).resolve()
        run_folder = restore(recorded, repository, target, root)
        _warn_of_other_libraries(recorded, repository, target)
        _repeat(run_folder, target)
        _report(recorded, run_folder, target, tolerance)


def differences(recorded: Mapping[str, float], repeated: Mapping[str, float], tolerance: float) -> list[Difference]:
    """Metrics that differ by more than `tolerance`, or that only one side has; times are left out."""
    found = []
    for name in sorted(set(recorded) | set(repeated)):
        before, after = recorded.get(name), repeated.get(name)
        if name not in TIMES and not _close(before, after, tolerance):
            found.append(Difference(name, before, after))
    return found


def _close(before: float | None, after: float | None, tolerance: float) -> bool:
    if before is None or after is None:
        return False
    return abs(before - after) <= tolerance or (math.isnan(before) and math.isnan(after))


def _repeat(run_folder: Path, target: Path) -> None:
    """Every stage up to evaluate, whatever DVC has in its caches."""
    address = f"{(run_folder / 'dvc.yaml').relative_to(target)}:evaluate"
    command = [sys.executable, "-m", "dvc", "repro", "--force", address]
    environment = {**stage_environment(target), "FUSELIP_TRACKERS": ""}
    # A terminal gets the child's output as it is.
    lines = LastLines(lambda line: None if sys.stderr.isatty() else _write(line))
    if code := stream(command, target, environment, lines):
        raise FuselipError(f"repeating failed in {target}: {lines.message(code)}")


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _report(recorded: Recorded, run_folder: Path, target: Path, tolerance: float) -> None:
    """Prints and keeps what is the same and what is not."""
    artifacts = target / load_settings(run_folder / "params.yaml").artifacts
    results, metrics = results_of(artifacts), find_json(artifacts / "metrics.json")
    other = [name for name, value in recorded.state["results"].items() if results.get(name) != value]
    found = differences(recorded.metrics, metrics, tolerance)
    record = {"model": recorded.title, "results": results, "other_results": other, "metrics": metrics}
    write_json(artifacts / "reproduction.json", {**record, "differences": [vars(each) for each in found]})
    console = Console()
    for name in recorded.state["results"]:
        console.print(f"{name}: {'other bytes' if name in other else 'the same bytes'}", highlight=False)
    if not found:
        console.print(
            f"{recorded.title}: all {len(metrics)} metrics but for times are the same; {target}", soft_wrap=True
        )
        return
    console.print(_table(found))
    first = f"; the first result that differs: {other[0]}" if other else ""
    raise FuselipError(
        f"{len(found)} of {len(metrics)} metrics of {recorded.title} differ by more than {tolerance:g}{first}; "
        f"see {artifacts / 'reproduction.json'}, and --tolerance for another machine"
    )


def _table(found: list[Difference]) -> Table:
    table = Table("metric", "recorded", "repeated")
    for each in found[:MOST_ROWS]:
        values = ("none" if value is None else f"{value:.6g}" for value in (each.recorded, each.repeated))
        table.add_row(each.metric, *values)
    return table


def _warn_of_other_libraries(recorded: Recorded, repository: Path, target: Path) -> None:
    """The stages run with this environment's libraries: those of another lock may give other numbers."""
    locks = [path / "requirements.lock" for path in (repository, target)]
    if len({lock.read_bytes() for lock in locks if lock.is_file()}) > 1:
        stated = ", ".join(f"{name} {version}" for name, version in recorded.state["libraries"].items())
        sys.stderr.write(f"warning: requirements.lock was another one then ({stated}); results may differ\n")


if __name__ == "__main__":
    run_to_exit(lambda: typer.run(main))
