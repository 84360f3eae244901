"""What a run's settings mean for the data at hand: shares of the kinds, length in steps, warm-up."""

from __future__ import annotations

import numpy as np

from fuselip_core.config import TrainSettings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.joined import JoinedStore, Store
from fuselip_core.errors import FuselipError
from fuselip_core.training.optimizer import Schedule


def sample_ids(store: Store, rows: np.ndarray) -> list[str]:
    """Ids of the pairs `rows` (B) as the prepared data beside their token store have them; row numbers without such."""
    ids = []
    for row in rows.tolist():
        part, own = store.locate(row) if isinstance(store, JoinedStore) else (store, row)
        try:
            pairs = PreparedData(part.folder.parent / "prepared").pairs(part.split)
            ids.append(str(pairs.column("pair_id")[own]))
        except (FuselipError, OSError, IndexError):
            ids.append(f"row {own} of {part.folder}")
    return ids


def kind_shares(store: Store, settings: TrainSettings) -> dict[str, float]:
    """Each kind's weight in a batch. By passes, a kind's share grows with its number of pairs."""
    if settings.mixture_by == "share":
        return settings.mixture
    return {kind: passes * len(store.rows_of(kind)) for kind, passes in settings.mixture.items() if passes > 0}


def pairs_of_epoch(store: Store, settings: TrainSettings) -> float:
    """Pairs in a pass: all of the kinds that are drawn or, by passes, each as often as its weight says."""
    by_passes = settings.mixture_by == "passes"
    weights = {kind: weight if by_passes else 1.0 for kind, weight in settings.mixture.items() if weight > 0}
    return sum(weight * len(store.rows_of(kind)) for kind, weight in weights.items())


def refuse_empty_parts(settings: TrainSettings, processes: int) -> None:
    """Raises FuselipError where some process, or some part of its batch, would have no pair at all."""
    parts = 1 if settings.accumulation == "auto" else settings.accumulation
    needed = processes * parts
    if settings.batch_size < needed:
        raise FuselipError(
            f"train.batch_size {settings.batch_size} gives {processes} processes no pair for each of "
            f"{parts} parts; raise it to {needed}, or lower train.accumulation"
        )


def plan_schedule(store: Store, settings: TrainSettings) -> Schedule:
    """Steps and warm-up; raises FuselipError where the warm-up would last longer than the run."""
    steps = settings.steps
    if steps is None:
        assert settings.epochs is not None
        steps = max(1, round(settings.epochs * pairs_of_epoch(store, settings) / settings.batch_size))
    warmup = settings.warmup_steps
    if warmup is None:
        assert settings.warmup_share is not None
        warmup = round(steps * settings.warmup_share)
    if settings.preflight and warmup >= steps > 1:
        raise FuselipError(
            f"the warm-up of {warmup} steps does not end within the run of {steps}; "
            "set train.warmup_share (0.1, say), or train longer"
        )
    return Schedule(steps, warmup, settings.learning_rate)
