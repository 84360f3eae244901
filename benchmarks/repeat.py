"""Reruns a row of the published results and says whether it holds: results.yaml beside this file has the rows.

    python benchmarks/repeat.py list
    python benchmarks/repeat.py brain-mri                # every seed; minutes a seed
    python benchmarks/repeat.py brain-mri --seeds 0      # one seed
    python benchmarks/repeat.py brain-mri --record       # runs it, and writes what comes out into results.yaml

A row is a recipe with settings, the seeds it was trained with, and for each metric the mean and the standard deviation
over the seeds. Data, image tokenizer and tokens are made once, in `--folder`; each seed is trained and measured in a
folder of its own, and one that has its metrics.json is not run again. A metric holds if the mean of the rerun is within
two standard deviations of the published mean; the exit code is 1 where one does not.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import json
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FUSELIP_TRACKERS", "")  # the disk alone: a repetition is no experiment to look up

import yaml
from measure import SHARED

from fuselip_core import stages
from fuselip_core.config import load_settings
from fuselip_core.files import atomic_write

REPOSITORY = Path(__file__).parents[1]
ROWS = Path(__file__).with_name("results.yaml")
MADE_ONCE = ("prepared", "codebook", "tokens")
DEVIATIONS = 2.0  # of the published seeds, that the mean of a rerun may lie away


@dataclass(frozen=True)
class Verdict:
    """A metric of a row beside its rerun; `holds` where the mean is within the spread."""

    metric: str
    mean: float
    spread: float
    rerun: float

    @property
    def holds(self) -> bool:
        return abs(self.rerun - self.mean) <= DEVIATIONS * self.spread

    def __str__(self) -> str:
        word = "holds" if self.holds else "DOES NOT HOLD"
        return f"{word}: {self.metric} {self.rerun:.4f}, published {self.mean:.4f} ± {self.spread:.4f}"


def rerun(row: Mapping[str, Any], seeds: Sequence[int], folder: Path) -> list[dict[str, float]]:
    """Trains and measures every seed that has not been; returns the metrics of each."""
    found = []
    for seed in seeds:
        artifacts = folder / f"seed-{seed}"
        if not (artifacts / "metrics.json").is_file():
            _run_seed(row, seed, folder, artifacts)
        found.append(json.loads((artifacts / "metrics.json").read_text(encoding="utf-8")))
    return found


def _run_seed(row: Mapping[str, Any], seed: int, folder: Path, artifacts: Path) -> None:
    overrides = [setting.format(shared=SHARED) for setting in row["settings"]]
    shared = load_settings(None, overrides, recipe=row["recipe"], artifacts=folder / "shared")
    for stage, output in zip(("prepare", "codebook", "tokenize"), MADE_ONCE, strict=True):
        if not (shared.artifacts / output).exists():
            getattr(stages, stage)(shared)
    shutil.rmtree(artifacts, ignore_errors=True)
    artifacts.mkdir(parents=True)
    for output in MADE_ONCE:
        (artifacts / output).symlink_to((shared.artifacts / output).resolve(), target_is_directory=True)
    settings = load_settings(None, [*overrides, f"train.seed={seed}"], recipe=row["recipe"], artifacts=artifacts)
    started = time.process_time()
    stages.train(settings)
    print(f"seed {seed}: trained in {time.process_time() - started:.0f} s of processor time", flush=True)
    stages.evaluate(settings)


def summary(metrics: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, list[float]]:
    """Mean and standard deviation over the seeds (0 of a single one) of each metric, to four digits."""
    values = {name: [each[name] for each in metrics] for name in names}
    return {
        name: [round(statistics.fmean(each), 4), round(statistics.stdev(each) if len(each) > 1 else 0.0, 4)]
        for name, each in values.items()
    }


def compare(row: Mapping[str, Any], metrics: Sequence[Mapping[str, float]]) -> list[Verdict]:
    """The published numbers of a row beside those of its rerun."""
    again = summary(metrics, list(row["metrics"]))
    return [Verdict(name, *published, again[name][0]) for name, published in row["metrics"].items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("row", help="name of a row, or list")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds to run; those of the row if left out")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "repeat" / "artifacts")
    parser.add_argument("--record", action="store_true", help="write what comes out into results.yaml")
    options = parser.parse_args()
    rows = yaml.safe_load(ROWS.read_text(encoding="utf-8"))
    if options.row not in rows:
        print(*(f"{name}: {row['about']}" for name, row in rows.items()), sep="\n")
        sys.exit(0 if options.row == "list" else f"there is no row {options.row}; name one of those above")
    row = rows[options.row]
    metrics = rerun(row, options.seeds or row["seeds"], options.folder.resolve() / options.row)
    if options.record:
        row["metrics"] = summary(metrics, list(row["metrics"]))
        with atomic_write(ROWS) as partial:
            partial.write_text(yaml.safe_dump(rows, sort_keys=False, width=120), encoding="utf-8")
    verdicts = compare(row, metrics)
    print(*verdicts, sep="\n")
    sys.exit(0 if all(verdict.holds for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
