"""What a trained encoder is measured by; every task has the same shape: model and data in, dict of floats out.

Pools are always complete, a tie is wrong, and beside every number stand chance and the controls that tell whether the
model uses what it is given: shuffled pairs, question alone, image alone, blank image, most frequent answer.
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
    """A split with the encoder that reads it, ready to be measured."""

    encoder: SideEncoder
    store: TokenStore
    prepared: PreparedData

    def measure(self, settings: EvaluateSettings) -> EvaluationResult:
        """See `evaluate`."""
        return evaluate(self.encoder, self.store, self.prepared, settings)


def open_split(model: AnyModel, artifacts: Path, split: str, device: torch.device) -> OpenSplit:
    """Opens a split of the run in `artifacts` for `model`. Raises FuselipError where data or tokens do not fit."""
    store, encoder = open_measuring(model, artifacts, split, device)
    return OpenSplit(encoder, store, PreparedData(artifacts / "prepared"))


def evaluate(
    encoder: SideEncoder, store: TokenStore, prepared: PreparedData, settings: EvaluateSettings
) -> EvaluationResult:
    """Every measure that the split has pairs for.

    Raises FuselipError where it has none, where store and prepared data differ, or for embeddings that are not finite.
    """
    result = EvaluationResult(store.split)
    has_captions, has_questions = len(caption_rows(store)) > 0, len(question_rows(store)) > 0
    if not has_captions and not has_questions and not has_candidates(prepared, store.split):
        raise FuselipError(
            f"split '{store.split}' of {store.folder} has neither captions nor questions to measure; "
            "set evaluate.split to one that has"
        )
    cases = _cases(prepared, store)
    if has_captions:
        measure_retrieval(encoder, store, cases, settings, result)
    if has_questions:
        measure_answers(encoder, store, prepared, cases, settings, result)
    return result


def quick_look(encoder: SideEncoder, store: TokenStore, pairs: int, batch_size: int = 128) -> dict[str, float]:
    """Recall and accuracy at 1 over at most `pairs` pairs of each kind, spread evenly: a look while training."""
    metrics: dict[str, float] = {}
    if len(rows := _spread(caption_rows(store), pairs)):
        metrics |= quick_retrieval(encoder, store, rows, batch_size)
    if len(rows := _spread(question_rows(store), pairs)):
        metrics |= quick_answers(encoder, store, rows, batch_size)
    return metrics


def _spread(rows: Array, count: int) -> Array:
    """At most `count` of the rows, evenly spaced and the same at every look."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]


def _cases(prepared: PreparedData, store: TokenStore) -> Array:
    """Number of the case (patient, study, article) of each image: cases are what intervals are drawn over."""
    names: list[str] = []
    for batch in prepared.iter_images(store.split, columns=["image_id", "case"]):
        ids, cases = (batch.column(name).to_pylist() for name in ("image_id", "case"))
        names += [case or f"image {image}" for image, case in zip(ids, cases, strict=True)]
    if len(names) != store.images:
        raise FuselipError(
            f"split '{store.split}' has {len(names)} prepared images but {store.images} tokenized ones; tokenize again"
        )
    return np.unique(np.array(names), return_inverse=True)[1].ravel()
