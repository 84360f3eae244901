"""Published results (published.json), by the metric of metrics.json that they correspond to.

Each entry names its source: paper and table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuselip_core.files import read_json

TABLE = Path(__file__).with_name("published.json")


def published(metric: str | None = None) -> list[dict[str, Any]]:
    """Entries (metric, model, family, value, source) of one metric or of all; accuracies and F1 in 0..1."""
    tables = read_json(TABLE)["tables"]
    return [
        {
            "metric": name,
            "model": row["model"],
            "family": row["family"],
            "value": value / 100,
            "source": table["source"],
        }
        for table in tables
        for row in table["models"]
        for name, value in zip(table["metrics"], row["percent"], strict=True)
        if metric in (None, name)
    ]


def best_published(metric: str) -> list[dict[str, Any]]:
    """The best published value of each model family for a metric, best first."""
    best: dict[str, dict[str, Any]] = {}
    for entry in published(metric):
        if entry["family"] not in best or entry["value"] > best[entry["family"]]["value"]:
            best[entry["family"]] = entry
    return sorted(best.values(), key=lambda entry: -entry["value"])
