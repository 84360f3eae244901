"""Compares a model's inputs with its training data. Array code; legend: N, M rows, W width."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuselip_core.config import MonitorSettings
from fuselip_core.monitoring.observations import SIDES, Observations

FEWEST = 20  # rows that a comparison needs on each side
SIGNIFICANCE = 0.01
FAMILIAR_QUANTILE = 0.05


@dataclass(frozen=True)
class Finding:
    """One comparison. low, high: 95 % interval, if there is one. alarm: `value` is above `at_most`, with evidence."""

    name: str
    title: str
    value: float
    at_most: float
    alarm: bool
    note: str
    low: float | None = None
    high: float | None = None


def compare(reference: Observations, seen: Observations, limits: MonitorSettings) -> list[Finding]:
    """All comparisons for which both sides have enough rows."""
    found: list[Finding | None] = [
        *(_domain(side, reference.vectors(side), seen.vectors(side), limits) for side in SIDES),
        *(_unfamiliar(side, reference.vectors(side), seen.vectors(side), limits) for side in SIDES),
        _modalities(reference.modalities(), seen.modalities(), limits.modality_distance),
        _numbers("words", "Words of a text", reference, seen, limits.length_distance),
        _numbers("brightness", "Brightness of a picture", reference, seen, limits.brightness_distance),
        _unreadable(seen, limits.unreadable_share),
    ]
    return [each for each in found if each is not None]


def _domain(
    side: str, reference: NDArray[np.float32], seen: NDArray[np.float32], limits: MonitorSettings
) -> Finding | None:
    if min(len(reference), len(seen)) < FEWEST:
        return None
    auc, low, high = domain_auc(reference[: limits.rows], seen[: limits.rows])
    note = f"AUC of a classifier that separates {len(seen)} seen from {len(reference)} training rows; 0.5 is chance."
    title = f"Domain classifier, {_named(side)}"
    return Finding(f"domain_auc/{side}", title, auc, limits.domain_auc, low > limits.domain_auc, note, low, high)


def domain_auc(reference: NDArray[np.float32], seen: NDArray[np.float32]) -> tuple[float, float, float]:
    """AUC of a logistic regression that separates two sets of vectors (N, W), (M, W), and its 95 % interval.

    Cross-validated in 5 folds. The interval is DeLong's (DeLong, DeLong and Clarke-Pearson 1988), clipped to [0, 1].
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    vectors = np.concatenate([reference, seen]).astype(np.float64)
    is_seen = np.repeat([0, 1], [len(reference), len(seen)])
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500, class_weight="balanced"))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    scores = cross_val_predict(model, vectors, is_seen, cv=folds, method="decision_function")
    return auc_with_interval(scores[is_seen == 1], scores[is_seen == 0])


def auc_with_interval(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> tuple[float, float, float]:
    """AUC of scores (M), (N), ties counted as half, with DeLong's 95 % interval."""
    wins = (positive[:, None] > negative).astype(np.float64) + 0.5 * (positive[:, None] == negative)
    auc = float(wins.mean())
    spread = math.sqrt(wins.mean(1).var(ddof=1) / len(positive) + wins.mean(0).var(ddof=1) / len(negative))
    return auc, max(0.0, auc - 1.96 * spread), min(1.0, auc + 1.96 * spread)


def _unfamiliar(
    side: str, reference: NDArray[np.float32], seen: NDArray[np.float32], limits: MonitorSettings
) -> Finding | None:
    if min(len(reference), len(seen)) < FEWEST:
        return None
    reference, seen = reference[: limits.rows], seen[: limits.rows]
    among = reference @ reference.T
    np.fill_diagonal(among, -1.0)
    usual = float(np.quantile(among.max(1), FAMILIAR_QUANTILE))
    best = (seen @ reference.T).max(1)
    share = float((best < usual).mean())
    error = 1.96 * math.sqrt(max(share * (1 - share), 1 / len(best)) / len(best))
    low, high = max(0.0, share - error), min(1.0, share + error)
    note = (
        f"Share of rows whose best hit among the training rows scores below {usual:.3f}, as {FAMILIAR_QUANTILE:.0%} of "
        f"the training rows do; the median best hit is {float(np.median(best)):.3f}."
    )
    title, alarm = f"Unfamiliar {_named(side)}", low > limits.unfamiliar_share
    return Finding(f"unfamiliar/{side}", title, share, limits.unfamiliar_share, alarm, note, low, high)


def _modalities(reference: Sequence[str], seen: Sequence[str], at_most: float) -> Finding | None:
    from scipy.stats import chi2_contingency

    counts = [Counter(name for name in names if name) for names in (reference, seen)]
    if min(each.total() for each in counts) < FEWEST:
        return None
    names = sorted(counts[0].keys() | counts[1].keys())
    table = np.array([[each[name] for name in names] for each in counts], dtype=np.float64)
    shares = table / table.sum(1, keepdims=True)
    distance = float(abs(shares[0] - shares[1]).sum() / 2)
    chance = 1.0 if len(names) == 1 else float(chi2_contingency(table).pvalue)
    parts = ", ".join(f"{name} {ours:.0%} → {theirs:.0%}" for name, ours, theirs in zip(names, *shares, strict=True))
    note = f"Total variation distance between the shares in training and seen rows: {parts} (p = {chance:.2g})."
    alarm = distance > at_most and chance < SIGNIFICANCE
    return Finding("modality_distance", "Mix of modalities", distance, at_most, alarm, note)


def _numbers(name: str, title: str, reference: Observations, seen: Observations, at_most: float) -> Finding | None:
    from scipy.stats import ks_2samp

    ours, theirs = reference.values(name), seen.values(name)
    if min(len(ours), len(theirs)) < FEWEST:
        return None
    test = ks_2samp(ours, theirs)
    note = (
        "Kolmogorov-Smirnov distance; "
        f"the median is {np.median(ours):.3g} → {np.median(theirs):.3g} (p = {test.pvalue:.2g})."
    )
    alarm = bool(test.statistic > at_most and test.pvalue < SIGNIFICANCE)
    return Finding(f"{name}_distance", title, float(test.statistic), at_most, alarm, note)


def _unreadable(seen: Observations, at_most: float) -> Finding:
    total = seen.unreadable + len(seen.table)
    share = seen.unreadable / total if total else 0.0
    note = f"{seen.unreadable} of {total} rows could not be read."
    return Finding("unreadable_share", "Unreadable rows", share, at_most, share > at_most, note)


def _named(side: str) -> str:
    return {"image": "images", "text": "texts", "both": "images with texts"}[side]
