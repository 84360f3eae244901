"""Zero-shot classification of images by the captions of their classes, against hand-counted cases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from test_tasks import Knowing, captions, store_of

from fuselip_core.config import EvaluateSettings
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.classes import measure_classes
from fuselip_core.evaluation.comparisons import findings
from fuselip_core.evaluation.result import EvaluationResult

CLASSES = {"C1": "a cyst", "C2": "a stone"}
TEST = [["C1"], ["C1", "C9"], ["C2"], ["C1"], ["C1", "C2"], [], None]  # the last three are of no class, or of two
TRAIN = [["C2"], ["C2"], ["C1"]]


class Prepared:
    """Concepts of images; each image is a case of its own."""

    splits = ("train", "test")

    def __init__(self, test: Sequence[list[str] | None]) -> None:
        self.concepts = {"train": TRAIN, "test": test}

    def iter_images(self, split: str, columns: Sequence[str], batch_rows: int) -> Iterator[pa.RecordBatch]:
        rows = self.concepts[split]
        ids = [f"image {row}" for row in range(len(rows))]
        yield pa.RecordBatch.from_pydict({"image_id": ids, "case": ids, "concepts": rows})


class Reader:
    """Embeds texts as `encoder` embeds images of the same meaning."""

    def __init__(self, encoder: Knowing) -> None:
        self.encoder = encoder

    def embed(self, images: Sequence[Any], texts: Sequence[str | None], batch_size: int) -> np.ndarray:
        rows = np.zeros((len(texts), 4096), np.float32)
        for row, text in enumerate(texts):
            rows[row, self.encoder.known.setdefault(text, len(self.encoder.known))] = 1
        return rows


def measured(tmp_path: Path, seen: dict[int, str], test: Sequence[list[str] | None] = TEST) -> EvaluationResult:
    encoder = Knowing(lambda image, text: seen.get(-1 if image is None else image, "nothing"))
    result = EvaluationResult("test")
    settings = EvaluateSettings(classes=CLASSES)
    store = store_of(tmp_path / "tokens", captions(len(test)))
    measure_classes(Reader(encoder), encoder, store, Prepared(test), settings, result)  # type: ignore[arg-type]
    return result


def test_accuracy_and_controls_by_hand(tmp_path: Path) -> None:
    # Of four images of one class three are seen rightly. The stone is most frequent in training, and right once.
    metrics = measured(tmp_path, {0: "a cyst", 1: "a cyst", 2: "a stone", 3: "a stone"}).metrics
    assert metrics["classes/images"] == 4 and metrics["classes/chance"] == 0.5
    assert metrics["classes/zero_shot/accuracy"] == 0.75
    assert metrics["classes/zero_shot/balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert metrics["classes/most_frequent/accuracy"] == 0.25
    assert metrics["classes/gain/most_frequent/accuracy"] == 0.5


def test_a_model_that_sees_nothing_is_never_right_and_is_called_so(tmp_path: Path) -> None:
    result = measured(tmp_path, {})
    assert result.metrics["classes/zero_shot/accuracy"] == 0
    (finding,) = findings(result.numbers())
    assert not finding.better and "not distinguishable from the most frequent class" in finding.verdict


def test_classes_that_no_image_has_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FuselipError, match=r"0 images of split 'test' have exactly one of the concepts C1, C2; name"):
        measured(tmp_path, {}, test=[["C5"], None])
