"""Published numbers as data (published.json), by the metric of metrics.json that they are to stand beside.

Each entry names its source. Add a number only with the table that it is printed in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuselip_core.files import read_json

TABLE = Path(__file__).with_name("published.json")


def published(metric: str | None = None) -> list[dict[str, Any]]:
    """Entries (metric, model, value, source) of one metric or of all; accuracies and F1 in 0..1."""
    entries: list[dict[str, Any]] = read_json(TABLE, "install the package again")["numbers"]
    return [entry for entry in entries if metric in (None, entry["metric"])]
