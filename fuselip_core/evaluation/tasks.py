"""Evaluation tasks, all with the same interface: model and data in, dict of floats out.

Pools are always complete and a tie is wrong. Every metric comes with chance and with controls that show whether the
model uses its inputs: shuffled pairs, question alone, image alone, blank image, most frequent answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import TokenStore
from fuselip_core.encoding.open import AnyModel, open_measuring
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.answers import measure_answers, question_rows, quick_answers
from fuselip_core.evaluation.candidates import has_candidates
from fuselip_core.evaluation.embed import SideEncoder
from fuselip_core.evaluation.metrics import Array
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.evaluation.retrieval import caption_rows, measure_retrieval, quick_retrieval


@dataclass(frozen=True)
class OpenSplit:
    """A split with the encoder that reads it."""

    encoder: SideEncoder
    store: TokenStore
    prepared: PreparedData

    def measure(self, settings: EvaluateSettings) -> EvaluationResult:
        """See `evaluate`."""
        return evaluate(self.encoder, self.store, self.prepared, settings)


def open_split(model: AnyModel, artifacts: Path, split: str, device: torch.device) -> OpenSplit:
    """Opens a split of the run in `artifacts` for `model`. Raises FuselipError if data or tokens do not fit."""
    store, encoder = open_measuring(model, artifacts, split, device)
    return OpenSplit(encoder, store, PreparedData(artifacts / "prepared"))


def evaluate(
    encoder: SideEncoder, store: TokenStore, prepared: PreparedData, settings: EvaluateSettings
) -> EvaluationResult:
    """All measures that the split has pairs for.

    Raises FuselipError if there are none, if store and prepared data differ, or if embeddings are not finite.
    """
    result = EvaluationResult(store.split)
    has_captions, has_questions = len(caption_rows(store)) > 0, len(question_rows(store)) > 0
    if not has_captions and not has_questions and not has_candidates(prepared, store.split):
        raise FuselipError(
            f"split '{store.split}' of {store.folder} has neither captions nor questions; set evaluate.split to "
            "another one"
        )
    cases = _cases(prepared, store)
    if has_captions:
        measure_retrieval(encoder, store, cases, settings, result)
    if has_questions:
        measure_answers(encoder, store, prepared, cases, settings, result)
    return result


def quick_look(encoder: SideEncoder, store: TokenStore, pairs: int, batch_size: int = 128) -> dict[str, float]:
    """Validation during training: recall and accuracy at 1 on at most `pairs` evenly spaced pairs of each kind."""
    metrics: dict[str, float] = {}
    if len(rows := _spread(caption_rows(store), pairs)):
        metrics |= quick_retrieval(encoder, store, rows, batch_size)
    if len(rows := _spread(question_rows(store), pairs)):
        metrics |= quick_answers(encoder, store, rows, batch_size)
    return metrics


def _spread(rows: Array, count: int) -> Array:
    """At most `count` of the rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _cases(prepared: PreparedData, store: TokenStore) -> Array:
    """Number of each image's case (patient, study, article), the clusters of intervals."""
    names: list[str] = []
    for batch in prepared.iter_images(store.split, columns=["image_id", "case"]):
        ids, cases = (batch.column(name).to_pylist() for name in ("image_id", "case"))
        names += [case or f"image {image}" for image, case in zip(ids, cases, strict=True)]
    if len(names) != store.images:
        raise FuselipError(
            f"split '{store.split}' has {len(names)} prepared images but {store.images} tokenized ones; tokenize again"
        )
    return np.unique(np.array(names), return_inverse=True)[1].ravel()
