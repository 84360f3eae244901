"""Several models on the same data as one table: for the terminal, as JSON, and as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fuselip_core.evaluation.comparisons import findings, percent
from fuselip_core.evaluation.published import best_published, published
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.html import render

TEMPLATE = Path(__file__).with_name("comparison.html.j2")
# Metric, its name in the table, and chance or control.
MEASURES = (
    ("retrieval/image_to_text/recall_at_1", "Image → caption, recall at 1", "retrieval/image_to_text/chance_at_1"),
    ("retrieval/image_to_text/recall_at_10", "Image → caption, recall at 10", "retrieval/image_to_text/chance_at_10"),
    ("retrieval/text_to_image/recall_at_1", "Caption → image, recall at 1", "retrieval/text_to_image/chance_at_1"),
    ("retrieval/text_to_image/recall_at_10", "Caption → image, recall at 10", "retrieval/text_to_image/chance_at_10"),
    ("answers/fused/accuracy", "Image + question → answer", "answers/majority_by_question/accuracy"),
    ("answers/shuffled_image/accuracy", "The same, another image", "answers/chance"),
    ("classes/zero_shot/accuracy", "Caption of the class", "classes/most_frequent/accuracy"),
    ("concepts/probe/f1", "Concepts, F1 of a linear probe", "concepts/most_frequent/f1"),
    ("concepts/neighbours/f1", "Concepts, F1 of nearest neighbours", "concepts/most_frequent/f1"),
    ("concepts/zero_shot/average_precision", "Concepts by name, average precision", ""),
    ("transformations/mean_accuracy", "Transformations", "transformations/mean_chance"),
)


def write_comparison(
    artifacts: Path, results: Mapping[str, EvaluationResult], beside_published: bool = False
) -> dict[str, Any]:
    """Writes comparison/ (index.html, results.json) below `artifacts`; returns the table's head, rows and page.

    `beside_published` adds a column of published results.
    """
    numbers = {name: result.numbers() for name, result in results.items()}
    split = next(iter(results.values())).split
    head = ["", *numbers, "chance or control", *["published"] * beside_published]
    rows = result_rows(numbers, beside_published)
    if beside_published:
        others = dict.fromkeys(each["metric"] for each in published())
        for metric in others.keys() - {metric for metric, *_ in _measures(numbers)}:
            rows.append([f"{_task(metric)}, not measured here", *[""] * len(numbers), "", _said(metric)])
    with atomic_folder(artifacts / "comparison") as folder:
        write_json(folder / "results.json", {"split": split, "models": numbers, "published": published()})
        page = render(
            TEMPLATE,
            split=split,
            made=f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC",
            head=head,
            rows=rows,
            findings={name: findings(found) for name, found in numbers.items()},
            beside_published=beside_published,
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
    return {"head": head, "rows": rows, "page": artifacts / "comparison" / "index.html"}


def result_rows(numbers: Mapping[str, Mapping[str, float]], beside_published: bool = False) -> list[list[str]]:
    """Metrics of several models or runs, by name → rows of the measure, a cell for each, and chance or control."""
    return [_row(metric, words, control, numbers, beside_published) for metric, words, control in _measures(numbers)]


def as_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table as text; models with long names are numbered, with a legend above."""
    short = [*(f"[{place}]" if place > 0 and len(name) > 20 else name for place, name in enumerate(head))]
    names = [f"{label} {name}" for label, name in zip(short, head, strict=True) if label != name]
    table = [short, *rows]
    widths = [max(len(row[place]) for row in table) for place in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*names, *lines])


def _measures(numbers: Mapping[str, Mapping[str, float]]) -> list[tuple[str, str, str]]:
    """The measures that at least one model has, with evaluation sets last."""
    found = {name for each in numbers.values() for name in each}
    sets = sorted(name for name in found if name.startswith("candidates/") and name.endswith("accuracy"))
    more = [(name, _task(name), f"{name.removesuffix('accuracy')}chance") for name in sets]
    return [measure for measure in (*MEASURES, *more) if measure[0] in found]


def _task(metric: str) -> str:
    """candidates/mmeb/vqa/mean_accuracy → mmeb/vqa, mean."""
    return metric.removeprefix("candidates/").removesuffix("/accuracy").replace("/mean_accuracy", ", mean")


def _row(
    metric: str, words: str, control: str, numbers: Mapping[str, Mapping[str, float]], beside_published: bool
) -> list[str]:
    score = "concepts/" in metric  # F1 and average precision as decimals, shares in percent
    cells = []
    for found in numbers.values():
        if metric not in found:
            cells.append("")
        elif f"{metric}/low" not in found:
            cells.append(_value(found[metric], score))
        else:
            half = (found[f"{metric}/high"] - found[f"{metric}/low"]) / 2
            cells.append(
                f"{found[metric]:.3f} ± {half:.3f}" if score else f"{100 * found[metric]:.1f} ± {100 * half:.1f} %"
            )
    # Chance differs between models if one of them cuts more texts to the same tokens.
    controls = [_value(found[control], score) if control in found else "" for found in numbers.values()]
    cells.append(controls[0] if len(set(controls)) == 1 else " / ".join(controls))
    return [words, *cells, *[_said(metric)] * beside_published]


def _value(value: float, score: bool) -> str:
    return f"{value:.3f}" if score else percent(value)


def _said(metric: str) -> str:
    """The best published result of each family."""
    score = metric.startswith("concepts/")
    return "; ".join(f"{_value(each['value'], score)} ({each['model']})" for each in best_published(metric))
