"""What an adaptation changed: the checkpoint it started from and its outcome, side by side.

On the run's own split (the target), and on general data where such are named (retention): a fine-tuned model that gains
on a small set and forgets the rest looks good in the first table alone. Registration can gate on either.
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
from fuselip_core.model.hub import STARTED_FROM, Model, load_pretrained

# Metrics that a before and an after are compared by.
COMPARED = ("recall_at_1", "recall_at_5", "recall_at_10", "answers/fused/accuracy")


@dataclass(frozen=True)
class Adaptation:
    """The splits to compare: the run's own before the adaptation, and the retention data before and after."""

    target_before: OpenSplit
    retention: tuple[OpenSplit, OpenSplit] | None


def open_adaptation(
    model: Model, folder: Path, artifacts: Path, split: str, settings: EvaluateSettings, device: torch.device
) -> Adaptation | None:
    """What is measured beside `model`, which was saved in `folder`; None for a model that was trained from scratch.

    Raises FuselipError where the starting checkpoint or the retention run is missing or has no held-out split.
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
    """The split of a retention run to measure: the one that is measured here, or else another held-out one."""
    splits = read_manifest(artifacts / "tokens")["splits"]
    found = next((split for split in (wanted, "test", "valid", "dev") if split in splits), None)
    if found is None:
        raise FuselipError(f"evaluate.retention {artifacts} has no held-out split; prepare it with prepare.dev_share")
    return found


def compare(name: str, before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """``adaptation/<name>/<metric>/{before,after,gain,kept}``, of the metrics in COMPARED that both have.

    `kept` is after over before; a gate on it (at_least 0.9, say) stops a model that has forgotten.
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
