"""What an adaptation changed: the checkpoint it started from and its outcome, side by side.

On the run's own split (the target), and on general data where such are named (retention): a fine-tuned model that gains
on a small set and forgets the rest looks good in the first table alone. Registration can gate on either.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import read_manifest
from fuselip_core.encoding.open import open_measuring
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.tasks import evaluate
from fuselip_core.model.hub import STARTED_FROM, Model, load_pretrained

# Metrics that a before and an after are compared by.
COMPARED = ("recall_at_1", "recall_at_5", "recall_at_10", "answers/fused/accuracy")

HELD_OUT = ("test", "valid", "dev")


def measure_adaptation(
    model: Model, artifacts: Path, settings: EvaluateSettings, after: Mapping[str, float], device: torch.device
) -> dict[str, float]:
    """``adaptation/{target,retention}/<metric>/{before,after,gain,kept}``; empty for a model trained from scratch.

    `after` are the metrics of `model` on the run's own split. Raises FuselipError where the retention run lacks data.
    """
    init = started_from(artifacts / "model")
    if init is None:
        return {}
    before, _ = load_pretrained(init, device)
    found = compare("target", _measure(before, artifacts, settings.split, settings, device), after)
    if settings.retention is not None:
        split = _held_out(settings.retention, settings.split)
        kept = [_measure(each, settings.retention, split, settings, device) for each in (before, model)]
        found |= compare("retention", *kept)
    return found


def started_from(folder: Path) -> str | None:
    """The checkpoint that the model in `folder` went on from; None for one from scratch."""
    path = folder / STARTED_FROM
    return str(json.loads(path.read_text(encoding="utf-8"))["init"]) if path.is_file() else None


def _measure(
    model: Model, artifacts: Path, split: str, settings: EvaluateSettings, device: torch.device
) -> dict[str, float]:
    store, encoder = open_measuring(model, artifacts, split, device)
    return evaluate(encoder, store, PreparedData(artifacts / "prepared"), settings).metrics


def _held_out(artifacts: Path, wanted: str) -> str:
    """The split of a retention run to measure: the one that is measured here, or else another held-out one."""
    splits = read_manifest(artifacts / "tokens")["splits"]
    found = next((split for split in (wanted, *HELD_OUT) if split in splits), None)
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
            and not metric.startswith(("retrieval_shuffled", "candidates"))
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
