"""Pictures decoded when they are asked for, against the cache of pixels: the same values, the same training."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import small_settings, write_raw

from fuselip_core import stages
from fuselip_core.config import Settings, check_settings
from fuselip_core.data.pair import DataError
from fuselip_core.data.shards.by_row import PictureReader
from fuselip_core.data.shards.in_order import pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.distributed import World
from fuselip_core.encoding import open as open_module
from fuselip_core.encoding.from_pixels import BLACK, DecodedPictures, PicturePairs, Pictures
from fuselip_core.training import build

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    folder = tmp_path_factory.mktemp("run")
    write_raw(folder / "raw", train=24, held_out=8)
    plain = small_settings(folder / "raw", folder / "artifacts", steps=3, mask_weight=0.0, accumulation=2)
    values = plain.model_dump(by_alias=True)
    values["model"] |= {"family": "siglip-mlf", "mask_token": False}
    values["prepare"] |= {"extra_pairs": ("edits",), "rows_per_shard": 10}
    made = check_settings(values, "test")
    for stage in (stages.prepare, stages.codebook, stages.tokenize):
        stage(made)
    return made


def test_every_image_file_is_found_in_its_shard(settings: Settings, tmp_path: Path) -> None:
    prepared = PreparedData(settings.artifacts / "prepared")
    stored = [blob for batch in prepared.iter_images("train") for blob in batch.column("bytes").to_pylist()]
    for index in (PictureReader(tmp_path / "index.npy", prepared, "train") for _ in range(2)):
        assert [index.file(row) for row in range(len(stored))] == stored
        assert len(index) == prepared.row_count("train") > 80 and len(stored) == 24
    assert len(list(tmp_path.iterdir())) == 1


def test_as_many_images_are_decoded_at_once_as_there_are_cores(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    four = threading.Barrier(4)

    def draw(image: Image.Image, row: int) -> np.ndarray:
        four.wait(timeout=30)  # raises where fewer than four are at it
        return np.full((1, 1, 1, 3), row, np.uint8)

    prepared = PreparedData(settings.artifacts / "prepared")
    batches = list(pixel_batches(prepared, "train", draw, batch_rows=8, stop=24))
    assert np.concatenate([batch for _, batch in batches])[:, 0, 0, 0, 0].tolist() == list(range(24))


def test_packed_shards_are_one_sentence(settings: Settings, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    prepared = PreparedData(settings.artifacts / "prepared")
    shard = next(str(each["path"]) for each in prepared.manifest["shards"] if "images-valid" in str(each["path"]))
    pq.write_table(pq.read_table(prepared.folder / shard), tmp_path / shard, compression="zstd")
    prepared.folder = tmp_path
    with pytest.raises(DataError, match="has compressed images; run `fuselip prepare` again"):
        PictureReader(tmp_path / "index.npy", prepared, "valid")


def encoders(settings: Settings, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[PicturePairs, PicturePairs]:
    """The same baseline, once with a cache and once without."""
    from fuselip_core.model.titok import TiTok

    made = []
    for most in (open_module.MOST_CACHED, 0):
        monkeypatch.setattr(open_module, "MOST_CACHED", most)
        torch.manual_seed(0)
        tokenizer = TiTok.load(settings.artifacts / "codebook")
        model = build.build_model(settings.model, settings.train, tokenizer)
        _, encoder = open_module.open_training(model, settings.artifacts, settings.train, CPU, World())
        assert isinstance(encoder, PicturePairs)
        made.append(encoder)
    assert isinstance(made[0].pictures, Pictures) and isinstance(made[1].pictures, DecodedPictures)
    return made[0], made[1]


def test_decoded_pictures_are_those_of_the_cache(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached, decoded = encoders(settings, tmp_path, monkeypatch)
    numbers = np.array([5, BLACK, 0, 41, 5, cached.store.codes.size - 1])
    assert torch.equal(cached.pictures.rows(numbers), decoded.pictures.rows(numbers))


def test_a_run_without_a_cache_is_the_same_run(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, shown = [], []
    for most in (open_module.MOST_CACHED, 0):
        monkeypatch.setattr(open_module, "MOST_CACHED", most)
        monkeypatch.setenv("FUSELIP_TRACKERS", "")
        stages.train(settings)
        weights.append((settings.artifacts / "model" / "model.safetensors").read_bytes())
        shown.append(stages.evaluate(settings)["retrieval/image_to_text/median_rank"])
    assert weights[0] == weights[1] and shown[0] == shown[1]


def test_the_next_batch_is_decoded_ahead_and_no_more_is_held(settings: Settings, tmp_path: Path) -> None:
    asked: list[int] = []

    class Files:
        def __len__(self) -> int:
            return 40

        def picture(self, row: int) -> Image.Image:
            asked.append(row)
            return Image.new("L", (4, 4))

    pictures = DecodedPictures([(Files(), 2, lambda image, row, view: np.zeros((4, 4, 3), np.uint8))], 4, CPU)
    batches = [np.arange(start, start + 8) for start in range(0, 64, 8)]
    for now, ahead in itertools.pairwise(batches):
        pictures.expect(ahead)
        for _ in range(2):  # a batch that is computed in parts asks twice
            pictures.rows(now)
        assert len(pictures._held) <= 16
    pictures.rows(batches[-1])
    # Each picture once, but for the first batch, which nobody expected.
    assert sorted(asked) == sorted([*range(4)] * 4 + [row for row in range(4, 32) for _ in range(2)])
    assert threading.active_count() < 40
