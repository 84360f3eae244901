"""The tokenize stage as a pipeline: the codes of a plain loop, bit for bit, and what a lower precision changes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import write_raw

from fuselip_core.config import PrepareSettings, TokenizeSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.in_order import ahead, pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import TokenStore
from fuselip_core.images import draw_part, to_pixels
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.processing import TextTokenizer, as_pixels
from fuselip_core.model.titok import TiTok
from fuselip_core.tokenizer.crops import Uncut
from fuselip_core.tokenizer.tokenize import Tokenizing, store_identity, views_of


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("prepared")
    write_raw(folder / "raw", train=20, held_out=4)
    settings = PrepareSettings.model_validate({"source": "rocov2", "root": folder / "raw", "workers": 1})
    prepare_data(settings, folder / "prepared")
    return PreparedData(folder / "prepared")


def tokenized(
    prepared: PreparedData, target: Path, **fields: object
) -> tuple[TiTok, TokenizeSettings, dict[str, object]]:
    torch.manual_seed(0)
    tokenizer = TiTok(tokenizer_config("tiny")).eval()
    settings = TokenizeSettings.model_validate({"views": 3, "batch_size": 3, "rows_per_shard": 7, **fields})
    identity = store_identity(prepared, "c", tokenizer, settings)
    encode = TextTokenizer(context_length=77).encode
    return tokenizer, settings, Tokenizing(prepared, tokenizer, encode, settings, identity, target).run()


def test_the_pipeline_writes_the_codes_of_a_plain_loop(prepared: PreparedData, tmp_path: Path) -> None:
    tokenizer, settings, counts = tokenized(prepared, tmp_path / "tokens")
    assert "equal_codes" not in counts
    draw, device = views_of(tokenizer.config.image_size, settings, "pillow"), torch.device("cpu")
    for split in prepared.splits:
        wanted = []
        # The same batches: in another one a product may round differently.
        for start in range(0, prepared.row_count(split), 7):
            stop = min(start + 7, prepared.row_count(split))
            for _, batch in pixel_batches(prepared, split, draw, 3, start, stop):
                with torch.inference_mode():
                    views = [tokenizer.codes(as_pixels(batch[:, view], device)) for view in range(3)]
                wanted.append(torch.stack(views, dim=1).numpy())
        codes = np.asarray(TokenStore(tmp_path / "tokens", split).codes)
        assert np.array_equal(codes, np.concatenate(wanted)) and len(np.unique(codes)) > 10


def test_a_lower_precision_leaves_view_0_and_says_what_it_changes(prepared: PreparedData, tmp_path: Path) -> None:
    tokenized(prepared, tmp_path / "whole", batch_size=20)
    _, _, counts = tokenized(prepared, tmp_path / "half", precision="bfloat16", batch_size=20)
    whole, half = (np.asarray(TokenStore(tmp_path / name, "train").codes) for name in ("whole", "half"))
    assert np.array_equal(half[:, 0], whole[:, 0])
    share = counts["equal_codes"]
    assert isinstance(share, float) and 0.5 < share < 1.0
    assert share == pytest.approx((half[:7, 1] == whole[:7, 1]).mean()), "view 1 of the first batch"
    assert not torch.is_autocast_enabled("cpu") and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("shape", [(300, 231), (64, 500), (40, 33), (3, 2)])
def test_crops_of_the_device_are_pillows_to_one_grey_level(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    smooth = np.asarray(Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize(shape[::-1]))
    for picture in (smooth, rng.integers(0, 256, (*shape, 3), np.uint8)):
        boxes = np.array([draw_part(shape[1], shape[0], (0.3, 1.0), rng) for _ in range(4)])
        uncut = Uncut(to_pixels(Image.fromarray(picture), 48)[None], picture, boxes)
        views = uncut.views(torch.device("cpu")).numpy()
        assert np.array_equal(views[0], uncut.view[0]) and views.shape == (5, 48, 48, 3)
        for crop, found in enumerate(views[1:]):
            off = np.abs(found.astype(int) - uncut.cut_by_pillow(crop))
            assert off.max() <= 1 and (off > 0).mean() < 0.005


def test_crops_of_the_device_have_nearly_all_of_pillows_codes(
    prepared: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized(prepared, tmp_path / "pillow")
    _, _, counts = tokenized(prepared, tmp_path / "device", crops="device")
    pillow, device = (np.asarray(TokenStore(tmp_path / name, "train").codes) for name in ("pillow", "device"))
    assert np.array_equal(device[:, 0], pillow[:, 0]) and (device[:, 1:] == pillow[:, 1:]).mean() > 0.98
    assert isinstance(counts["equal_codes"], float) and counts["equal_codes"] > 0.98
    assert TokenStore(tmp_path / "device", "train").manifest["crops"] == "device"
    monkeypatch.setattr("fuselip_core.tokenizer.tokenize.MOST_UNCUT", 0)  # every picture is too large
    tokenized(prepared, tmp_path / "large", crops="device")
    assert np.array_equal(TokenStore(tmp_path / "large", "train").codes, pillow)


def test_items_are_taken_ahead_but_not_too_many_and_errors_arrive() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10):
            taken.append(number)
            yield number
        raise ValueError("the disk is gone")

    waiting = ahead(items(), 2)
    assert next(waiting) == 0
    deadline = time.monotonic() + 10
    while len(taken) < 4 and time.monotonic() < deadline:  # one given, two waiting, one in the hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert taken == [0, 1, 2, 3]
    assert [next(waiting) for _ in range(9)] == list(range(1, 10))
    with pytest.raises(ValueError, match="the disk is gone"):
        next(waiting)
    left = ahead(items(), 2)
    next(left)
    left.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ahead"]
