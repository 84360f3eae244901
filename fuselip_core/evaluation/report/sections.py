"""Values for each section of the report, from the numbers of metrics.json and the outputs of the stages."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.comparisons import percent
from fuselip_core.evaluation.published import published
from fuselip_core.evaluation.report.charts import DIRECTIONS, PARTS, QUERIES, draw_training
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.evaluation.retrieval import KS, POOLS
from fuselip_core.html import data_uri

COUNTS = {"questions": "", "closed": "_closed", "open": "_open"}
CONCEPT_WAYS = {
    "probe": "Linear probe",
    "neighbours": "Nearest neighbours",
    "most_frequent": "Most frequent concepts",
    "zero_shot": "Zero-shot, by name",
    "zero_shot_other_image": "Zero-shot, another image",
}
MOST_CONCEPTS = 30

Metrics = Mapping[str, float]
Values = dict[str, Any]


def retrieval(numbers: Metrics) -> Values | None:
    """Recall in both directions with chance and shuffled pairs, and in smaller pools; None if it was not measured."""
    if "retrieval/pool" not in numbers:
        return None
    rows: list[tuple[Any, ...]] = []
    for direction, title in DIRECTIONS.items():
        chances = [percent(numbers[f"retrieval/{direction}/chance_at_{k}"]) for k in KS]
        for label, name in ((title, f"retrieval/{direction}"), ("shuffled pairs", f"retrieval_shuffled/{direction}")):
            ranks = f"{numbers[f'{name}/median_rank']:g}", f"{numbers[f'{name}/mean_reciprocal_rank']:.3f}"
            rows.append((label, *(share(numbers, f"{name}/recall_at_{k}") for k in KS), *ranks))
        rows.insert(-1, ("chance", *chances, "", ""))
    sizes = [size for size in POOLS if f"retrieval_in_pools_of_{size}/image_to_text/recall_at_1" in numbers]
    places = [(f"{size:,}", f"retrieval_in_pools_of_{size}") for size in sizes] + [("all", "retrieval")]
    pools = [
        (f"{title}, recall at {k}", *(share(numbers, f"{place}/{direction}/recall_at_{k}") for _, place in places))
        for direction, title in DIRECTIONS.items()
        for k in KS
    ]
    bars = [
        (
            title,
            [
                bar(numbers, f"Recall at {k}", f"{place}/recall_at_{k}", f"{place}/chance_at_{k}")
                for place in (f"retrieval/{direction}",)
                for k in KS
            ],
        )
        for direction, title in DIRECTIONS.items()
    ]
    return {
        "pool": f"{numbers['retrieval/pool']:,.0f}",
        "pool_images": f"{numbers['retrieval/pool_images']:,.0f}",
        "bars": bars,
        "rows": rows,
        "pool_head": ["", *(f"Pool of {size}" if size != "all" else "Whole pool" for size, _ in places)],
        "pools": pools if sizes else [],
    }


def answers(numbers: Metrics) -> Values | None:
    """Accuracy with every control; None if the split has no questions."""
    if "answers/pool" not in numbers:
        return None
    parts = [part for part in PARTS if f"answers/fused/{part}" in numbers]
    queries = {query: label for query, label in QUERIES.items() if f"answers/{query}/accuracy" in numbers}
    rows: list[tuple[Any, ...]] = [
        (
            label,
            *(share(numbers, f"answers/{query}/{part}") for part in parts),
            points(numbers, f"answers/gain/{query}/accuracy"),
            f"{numbers[rank]:.3f}" if (rank := f"answers/{query}/mean_reciprocal_rank") in numbers else "",
        )
        for query, label in queries.items()
    ]
    rows.append(("chance", *[percent(numbers["answers/chance"])] * len(parts), "", ""))
    counts = {name: f"{numbers[f'answers/questions{part}']:,.0f}" for name, part in COUNTS.items()}
    return counts | {
        "pool": f"{numbers['answers/pool']:,.0f}",
        "ratio": f"{numbers['answers/fused/over_best_control']:.2f}",
        "bars": [
            bar(numbers, label, f"answers/{query}/accuracy", "answers/chance") for query, label in queries.items()
        ],
        "head": ["Query", *(PARTS[part] for part in parts), "Ahead by, points", "MRR"],
        "rows": rows,
    }


def concepts(result: EvaluationResult) -> Values | None:
    """F1, average precision and AUC of each method, and AUC by concept; None if there are no concepts."""
    numbers = result.numbers()
    rows = [
        (
            label,
            *(
                _score(numbers, name, form)
                for measure in ("f1", "average_precision")
                for name, form in ((f"concepts/{way}/{measure}", ".3f"), (f"concepts/gain/{way}/{measure}", "+.3f"))
            ),
            _area(numbers.get(f"concepts/{way}/auc")),
        )
        for way, label in CONCEPT_WAYS.items()
        if any(name.startswith(f"concepts/{way}/") for name in numbers)
    ]
    if not rows:
        return None
    ways = [way for way in CONCEPT_WAYS if f"concepts/{way}/auc" in numbers]
    shown = [concept for concept in result.concepts if concept.auc][:MOST_CONCEPTS]
    return {
        "images": f"{numbers['concepts/images']:,.0f}",
        "candidates": f"{numbers['concepts/candidates']:,.0f}",
        "training_images": f"{numbers.get('concepts/training_images', 0):,.0f}",
        "rows": rows,
        "anchors": [f"{each['value']:.3f} ({each['model']})" for each in published("concepts/probe/f1")],
        "head": ["Concept", "Images", "In training", *(f"AUC, {CONCEPT_WAYS[way].lower()}" for way in ways)],
        "each": [
            (
                concept.name,
                f"{concept.images:,}",
                "" if concept.training_images is None else f"{concept.training_images:,}",
                *(_area(concept.auc.get(way)) for way in ways),
            )
            for concept in shown
        ],
        "others": sum(1 for concept in result.concepts if concept.auc) - len(shown),
        "constant": sum(1 for concept in result.concepts if not concept.auc),
    }


def _score(numbers: Metrics, name: str, form: str) -> Values:
    """A score in 0..1 as a decimal with its interval; empty if it was not measured."""
    if name not in numbers:
        return {"value": ""}
    low, high = numbers[f"{name}/low"], numbers[f"{name}/high"]
    return {"value": f"{numbers[name]:{form}}", "interval": f"[{low:{form}} to {high:{form}}]"}


def _area(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def tables(numbers: Metrics) -> list[Values]:
    """Sections with only a table: transformations, evaluation sets, and before and after an adaptation."""
    found = [_transformations(numbers), _candidates(numbers), _adaptation(numbers)]
    return [each for each in found if each["rows"]]


def _transformations(numbers: Metrics) -> Values:
    families = [name.split("/")[1] for name in numbers if re.fullmatch(r"transformations/.*/accuracy", name)]
    rows = [
        (
            family,
            *(share(numbers, f"transformations/{family}/{part}") for part in ("accuracy", "image_only", "text_only")),
            percent(numbers[f"transformations/{family}/chance"]),
        )
        for family in families
    ]
    return {
        "id": "transformations",
        "title": "Transformations",
        "text": "The query is an image with an instruction, and the options are variants of that image. The controls "
        "use either alone.",
        "head": ["Family", "Accuracy", "Image only", "Instruction only", "Chance"],
        "rows": rows,
    }


def _candidates(numbers: Metrics) -> Values:
    tasks = [name.split("/", 1)[1].rsplit("/", 1)[0] for name in numbers if re.match(r"candidates/.*/questions$", name)]
    rows = [
        (
            task,
            *(share(numbers, f"candidates/{task}/{part}") for part in ("accuracy", "image_only", "text_only")),
            percent(numbers[f"candidates/{task}/chance"]),
            f"{numbers[f'candidates/{task}/questions']:,.0f}",
        )
        for task in sorted(tasks)
    ]
    for name in sorted(name for name in numbers if re.match(r"candidates/.*/mean_accuracy$", name)):
        chance = percent(numbers[name.replace("mean_accuracy", "mean_chance")])
        rows.append((f"{name.split('/')[1]}, mean of its tasks", percent(numbers[name]), "", "", chance, ""))
    return {
        "id": "candidates",
        "title": "Evaluation sets",
        "text": "Each question has a list of options, one of which is right and must score above all others. For "
        "questions with an image and a text, the controls use either alone.",
        "head": ["Task", "Accuracy", "Image only", "Text only", "Chance", "Questions"],
        "rows": rows,
    }


def _adaptation(numbers: Metrics) -> Values:
    names = sorted(name.removesuffix("/gain") for name in numbers if re.match(r"adaptation/.*/gain$", name))
    rows = []
    for name in names:
        before, after = numbers[f"{name}/before"], numbers[f"{name}/after"]
        _, data, measure = name.split("/", 2)
        rows.append(
            (data, measure.replace("/", " "), percent(before), percent(after), f"{100 * (after - before):+.1f}")
        )
    return {
        "id": "adaptation",
        "title": "Before and after",
        "text": "The starting checkpoint and the trained model, on this run's split (target) and, if configured, on "
        "general data (retention).",
        "head": ["Data", "Measure", "Before", "After", "Gain, points"],
        "rows": rows,
    }


def training(folder: Path, artifacts: Path, numbers: Metrics) -> Values:
    """Training curves from history.jsonl, if any, and the cost of training."""
    history = read_history(artifacts / "history.jsonl")
    if history:
        draw_training(folder / "training.png", history)
    seconds = numbers.get("train/seconds")
    rows = [
        ("Parameters", _number(numbers, "model/parameters")),
        ("Steps", f"{max((line['step'] for line in history), default=0):,}"),
        ("Training time", "unknown" if seconds is None else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"),
        ("Pairs per second", _number(numbers, "train/pairs_per_second")),
    ]
    return {"rows": rows, "source": data_uri((folder / "training.png").read_bytes(), "png") if history else ""}


def tokenizer(folder: Path, artifacts: Path, numbers: Metrics, reads_codes: bool) -> Values:
    """Reconstructions, if any, and the tokenizer's quality by modality."""
    made = artifacts / "codebook" / "reconstructions.png"
    if made.is_file():
        shutil.copyfile(made, folder / made.name)
    role = "The encoder sees images only as codes of this tokenizer, and cannot recover details that these lose."
    if not reads_codes:
        role = "This run's encoder reads pixels; the tokenizer belongs to the joint encoders it is compared with."
    head, rows = reconstruction(numbers)
    return {
        "role": role,
        "source": data_uri(made.read_bytes(), "png") if made.is_file() else "",
        "head": head,
        "rows": rows,
    }


def reconstruction(numbers: Metrics) -> tuple[list[str], list[tuple[str, ...]]]:
    """Head and rows of a table: the tokenizer's quality by modality, now and before its adaptation."""
    place = "codebook/psnr/"
    modalities = sorted(name.removeprefix(place) for name in numbers if name.startswith(place))
    when = ["codebook/before"] * ("codebook/before/psnr" in numbers) + ["codebook"]
    rows: list[tuple[str, ...]] = []
    if "codebook/psnr" in numbers:
        for title, part in (("PSNR, all", ""), *((f"PSNR, {name}", f"/{name}") for name in modalities)):
            rows.append((title, *(_formatted(numbers, f"{each}/psnr{part}", "{:.1f} dB") for each in when)))
    for title, name, form in (
        ("Mean squared error, pixels in 0..1", "reconstruction_mse", "{:.4f}"),
        ("Codes in use", "use", "{:.1%}"),
        ("Perplexity of the codes", "perplexity", "{:,.0f}"),
    ):
        if f"codebook/{name}" in numbers:
            rows.append((title, *(_formatted(numbers, f"{each}/{name}", form) for each in when)))
    return ["", *["Before adaptation"] * (len(when) - 1), "Value"], rows


def data(manifest: Mapping[str, Any], credits: list[tuple[str, str]]) -> Values:
    """Counts of the prepared data, reasons for setting rows aside, notes, and attributions of pictures."""
    counts = manifest["counts"]
    kinds = sorted({kind for part in counts.values() for kind in part.get("pairs", {})})
    aside = [(_words(reason), f"{count:,}") for reason, count in manifest.get("quarantine", {}).items()]
    copies = [(_words(where), f"{count:,}") for where, count in manifest.get("duplicates", {}).items()]
    rows = [
        (
            split,
            *(f"{part.get(name, 0):,}" for name in ("images", "cases")),
            *(f"{part.get('pairs', {}).get(kind, 0):,}" for kind in kinds),
        )
        for split, part in counts.items()
    ]
    return {
        "version": f"Source {manifest.get('source')}, data version {str(manifest.get('data_version'))[:12]}.",
        "head": ["Split", "Images", "Cases", *(kind_name(kind).capitalize() for kind in kinds)],
        "rows": rows,
        "lists": [("Set aside", aside or [("nothing", "0")]), *[("Equal images", copies)] * bool(copies)],
        "notes": [str(note) for note in manifest.get("notes", [])],
        "credits": credits,
    }


def bar(numbers: Metrics, label: str, name: str, chance: str) -> Values:
    """A share as a bar (in percent of the full width) with its interval and a mark for chance."""
    low, high = numbers[f"{name}/low"], numbers[f"{name}/high"]
    shown = share(numbers, name)
    return {
        "label": label,
        "value": shown["value"],
        "interval": shown["interval"],
        "main": "/fused/" in name or name.startswith("retrieval/"),
        "width": f"{100 * numbers[name]:.2f}",
        "low": f"{100 * low:.2f}",
        "spread": f"{100 * (high - low):.2f}",
        "chance": f"{100 * numbers[chance]:.2f}",
    }


def share(numbers: Metrics, name: str) -> Values:
    """A metric in percent with its interval; empty if it was not measured."""
    if name not in numbers:
        return {"value": ""}
    low, high = numbers[f"{name}/low"], numbers[f"{name}/high"]
    return {"value": percent(numbers[name]), "interval": f"[{100 * low:.1f} to {100 * high:.1f} %]"}


def points(numbers: Metrics, name: str) -> Values:
    """A difference of two shares in percentage points, with its interval."""
    if name not in numbers:
        return {"value": ""}
    low, high = numbers[f"{name}/low"], numbers[f"{name}/high"]
    return {"value": f"{100 * numbers[name]:+.1f}", "interval": f"[{100 * low:+.1f} to {100 * high:+.1f}]"}


def read_history(path: Path) -> list[dict[str, float]]:
    """The lines of history.jsonl; empty if there is no file. Raises FuselipError for a line that is not JSON."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except ValueError as error:  # includes invalid UTF-8
        raise FuselipError(f"{path} has a line that is not JSON ({error}); train again to rewrite it") from error


def kind_name(kind: str) -> str:
    """The name for pairs of a kind on the page."""
    return {"caption": "captions", "vqa": "questions"}.get(kind, f"{_words(kind)} pairs")


def _formatted(numbers: Metrics, name: str, form: str) -> str:
    return form.format(numbers[name]).replace("%", " %") if name in numbers else ""


def _number(numbers: Metrics, name: str) -> str:
    return f"{numbers[name]:,.0f}" if name in numbers else "unknown"


def _words(name: str) -> str:
    return name.replace("_", " ")
