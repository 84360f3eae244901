"""Choosing among listed options, by embedders whose answers can be worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from training_data import SHAPES, draw, write_sugarcrepe

from fuselip_core.config import EvaluateSettings, PrepareSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.evaluation.candidates import has_candidates, measure_candidates
from fuselip_core.evaluation.metrics import Array
from fuselip_core.evaluation.result import EvaluationResult


class Reader:
    """Sees which half of a picture is bright, and reads the name of a half; a text beside a picture overrules it."""

    def __init__(self) -> None:
        self.pictures = self.calls = 0

    def embed(self, images: Sequence[Image.Image | None], texts: Sequence[str | None], batch_size: int) -> Array:
        self.calls += 1
        self.pictures += sum(image is not None for image in images)
        return np.stack([self._one(image, text) for image, text in zip(images, texts, strict=True)])

    def _one(self, image: Image.Image | None, text: str | None) -> Array:
        shape = next((name for name in SHAPES if name in (text or "").split()), None)
        if shape is None and image is not None:
            pixels = np.asarray(image.convert("L"), dtype=float)
            halves = {"left": pixels[:, :16], "right": pixels[:, 16:], "top": pixels[:16], "bottom": pixels[16:]}
            shape = max(halves, key=lambda name: float(halves[name].mean()))
        return np.eye(5, dtype=np.float32)[SHAPES.index(shape) if shape else 4]


class Collapsed:
    """Gives the same embedding to everything."""

    def embed(self, images: Sequence[Image.Image | None], texts: Sequence[str | None], batch_size: int) -> Array:
        return np.ones((len(texts), 1), np.float32)


def prepared_of(source: str, root: Path, out: Path) -> PreparedData:
    settings = PrepareSettings.model_validate({"source": source, "root": root, "workers": 1, "most_set_aside": 1})
    prepare_data(settings, out)
    return PreparedData(out)


def measured(embedder: Reader | Collapsed, prepared: PreparedData, batch_size: int = 3) -> EvaluationResult:
    result = EvaluationResult("test")
    measure_candidates(embedder, prepared, EvaluateSettings(batch_size=batch_size), result)
    return result


def test_a_reader_is_always_right_and_a_collapsed_model_never(tmp_path: Path) -> None:
    write_sugarcrepe(tmp_path / "crepe")
    prepared = prepared_of("sugarcrepe", tmp_path / "crepe", tmp_path / "out")
    assert has_candidates(prepared, "test") and not has_candidates(prepared, "train")
    reader = Reader()
    metrics = measured(reader, prepared).metrics
    assert reader.pictures == len(SHAPES), "each picture once, though two tasks ask about it"
    for task in ("add_att", "swap_obj"):
        assert metrics[f"candidates/sugarcrepe/{task}/accuracy"] == 1.0
        assert metrics[f"candidates/sugarcrepe/{task}/chance"] == 0.5
        assert metrics[f"candidates/sugarcrepe/{task}/questions"] == 4.0
        assert f"candidates/sugarcrepe/{task}/text_only" not in metrics, "the queries have no text"
    assert metrics["candidates/sugarcrepe/mean_accuracy"] == 1.0
    result = measured(Collapsed(), prepared)
    assert result.metrics["candidates/sugarcrepe/mean_accuracy"] == 0.0, "a tie is wrong"
    assert result.metrics["candidates/sugarcrepe/mean_ties_right"] == 1.0, "as the published evaluation counts"
    low, high = result.intervals["candidates/sugarcrepe/add_att/accuracy"]
    assert low == 0.0 < high < 1.0


@pytest.fixture
def mmeb(tmp_path: Path) -> Path:
    """Two subsets in MMEB's form: text and picture → picture, and picture → text; lists of 2, 4 and 3 options."""
    root = tmp_path / "mmeb"
    (root / "images").mkdir(parents=True)
    rng = np.random.default_rng(2)
    for shape in SHAPES:
        draw(shape, rng).save(root / "images" / f"{shape}.png")
    names = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")
    subsets = {
        "CIRR": [
            ("<|image_1|>\nnow the top", "left.png", ["", ""], ["top.png", "left.png"]),
            ("<|image_1|>\nthe same", "right.png", [""] * 4, [f"{shape}.png" for shape in ("right", *SHAPES)][:4]),
        ],
        "HatefulMemes": [("", "bottom.png", ["bottom", "left", "right"], ["", "", ""])],
    }
    for subset, rows in subsets.items():
        (root / subset).mkdir()
        table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
        pq.write_table(table, root / subset / "test-00000-of-00001.parquet")
    return root


def test_controls_ask_with_one_side_alone(mmeb: Path, tmp_path: Path) -> None:
    metrics = measured(Reader(), prepared_of("mmeb-eval", mmeb, tmp_path / "out")).metrics
    assert metrics["candidates/mmeb/CIRR/accuracy"] == 1.0
    assert metrics["candidates/mmeb/CIRR/image_only"] == 0.5, "without its text the first question asks for itself"
    assert metrics["candidates/mmeb/CIRR/text_only"] == 0.5, "the second text says nothing without its picture"
    assert metrics["candidates/mmeb/CIRR/chance"] == pytest.approx((1 / 2 + 1 / 3) / 2), "equal options count once"
    assert metrics["candidates/mmeb/HatefulMemes/accuracy"] == 1.0
    assert metrics["candidates/mmeb/HatefulMemes/ties_right"] == 1.0
    assert "candidates/mmeb/vqa/mean_accuracy" not in metrics, "no task of that group was asked"
    assert metrics["candidates/mmeb/mean_chance"] == pytest.approx((5 / 12 + 1 / 3) / 2)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_batches_change_nothing(mmeb: Path, tmp_path: Path, batch_size: int) -> None:
    prepared = prepared_of("mmeb-eval", mmeb, tmp_path / "out")
    assert measured(Reader(), prepared, batch_size).metrics == measured(Reader(), prepared).metrics


def test_published_lists_whole(shared: Path, tmp_path: Path) -> None:
    """Every published question of SugarCrepe is asked, about blank pictures: a model that sees nothing gets none."""
    root = tmp_path / "crepe"
    (root / "val2017").mkdir(parents=True)
    lists = {
        path.stem: json.loads(path.read_text()) for path in (shared / "data/fuselip-eval/sugarcrepe").glob("*.json")
    }
    pictures = {row["filename"] for rows in lists.values() for row in rows.values()}
    for number, name in enumerate(sorted(pictures)):
        Image.new("L", (8, 8), number % 256).save(root / "val2017" / name)
    for name, rows in lists.items():
        (root / f"{name}.json").write_text(json.dumps(rows))
    metrics = measured(Collapsed(), prepared_of("sugarcrepe", root, tmp_path / "out"), 512).metrics
    for name, rows in lists.items():
        assert metrics[f"candidates/sugarcrepe/{name}/questions"] == len(rows)
        assert metrics[f"candidates/sugarcrepe/{name}/accuracy"] == 0.0
    assert metrics["candidates/sugarcrepe/mean_chance"] == 0.5
