"""Transformation retrieval on the run's own images, with embedders whose knowledge is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from instructions import obey
from PIL import Image
from training_data import write_raw

from fuselip_core.config import EvaluateSettings, PrepareSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.evaluation.transformations import measure_transformations

WIDTH = 4096
FAMILIES = ("crop", "rotate", "light", "flip")


class Obedient:
    """Gives an image with an instruction the place of the picture that the instruction makes of it."""

    def __init__(self, obeys: bool = True) -> None:
        self.obeys = obeys
        self.known: dict[bytes, int] = {}

    def embed(self, images: Sequence[Image.Image | None], texts: Sequence[str | None], batch_size: int) -> np.ndarray:
        embeddings = np.zeros((len(images), WIDTH), np.float32)
        for row, (image, text) in enumerate(zip(images, texts, strict=True)):
            pixels = np.zeros((2, 2, 3), np.uint8) if image is None else np.array(image)
            if image is not None and text is not None and self.obeys:
                pixels = obey(pixels, text)
            embeddings[row, self.known.setdefault(pixels.tobytes(), len(self.known))] = 1
        return embeddings


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("prepared")
    write_raw(folder / "raw", train=8, held_out=5)
    prepare_data(PrepareSettings(source="rocov2", root=folder / "raw", workers=1), folder / "prepared")
    return PreparedData(folder / "prepared")


def measured(prepared: PreparedData, embedder: Obedient, families: tuple[str, ...] = FAMILIES) -> EvaluationResult:
    result = EvaluationResult("valid")
    settings = EvaluateSettings.model_validate({"transformations": families})
    measure_transformations(embedder, prepared, settings, result)
    return result


def test_who_obeys_is_right_and_neither_part_alone_tells(prepared: PreparedData) -> None:
    metrics = measured(prepared, Obedient()).metrics
    for family, options in (("crop", 9), ("rotate", 18), ("light", 10)):
        assert metrics[f"transformations/{family}/accuracy"] == 1
        assert metrics[f"transformations/{family}/text_only"] == 0
        # The image alone says nothing about which variant is meant: one of all at most.
        assert metrics[f"transformations/{family}/image_only"] <= metrics[f"transformations/{family}/chance"] + 1e-9
        assert metrics[f"transformations/{family}/chance"] == pytest.approx(1 / options, rel=0.2)
    assert metrics["transformations/mean_accuracy"] == 1


def test_who_ignores_instructions_is_at_chance_at_best(prepared: PreparedData) -> None:
    result = measured(prepared, Obedient(obeys=False), ("crop", "rotate"))
    assert result.metrics["transformations/mean_accuracy"] <= result.metrics["transformations/mean_chance"]
    low, high = result.intervals["transformations/crop/accuracy"]
    assert 0 <= low <= high < 0.6


def test_nothing_is_asked_unless_wanted(prepared: PreparedData) -> None:
    assert measured(prepared, Obedient(), ()).metrics == {}
