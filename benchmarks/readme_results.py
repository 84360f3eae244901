"""Writes the results table of README.md from the metrics of finished runs, so that no number is typed by hand.

Usage, after `make demo` and the runs on real images:  .venv/bin/python benchmarks/readme_results.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RUNS = {
    "sample (phantoms), test": REPOSITORY / "artifacts",
    "MedPix 2.0 in ROCOv2's layout, valid": REPOSITORY / "runs" / "rocov2" / "artifacts",
    "VQA-RAD, published test": REPOSITORY / "runs" / "vqa-rad" / "artifacts",
}
Metrics = dict[str, float]


def percent(metrics: Metrics, name: str) -> str:
    return f"{100 * metrics[name]:.1f} %" if name in metrics else "-"


def retrieval_rows(name: str, metrics: Metrics) -> list[str]:
    if "retrieval/pool" not in metrics:
        return []
    rows = []
    for direction, label in (("image_to_text", "image → caption"), ("text_to_image", "caption → image")):
        chance = metrics[f"retrieval/{direction}/chance_at_1"]
        shuffled = f"retrieval_shuffled/{direction}"
        cells = [
            f"{name}: {label}",
            f"{percent(metrics, f'retrieval/{direction}/recall_at_1')} at 1, "
            f"{percent(metrics, f'retrieval/{direction}/recall_at_10')} at 10, "
            f"median rank {metrics[f'retrieval/{direction}/median_rank']:.0f}",
            f"chance {100 * chance:.2f} % at 1, {100 * metrics[f'retrieval/{direction}/chance_at_10']:.1f} % at 10; "
            f"shuffled {percent(metrics, f'{shuffled}/recall_at_1')} at 1, "
            f"{percent(metrics, f'{shuffled}/recall_at_10')} at 10, "
            f"median rank {metrics[f'{shuffled}/median_rank']:.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def answer_rows(name: str, metrics: Metrics) -> list[str]:
    if "answers/pool" not in metrics:
        return []
    rows = []
    for kind in ("", "_closed", "_open"):
        label = {"": "all questions", "_closed": "closed", "_open": "open"}[kind]
        controls = ", ".join(
            f"{control.replace('_', ' ')} {percent(metrics, f'answers/{control}/accuracy{kind}')}"
            for control in ("question_only", "image_only", "blank_image", "shuffled_image", "majority")
        )
        fused = percent(metrics, f"answers/fused/accuracy{kind}")
        rows.append(f"| {name}: image + question → answer, {label} | {fused} | {controls} |")
    return rows


def gain_row(name: str, metrics: Metrics, intervals: Mapping[str, Sequence[float]]) -> list[str]:
    """By how much the fused query is ahead of the same question about another image, on the same questions."""
    gain = "answers/gain/shuffled_image"
    if f"{gain}/accuracy" not in metrics:
        return []
    points = [100 * value for value in (metrics[f"{gain}/accuracy"], *intervals[f"{gain}/accuracy"])]
    rank = f"{gain}/mean_reciprocal_rank"
    low, high = intervals[rank]
    return [
        f"| {name}: ahead of the shuffled image | {points[0]:+.1f} points, 95 % interval {points[1]:+.1f} to "
        f"{points[2]:+.1f} | mean 1 / rank {metrics['answers/fused/mean_reciprocal_rank']:.3f} against "
        f"{metrics['answers/shuffled_image/mean_reciprocal_rank']:.3f}, {metrics[rank]:+.3f}, "
        f"95 % interval {low:+.3f} to {high:+.3f} |"
    ]


def main() -> None:
    lines = ["| data and task | result | beside it |", "| --- | --- | --- |"]
    for name, artifacts in RUNS.items():
        path = artifacts / "metrics.json"
        if not path.is_file():
            print(f"left out: {name}, since {path} is missing")
            continue
        metrics = json.loads(path.read_text(encoding="utf-8"))
        results = json.loads((artifacts / "report" / "results.json").read_text(encoding="utf-8"))
        lines += retrieval_rows(name, metrics) + answer_rows(name, metrics)
        lines += gain_row(name, metrics, results["intervals"])
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = "<!-- results -->\n" + "\n".join(lines) + "\n<!-- /results -->"
    readme.write_text(re.sub(r"<!-- results -->.*?<!-- /results -->", block, text, flags=re.S), encoding="utf-8")


if __name__ == "__main__":
    main()
