"""One page to read after a run: what was measured, beside chance and controls, with examples, curves and data.

The page needs no other file and no network. Charts lie beside it as PNG as well, and every number in results.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuselip_core.config import Settings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.evaluation.report.adaptation_sections import (
    adaptation_section,
    modality_section,
    transformations_section,
)
from fuselip_core.evaluation.report.charts import DIRECTIONS, QUERIES
from fuselip_core.evaluation.report.sections import (
    Metrics,
    answer_section,
    candidates_section,
    data_section,
    has_task,
    interval_text,
    kind_name,
    percent,
    retrieval_section,
    settings_section,
    tokenizer_section,
    training_section,
)
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.html import Html, document, join, picture, tag
from fuselip_core.images import UnreadableImage, decode


def write_report(artifacts: Path, result: EvaluationResult, metrics: Metrics, settings: Settings) -> Path:
    """Writes artifacts/report/ (index.html, charts, results.json) and returns the page's path.

    `metrics` are those of `result` and of earlier stages. Reads the prepared data, history.jsonl and the tokenizer's
    reconstructions below `artifacts`, the last two where they are there.
    """
    prepared = PreparedData(artifacts / "prepared")
    rows = {example.image for example in result.retrieval} | {example.image for example in result.answers}
    pictures = _pictures(prepared, result.split, rows)
    with atomic_folder(artifacts / "report") as folder:
        write_json(folder / "results.json", {**asdict(result), "metrics": dict(sorted(metrics.items()))})
        parts = [
            *retrieval_section(folder, result, pictures),
            *answer_section(folder, result, pictures),
            *transformations_section(result),
            *candidates_section(result),
            *adaptation_section(metrics),
            *training_section(folder, artifacts, metrics),
            *tokenizer_section(folder, artifacts, metrics, settings.model.family == "fuselip"),
            *modality_section(metrics),
            data_section(prepared.manifest),
            settings_section(settings, metrics),
        ]
        page = document(_title(settings), join([_header(settings, result, prepared), _body(result, parts)]))
        (folder / "index.html").write_text(page, encoding="utf-8")
    return artifacts / "report" / "index.html"


def _title(settings: Settings) -> str:
    return f"{settings.model.family} {settings.model.size} on {settings.prepare.source}: evaluation"


def _header(settings: Settings, result: EvaluationResult, prepared: PreparedData) -> Html:
    model, counts = settings.model, prepared.manifest["counts"].get(result.split, {})
    held = [f"{counts.get('images', 0):,} images"]
    held += [f"{count:,} {kind_name(kind)}" for kind, count in counts.get("pairs", {}).items()]
    about = f"Measured on the {result.split} split: {', '.join(held)}. Recipe {settings.recipe}."
    tasks = [task for task in ("retrieval", "answers", "transformations", "candidates") if has_task(result, task)]
    adapted = ["adaptation"] * any(name.startswith("adaptation/") for name in result.metrics)
    shown = [*tasks, *adapted, "training", "tokenizer", "data", "settings"]
    titles = {"candidates": "Evaluation sets", "adaptation": "Before and after"}
    links = [tag("a", titles.get(name, name.capitalize()), href=f"#{name}") for name in shown]
    title = tag("h1", f"{_family(model.family)} {model.size} on {settings.prepare.source}")
    return tag("header", tag("div", title, tag("p", about, klass="soft"), tag("nav", *links), klass="wrap"))


def _family(family: str) -> str:
    return {"fuselip": "FuseLIP", "siglip-sf": "SigLIP-SF", "siglip-mlf": "SigLIP-MLF"}.get(family, family)


def _body(result: EvaluationResult, parts: Iterable[Html]) -> Html:
    reading = tag(
        "p",
        "Every number is measured over the complete pool. A tie counts as wrong. Brackets hold 95 % intervals from "
        "resampling whole cases. Examples are drawn at random, not chosen.",
        klass="soft",
    )
    tiles = tag("div", *_tiles(result), klass="tiles")
    return tag("main", tag("div", tiles, reading, *parts, tag("footer", "Made by fuselip evaluate."), klass="wrap"))


def _tiles(result: EvaluationResult) -> list[Html]:
    metrics, tiles = result.metrics, []
    for direction, title in DIRECTIONS.items():
        name = f"retrieval/{direction}/recall_at_1"
        if name not in metrics:
            continue
        chance = metrics[f"retrieval/{direction}/chance_at_1"]
        shuffled = metrics[f"retrieval_shuffled/{direction}/recall_at_1"]
        facts = [
            f"95 % interval {interval_text(result, name)}",
            f"Chance {percent(chance)}; this is {metrics[name] / chance:.1f} times that",
            f"Shuffled pairs {percent(shuffled)}",
        ]
        # At 1 a small pool gives a handful of hits; the ranks of all queries tell sooner whether there is anything.
        ahead = result.intervals[f"retrieval/{direction}/gain/mean_reciprocal_rank"][0] > 0
        above = result.intervals[name][0] > max(chance, shuffled)
        facts.append(
            f"Median rank {metrics[f'retrieval/{direction}/median_rank']:g}, with shuffled pairs "
            f"{metrics[f'retrieval_shuffled/{direction}/median_rank']:g}"
        )
        verdict = "ranks clearly above those of shuffled pairs" if ahead else "not clearly above its controls"
        verdict = "clearly above its controls" if above else verdict
        tiles.append(_tile(title, percent(metrics[name]), "recall at 1", facts, verdict, above or ahead))
    if "answers/fused/accuracy" in metrics:
        tiles.append(_answer_tile(result))
    return tiles


def _answer_tile(result: EvaluationResult) -> Html:
    metrics, name = result.metrics, "answers/fused/accuracy"
    controls = {
        query: metrics[f"answers/{query}/accuracy"] for query in QUERIES if f"answers/{query}/accuracy" in metrics
    }
    del controls["fused"]
    best = max(controls, key=lambda query: controls[query])
    facts = [
        f"95 % interval {interval_text(result, name)}",
        f"Question alone {percent(controls['question_only'])}, image alone {percent(controls['image_only'])}; "
        f"this is {metrics['answers/fused/over_best_control']:.1f} times the better",
        f"Strongest control: {QUERIES[best].lower()}, {percent(controls[best])}",
    ]
    # On the same questions a difference is known better than either share.
    good = all(result.intervals[f"answers/gain/{query}/accuracy"][0] > 0 for query in controls)
    verdict = "clearly above every control" if good else "not clearly above every control"
    return _tile("Image + question → answer", percent(metrics[name]), "right", facts, verdict, good)


def _tile(name: str, value: str, unit: str, facts: Iterable[str], verdict: str, good: bool) -> Html:
    return tag(
        "div",
        tag("div", name, klass="name"),
        tag("div", value, " ", tag("small", unit), klass="value"),
        tag("ul", *(tag("li", fact) for fact in facts)),
        tag("span", verdict, klass=f"verdict {'good' if good else 'warn'}"),
        klass="tile",
    )


def _pictures(prepared: PreparedData, split: str, rows: set[int]) -> dict[int, Html]:
    """Rows of a split → figures with the image in small, its name and its attribution."""
    figures: dict[int, Html] = {}
    start = 0
    columns = ["image_id", "bytes", "licence", "attribution"]
    for batch in prepared.iter_images(split, columns=columns) if rows else ():
        for row in sorted(rows & set(range(start, start + batch.num_rows))):
            image = {name: batch.column(name)[row - start].as_py() for name in columns}
            figures[row] = _figure(image)
        start += batch.num_rows
        if len(figures) == len(rows):
            break
    return figures


def _figure(image: Mapping[str, Any]) -> Html:
    name = str(image["image_id"])
    try:
        shown = picture(decode(image["bytes"]), f"Image {name}")
    except UnreadableImage as error:
        shown = tag("p", f"not shown: {error}")
    credit = ", ".join(str(image[key]) for key in ("attribution", "licence") if image[key])
    return tag("figure", shown, tag("figcaption", f"{name}. {credit}" if credit else name))
