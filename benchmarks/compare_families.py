"""Early fusion beside both late-fusion baselines, and what single choices add: same pairs, same time, three seeds.

    python benchmarks/compare_families.py list                       # names of the runs that are still to do
    python benchmarks/compare_families.py prepare                    # prepare, codebook, tokenize: once a data set
    python benchmarks/compare_families.py try DATA FAMILY field=value ...    # one training, measured on held-out pairs
    python benchmarks/compare_families.py run [NAME ...]             # some runs, or all that are still to do
    python benchmarks/compare_families.py table                      # mean and spread, into docs/results.md

Every run trains a model of size tiny through the project's own stages on the pairs, codes and pictures that all runs of
its data set share, for as many steps as fit into `--seconds` of one core: a step of each family is timed once a data
set, in processor time, and seconds.json remembers it for all seeds. A finished run is one small JSON below
`--folder`; runs that have one are skipped, so a run that was cut off goes on with the rest. An adaptation starts from
the early-fusion model that the run of the sample with its seed left, and needs it.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import json
import os
import re
import shutil
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ["FUSELIP_TRACKERS"] = ""  # the disk alone: dozens of short runs are no experiment to look up

import yaml
from families_runs import (
    ABLATIONS,
    ADAPTATIONS,
    COMMON,
    DATA,
    FAMILIES,
    FROM_SCRATCH,
    TRIED_ON,
    Run,
    all_runs,
    family_run,
)
from families_table import JUDGED, TITLES, Results, adaptation_table, brain_table, codes_table, comparison_table

from fuselip_core import stages
from fuselip_core.config import Settings, check_settings, corrected_recipe, merge

REPOSITORY = Path(__file__).parents[1]
TIMED, PASSED_OVER = 24, 4  # steps that are timed, of which the first do not count
ADAPTATION_SHARE = 0.6  # of the seconds of a run


class Comparison:
    """The folder of a comparison: data/<name> with what runs share, runs/<name>, results/<name>.json."""

    def __init__(self, folder: Path, sample: Path, seconds: float) -> None:
        self.folder, self.sample, self.seconds = folder, sample, seconds

    def result(self, run: Run) -> Path:
        return self.folder / "results" / f"{run.name}.json"

    def missing(self) -> list[Run]:
        return [run for run in all_runs() if not self.result(run).is_file()]

    def prepare(self, data: str) -> None:
        """Data, codes, and the pictures that baselines read, for all runs of a data set; what is there stays."""
        artifacts = self.folder / "data" / data
        settings = self._settings(data, artifacts)
        if data in ("adapted", "retuned"):
            self._take(self.folder / "data" / "medpix" / "prepared", artifacts / "prepared")
        if data == "adapted":
            self._take(self.folder / "data" / "sample" / "codebook", artifacts / "codebook")
        for stage, output in (("prepare", "prepared"), ("codebook", "codebook"), ("tokenize", "tokens")):
            if not (artifacts / output).exists():
                started = time.monotonic()
                getattr(stages, stage)(settings)
                print(f"{data}: {stage} took {time.monotonic() - started:.0f} s", flush=True)
        if data in TITLES:
            self._steps(data, FAMILIES)

    def try_out(self, data: str, family: str, changed: dict[str, Any]) -> dict[str, Any]:
        """Trains once with other settings and measures on validation pairs; the numbers, also in trials/<name>.json."""
        told = " ".join(f"{name}={value}" for name, value in changed.items())
        run = family_run(data, family, seed=0, **changed)
        artifacts = self.folder / "runs" / f"try-{data}-{family}-{os.getpid()}"
        self._share(data, artifacts)
        seconds = self._time_a_step(run)
        values = self._settings(data, artifacts, run, steps=round(self.seconds / seconds)).model_dump(by_alias=True)
        settings = check_settings(
            merge(values, {"evaluate": {"split": TRIED_ON[data], "transformations": []}}), origin="a trial"
        )
        stages.train(settings)
        metrics = stages.evaluate(settings)
        found = {name: metrics[name] for name in JUDGED if name in metrics}
        content = {"family": family, "changed": told, "steps": settings.train.steps, "metrics": found}
        path = self.folder / "trials" / f"{data} {family} {told}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        shutil.rmtree(artifacts, ignore_errors=True)
        return content

    def run(self, run: Run) -> None:
        """Trains and measures; writes the run's JSON last."""
        artifacts = self.folder / "runs" / run.name
        self._share(run.data, artifacts)
        # What is compared with another run makes as many steps as that.
        timed = run.data if run.data in TITLES else "medpix" if run.label == FROM_SCRATCH else "sample"
        steps = self._steps(timed, [run.family])[run.family]
        settings = self._settings(run.data, artifacts, run, steps)
        trained, processor = time.monotonic(), time.process_time()
        stages.train(settings)
        trained, processor = time.monotonic() - trained, time.process_time() - processor
        metrics = stages.evaluate(settings)
        content = {
            "run": run.name,
            "train": settings.train.model_dump(mode="json"),
            "clock_seconds": trained,
            "processor_seconds": processor,
            "metrics": metrics,
        }
        self.result(run).parent.mkdir(parents=True, exist_ok=True)
        self.result(run).write_text(json.dumps(content, indent=1, sort_keys=True, default=str), encoding="utf-8")
        for name in ("checkpoints", "tracking"):  # the model stays for adaptations, the report to look at
            shutil.rmtree(artifacts / name, ignore_errors=True)

    def _share(self, data: str, artifacts: Path) -> None:
        """A new folder of a run with links to what all runs of its data set share."""
        shutil.rmtree(artifacts, ignore_errors=True)
        for name in ("prepared", "codebook", "tokens", "work/pixels"):
            if (self.folder / "data" / data / name).exists():
                self._take(self.folder / "data" / data / name, artifacts / name)

    def _settings(self, data: str, artifacts: Path, run: Run | None = None, steps: int = 1) -> Settings:
        """The recipe `sample` corrected for a data set and, where one is given, for a run of so many steps."""
        values = merge(merge({"recipe": "sample"}, COMMON), DATA[data])
        mixture = DATA[data]["train"]["mixture"]
        if DATA[data]["prepare"]["source"] == "phantom":
            values = merge(values, {"prepare": {"root": self.sample}})
        if run is not None:
            mixture = run.train.get("mixture", mixture)
            values = merge(values, {"model": run.model, "train": {**run.train, "steps": steps, "seed": run.seed}})
            if run.label not in FAMILIES | ABLATIONS:
                values = merge(values, {"evaluate": {"transformations": []}})  # their tables show none
            if run.label in ADAPTATIONS:
                values = merge(values, self._adaptation(run, steps))
        if data == "retuned":
            values = merge(values, {"codebook": {"init": str(self.folder / "data" / "sample" / "codebook")}})
        settings = corrected_recipe(values)
        settings["train"]["mixture"] = mixture  # as a whole: kinds of the recipe that are not in it stay out
        return check_settings({**settings, "artifacts": artifacts}, origin=f"comparison, {data}")

    def _adaptation(self, run: Run, steps: int) -> dict[str, Any]:
        """Where an adaptation starts and what it must keep: the early-fusion model of the sample with its seed."""
        sample = self.folder / "data" / "sample"
        init = self.folder / "runs" / f"sample-fuselip-{run.seed}" / "model"
        replayed = {"tokens": {"sample": sample / "tokens"}} if "sample:caption" in run.train["mixture"] else {}
        return {
            "train": {"init": str(init), "steps": round(ADAPTATION_SHARE * steps), **replayed},
            "evaluate": {"retention": sample},
        }

    def _steps(self, data: str, families: Iterable[str]) -> dict[str, int]:
        """Steps that fit into the time of a run, timed once for each data set and family."""
        path = self.folder / "data" / data / "seconds.json"
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for family in families:
            if family not in known:
                known[family] = self._time_a_step(family_run(data, family, seed=0))
                print(f"{data}: a step of {family} takes {known[family]:.3f} s", flush=True)
                path.write_text(json.dumps(known), encoding="utf-8")
        return {family: max(20, round(self.seconds / known[family])) for family in families}

    def _time_a_step(self, run: Run) -> float:
        """Processor seconds of a training step, the median of a few. Leaves the baselines' pictures in work/pixels."""
        import torch

        from fuselip_core.distributed import World
        from fuselip_core.encoding.open import open_measuring, open_training
        from fuselip_core.model.titok import TiTok
        from fuselip_core.training.build import build_model
        from fuselip_core.training.checkpoint import Checkpoints
        from fuselip_core.training.loop import Trainer

        artifacts = self.folder / "data" / run.data
        settings = self._settings(run.data, artifacts, run, steps=TIMED)
        model = build_model(settings.model, settings.train, TiTok.load(artifacts / "codebook"))
        device = torch.device("cpu")
        store, encoder = open_training(model, artifacts, settings.train, device, World())
        for split in (settings.evaluate.split, TRIED_ON[run.data]):  # now, not by two runs at the same time
            open_measuring(model, artifacts, split, device)
        trainer = Trainer(encoder, store, settings.train, Checkpoints(artifacts / "unused"), lambda *_: None)
        took = []
        for step in range(TIMED):
            started = time.process_time()
            trainer._train_step(step)
            took.append(time.process_time() - started)
        return statistics.median(took[PASSED_OVER:])

    @staticmethod
    def _take(source: Path, target: Path) -> None:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(source.resolve(), target_is_directory=True)


def write_tables(comparison: Comparison) -> None:
    """Writes the tables between their marks in docs/results.md."""
    results: dict[tuple[str, str], Results] = {}
    for run in all_runs():
        if comparison.result(run).is_file():
            results.setdefault((run.data, run.label), []).append(json.loads(comparison.result(run).read_text("utf-8")))
    page = REPOSITORY / "docs" / "results.md"
    tables = {"brain": brain_table(results)}
    if any(data != "brain-mri" for data, _ in results):
        tables["families"] = [*comparison_table(results), *adaptation_table(results), *codes_table(results)]
    for mark, lines in tables.items():
        print(*lines, sep="\n")
        block = "\n".join([f"<!-- {mark} -->", *lines, f"<!-- /{mark} -->"])
        marked = re.compile(f"<!-- {mark} -->.*?<!-- /{mark} -->", re.DOTALL)
        page.write_text(marked.sub(lambda _, block=block: block, page.read_text(encoding="utf-8")), encoding="utf-8")


def field_and_value(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    return name, yaml.safe_load(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("list", "prepare", "try", "run", "table"))
    parser.add_argument("names", nargs="*", help="data sets (prepare) or runs (run), all if empty; see above (try)")
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "runs" / "families")
    parser.add_argument(
        "--sample", type=Path, default=REPOSITORY / "data", help="the sample, as `fuselip sample` draws it"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="training of a run, in seconds of one core")
    options = parser.parse_args()
    comparison = Comparison(options.folder.resolve(), options.sample.resolve(), options.seconds)
    if options.verb == "list":
        print(*(run.name for run in comparison.missing()), sep="\n")
    for data in options.names or DATA if options.verb == "prepare" else ():
        comparison.prepare(data)
    if options.verb == "try":
        data, family, *words = options.names
        print(json.dumps(comparison.try_out(data, family, dict(map(field_and_value, words)))), flush=True)
    if options.verb == "table":
        write_tables(comparison)
    if options.verb == "run":
        wanted = [run for run in comparison.missing() if not options.names or run.name in options.names]
        for run in wanted:
            comparison.run(run)
            print(f"{run.name}: done", flush=True)


if __name__ == "__main__":
    main()
