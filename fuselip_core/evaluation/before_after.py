"""Compares a fine-tuned model with the checkpoint it started from.

On the run's own split (target) and, if configured, on general data (retention), since a model may gain on a small data
set but forget everything else. Registration can gate on both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.tokens.store import read_manifest
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.tasks import OpenSplit, open_split
from fuselip_core.files import read_json
from fuselip_core.model.fetch import STARTED_FROM
from fuselip_core.model.hub import Model, load_pretrained

# Metrics that are compared.
COMPARED = ("recall_at_1", "recall_at_5", "recall_at_10", "answers/fused/accuracy")


@dataclass(frozen=True)
class Adaptation:
    """Opened splits: the run's own for the starting checkpoint, and the retention data for both models."""

    target_before: OpenSplit
    retention: tuple[OpenSplit, OpenSplit] | None


def open_adaptation(
    model: Model, folder: Path, artifacts: Path, split: str, settings: EvaluateSettings, device: torch.device
) -> Adaptation | None:
    """Opens what `model`, saved in `folder`, is compared with; None for a model trained from scratch.

    Raises FuselipError if the starting checkpoint or the retention run is missing or has no held-out split.
    """
    if not (folder / STARTED_FROM).is_file():
        return None
    retention, kept_on = settings.retention, ""
    if retention is not None:
        kept_on = _retention_split(retention, split)
    before, _ = load_pretrained(read_json(folder / STARTED_FROM, "run the train stage again")["init"], device)
    pair = None
    if retention is not None:
        pair = open_split(before, retention, kept_on, device), open_split(model, retention, kept_on, device)
    return Adaptation(open_split(before, artifacts, split, device), pair)


def measure_adaptation(
    opened: Adaptation | None, after: Mapping[str, float], settings: EvaluateSettings
) -> dict[str, float]:
    """``adaptation/{target,retention}/<metric>/{before,after,gain,kept}``; empty for a model trained from scratch.

    `after` are the metrics of the adapted model on the run's own split.
    """
    if opened is None:
        return {}
    found = compare("target", opened.target_before.measure(settings).metrics, after)
    if opened.retention is not None:
        found |= compare("retention", *(each.measure(settings).metrics for each in opened.retention))
    return found


def _retention_split(artifacts: Path, wanted: str) -> str:
    """The split of a retention run to evaluate: `wanted`, or else another held-out one."""
    splits = read_manifest(artifacts / "tokens")["splits"]
    found = next((split for split in (wanted, "test", "valid", "dev") if split in splits), None)
    if found is None:
        raise FuselipError(f"evaluate.retention {artifacts} has no held-out split; prepare it with prepare.dev_share")
    return found


def compare(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """``adaptation/<name>/<metric>/{before,after,gain,kept}`` for the metrics in COMPARED that both have.

    `kept` is after / before; a gate on it, such as at_least 0.9, rejects a model that has forgotten too much.
    """
    found: dict[str, float] = {}
    for metric, value in after.items():
        if (
            metric in before
            and metric.endswith(COMPARED)
            and not metric.startswith(("retrieval_shuffled", "retrieval_in_pools", "candidates"))
            and "/gain/" not in metric
        ):
            place = f"adaptation/{name}/{metric}"
            found |= {
                f"{place}/before": before[metric],
                f"{place}/after": value,
                f"{place}/gain": value - before[metric],
            }
            if before[metric] > 0:
                found[f"{place}/kept"] = value / before[metric]
    return found
