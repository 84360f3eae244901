"""Early fusion beside both late-fusion baselines, and what single choices add: same pairs, same time, three seeds.

    python benchmarks/compare_families.py list                       # names of the runs that are still to do
    python benchmarks/compare_families.py prepare                    # prepare, codebook, tokenize: once a data set
    python benchmarks/compare_families.py run [NAME ...]             # some runs, or all that are still to do
    python benchmarks/compare_families.py table                      # mean and spread, into README.md

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["FUSELIP_TRACKERS"] = ""  # the disk alone: dozens of short runs are no experiment to look up

from measure import SHARED

from fuselip_core import stages
from fuselip_core.config import Settings, check_settings, corrected_recipe, merge

REPOSITORY = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
FAMILIES = {"fuselip": "early fusion", "siglip-sf": "SigLIP-SF", "siglip-mlf": "SigLIP-MLF"}
TIMED, PASSED_OVER = 14, 4  # steps that are timed, of which the first do not count
ADAPTATION_SHARE = 0.6  # of the seconds of a run

# What is the same for all: the recipe `sample`, smaller batches, whole groups in a batch, edits among the pairs.
COMMON: dict[str, Any] = {
    "prepare": {"extra_pairs": ["edits"]},
    "tokenize": {"views": 2},
    "train": {"batch_size": 64, "grouped": True, "preflight": False, "validate_every": 100000},
    "evaluate": {"examples": 0, "transformations": ["crop", "rotate", "light"]},
}
DATA: dict[str, dict[str, Any]] = {
    "sample": {
        "prepare": {"source": "phantom", "limit": 2000},
        "train": {"mixture": {"caption": 0.4, "vqa": 0.4, "edit": 0.2}},
        "evaluate": {"split": "test"},
    },
    "medpix": {
        "prepare": {
            "source": "rocov2",
            "root": SHARED / "medpix-rocov2",
            "extra_pairs": ["sentences", "concepts", "questions", "edits"],
            "dev_share": 0.05,
        },
        "train": {"mixture": {"caption": 0.3, "sentence": 0.1, "concepts": 0.2, "vqa": 0.2, "edit": 0.2}},
        "evaluate": {"split": "valid"},
    },
    "vqa-rad": {
        "prepare": {"source": "vqa-rad", "root": SHARED / "vqa-rad", "dev_share": 0.1},
        "train": {"mixture": {"vqa": 0.8, "edit": 0.2}},
        "evaluate": {"split": "test"},
    },
}
# MedPix once more, in the codes of the sample's image tokenizer, which an adaptation of the sample's model reads.
DATA["adapted"] = DATA["medpix"]
GUARDED: dict[str, Any] = {
    "learning_rate": 0.0005,
    "layer_decay": 0.8,
    "ema": 0.98,
    "interpolate": 0.8,
    "alike_pairs": "ignored",
    "mixture": {**DATA["medpix"]["train"]["mixture"], "sample:caption": 0.15, "sample:vqa": 0.15},
}
UNGUARDED: dict[str, Any] = {
    "learning_rate": 0.002,
    "layer_decay": 1.0,
    "ema": 0.0,
    "interpolate": 1.0,
    "alike_pairs": "negatives",
    "mixture": DATA["medpix"]["train"]["mixture"],
}
# Name → title, and what is different from the run beside it.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "unmasked": ("without masked modelling", {"mask_weight": 0.0}),
    "ungrouped": ("variants of an image apart: no grouped negatives", {"grouped": False}),
}
ADAPTATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "guarded": ("all guards", {}),
    "unguarded": ("none of them", UNGUARDED),
    "fast": ("peak learning rate 0.002 instead of 0.0005", {"learning_rate": 0.002}),
    "unreplayed": ("no pairs of the sample replayed", {"mixture": DATA["medpix"]["train"]["mixture"]}),
    "final-weights": ("no interpolation with the weights before", {"interpolate": 1.0}),
    "unaveraged": ("no averaged weights", {"ema": 0.0}),
    "flat": ("one learning rate for all layers", {"layer_decay": 1.0}),
    "all-negative": ("pairs of the same concepts are negatives", {"alike_pairs": "negatives"}),
}


@dataclass(frozen=True)
class Run:
    """One training and its measures."""

    data: str
    label: str
    seed: int
    family: str = "fuselip"
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.label}-{self.seed}"


def all_runs() -> list[Run]:
    """In the order of their use: should the time run out, what is missing is missing last."""
    runs = [
        Run(data, family, seed, family)
        for data in ("sample", "medpix", "vqa-rad")
        for seed in SEEDS
        for family in FAMILIES
    ]
    for label, (_, changed) in ABLATIONS.items():
        runs += [Run("sample", label, seed, train=changed) for seed in SEEDS]
    for label, (_, changed) in ADAPTATIONS.items():
        runs += [Run("adapted", label, seed, train=GUARDED | changed) for seed in SEEDS]
    return runs


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
        if data == "adapted":
            self._take(self.folder / "data" / "medpix" / "prepared", artifacts / "prepared")
            self._take(self.folder / "data" / "sample" / "codebook", artifacts / "codebook")
        for stage, output in (("prepare", "prepared"), ("codebook", "codebook"), ("tokenize", "tokens")):
            if not (artifacts / output).exists():
                started = time.monotonic()
                getattr(stages, stage)(settings)
                print(f"{data}: {stage} took {time.monotonic() - started:.0f} s", flush=True)
        if data != "adapted":
            self._steps(data, FAMILIES)

    def run(self, run: Run) -> None:
        """Trains and measures; writes the run's JSON last."""
        shared, artifacts = self.folder / "data" / run.data, self.folder / "runs" / run.name
        shutil.rmtree(artifacts, ignore_errors=True)
        for name in ("prepared", "codebook", "tokens", "work/pixels"):
            if (shared / name).exists():
                self._take(shared / name, artifacts / name)
        settings = self._settings(run.data, artifacts, run)
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
        for name in ("report", "tracking", "history.jsonl"):
            shutil.rmtree(artifacts / name, ignore_errors=True)

    def _settings(self, data: str, artifacts: Path, run: Run | None = None) -> Settings:
        values = merge(merge({"recipe": "sample"}, COMMON), DATA[data])
        if DATA[data]["prepare"]["source"] == "phantom":
            values = merge(values, {"prepare": {"root": self.sample}})
        if run is not None:
            values = merge(values, {"train": {**run.train, "seed": run.seed}})
            if "mixture" in run.train:
                values["train"]["mixture"] = run.train["mixture"]
            if run.family != "fuselip":
                off = {"mask_weight": 0.0, "mask_probability": 0.0, "codes_from_codebook": False}
                values = merge(values, {"model": {"family": run.family, "mask_token": False}, "train": off})
            values = merge(values, {"train": {"steps": self._steps(data, [run.family])[run.family]}})
            if data == "adapted":
                values = merge(values, self._adaptation(run))
        settings = corrected_recipe(values)
        if run is not None and "mixture" in run.train:
            settings["train"]["mixture"] = run.train["mixture"]
        elif "mixture" in DATA[data]["train"]:
            settings["train"]["mixture"] = DATA[data]["train"]["mixture"]
        return check_settings({**settings, "artifacts": artifacts}, origin=f"comparison, {data}")

    def _adaptation(self, run: Run) -> dict[str, Any]:
        """Where an adaptation starts and what it must keep: the early-fusion model of the sample with its seed."""
        sample = self.folder / "data" / "sample"
        init = self.folder / "runs" / f"sample-fuselip-{run.seed}" / "model"
        steps = self._steps("sample", ["fuselip"])["fuselip"]
        replayed = {"tokens": {"sample": sample / "tokens"}} if "sample:caption" in run.train["mixture"] else {}
        return {
            "train": {"init": str(init), "steps": round(ADAPTATION_SHARE * steps), **replayed},
            "evaluate": {"retention": sample},
        }

    def _steps(self, data: str, families: Iterable[str]) -> dict[str, int]:
        """Steps that fit into the time of a run, timed once for each data set and family."""
        data = "sample" if data == "adapted" else data
        path = self.folder / "data" / data / "seconds.json"
        known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for family in families:
            if family not in known:
                known[family] = self._time_a_step(data, family)
                print(f"{data}: a step of {family} takes {known[family]:.3f} s", flush=True)
                path.write_text(json.dumps(known), encoding="utf-8")
        return {family: max(20, round(self.seconds / known[family])) for family in families}

    def _time_a_step(self, data: str, family: str) -> float:
        """Processor seconds of a training step, the median of a few. Leaves the baselines' pictures in work/pixels."""
        import torch

        from fuselip_core.model.titok import TiTok
        from fuselip_core.training.build import build_model, open_measuring, open_training
        from fuselip_core.training.checkpoint import Checkpoints
        from fuselip_core.training.distributed import World
        from fuselip_core.training.loop import Trainer

        artifacts = self.folder / "data" / data
        run = Run(data, family, 0, family)
        changed: dict[str, Any] = {"model": {"family": family}}
        if family != "fuselip":
            changed["train"] = {"mask_weight": 0.0, "mask_probability": 0.0}
            changed["model"]["mask_token"] = False
        base = self._settings(data, artifacts).model_dump(by_alias=True)
        settings = check_settings(merge(base, changed), origin=run.name)
        model = build_model(settings.model, settings.train, TiTok.load(artifacts / "codebook"))
        device = torch.device("cpu")
        store, encoder = open_training(model, artifacts, settings.train, device, World())
        open_measuring(model, artifacts, settings.evaluate.split, device)
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


# ---- table -----------------------------------------------------------------------------------------------------------

TITLES = {"sample": "sample, test", "medpix": "MedPix 2.0, valid", "vqa-rad": "VQA-RAD, test"}
MEASURES = {
    "image → caption, at 1 / 10": ("retrieval/image_to_text/recall_at_1", "retrieval/image_to_text/recall_at_10"),
    "caption → image, at 1 / 10": ("retrieval/text_to_image/recall_at_1", "retrieval/text_to_image/recall_at_10"),
    "image + question → answer": ("answers/fused/accuracy",),
    "image + instruction → image": ("transformations/mean_accuracy",),
}
CHANCES = {
    "retrieval/image_to_text/recall_at_1": "retrieval/image_to_text/chance_at_1",
    "retrieval/image_to_text/recall_at_10": "retrieval/image_to_text/chance_at_10",
    "retrieval/text_to_image/recall_at_1": "retrieval/text_to_image/chance_at_1",
    "retrieval/text_to_image/recall_at_10": "retrieval/text_to_image/chance_at_10",
    "answers/fused/accuracy": "answers/majority/accuracy",
    "transformations/mean_accuracy": "transformations/mean_chance",
}
ADAPTED = (
    "adaptation/{0}/retrieval/image_to_text/recall_at_10/{1}",
    "adaptation/{0}/retrieval/text_to_image/recall_at_10/{1}",
)

Results = list[dict[str, Any]]  # of one label, a seed each


def spread_of(results: Results, names: Iterable[str], scale: float = 100.0) -> str:
    """Mean and standard deviation over the seeds of the first name, and the second behind a slash; "-" without."""
    parts = []
    for name in names:
        values = [scale * each["metrics"][name] for each in results if name in each["metrics"]]
        if values:
            deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            parts.append(f"{statistics.mean(values):.1f}{deviation}")
    return " / ".join(parts) or "-"


def row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def comparison_table(results: dict[tuple[str, str], Results]) -> list[str]:
    """Families and ablations, a row each, beside chance (for answers: the most frequent one of each kind)."""
    lines = [row("data", "model", *MEASURES, "steps"), row(*["---"] * (len(MEASURES) + 3))]
    named = [(data, label, title) for data in TITLES for label, title in FAMILIES.items()]
    named += [("sample", label, f"early fusion {title}") for label, (title, _) in ABLATIONS.items()]
    named.sort(key=lambda entry: list(TITLES).index(entry[0]))
    for data, label, title in named:
        if found := results.get((data, label)):
            steps = f"{found[0]['train']['steps']:,}" + (f" ({len(found)} seeds)" if len(found) != len(SEEDS) else "")
            lines.append(row(TITLES[data], title, *(spread_of(found, names) for names in MEASURES.values()), steps))
        if label == "siglip-mlf" and (found := results.get((data, "fuselip"))):
            chances = ([CHANCES[name] for name in names] for names in MEASURES.values())
            lines.append(
                row(
                    TITLES[data],
                    "chance, most frequent answer",
                    *(spread_of(found[:1], names) for names in chances),
                    "",
                )
            )
    return lines


def adaptation_table(results: dict[tuple[str, str], Results]) -> list[str]:
    """What each guard contributes on the target (MedPix) and on what is to be kept (the sample), recall at 10."""
    heads = (
        "adapted to MedPix",
        "MedPix: image → caption",
        "caption → image",
        "sample: image → caption",
        "caption → image",
        "answers on the sample",
    )
    lines = [row(*heads), row(*["---"] * len(heads))]
    places = [name.format(part, "{0}") for part in ("target", "retention") for name in ADAPTED]
    places.append("adaptation/retention/answers/fused/accuracy/{0}")
    if found := results.get(("adapted", "guarded")):
        lines.append(
            row("before (the sample's model)", *(spread_of(found, [name.format("before")]) for name in places))
        )
    for label, (title, _) in ADAPTATIONS.items():
        if found := results.get(("adapted", label)):
            title = f"{title} ({len(found)} seeds)" if len(found) != len(SEEDS) else title
            lines.append(row(title, *(spread_of(found, [name.format("after")]) for name in places)))
    return lines


def write_tables(comparison: Comparison) -> None:
    """Writes both tables between their marks in README.md, or prints them where it has none."""
    results: dict[tuple[str, str], Results] = {}
    for run in all_runs():
        if comparison.result(run).is_file():
            results.setdefault((run.data, run.label), []).append(json.loads(comparison.result(run).read_text("utf-8")))
    text = "\n".join([*comparison_table(results), "", *adaptation_table(results)])
    print(text)
    readme = REPOSITORY / "README.md"
    page = readme.read_text(encoding="utf-8")
    block = f"<!-- families -->\n{text}\n<!-- /families -->"
    marked = re.compile(r"<!-- families -->.*?<!-- /families -->", re.DOTALL)
    if marked.search(page):
        readme.write_text(marked.sub(lambda _: block, page), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("list", "prepare", "run", "table"))
    parser.add_argument("names", nargs="*", help="data sets (prepare) or runs (run); all if empty")
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
    if options.verb == "table":
        write_tables(comparison)
    if options.verb == "run":
        wanted = [run for run in comparison.missing() if not options.names or run.name in options.names]
        for run in wanted:
            comparison.run(run)
            print(f"{run.name}: done", flush=True)


if __name__ == "__main__":
    main()
