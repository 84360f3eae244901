"""Late-fusion models on the pairs of a token store: the same batches, read as pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_late_fusion import towers
from tiny_store import random_store, settings_of

from fuselip_core.data.tokens.store import TokenStore, gather
from fuselip_core.encoding.from_pixels import BLACK, PictureEncoder, PicturePairs, Pictures, open_picture_store
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.loop import Trainer

CPU = torch.device("cpu")


def baseline(fusion: str) -> LateFusionModel:
    torch.manual_seed(0)
    config = towers()
    config["text_cfg"]["context_length"] = 16
    return LateFusionModel(LateFusionConfig(towers=config, fusion=fusion))


@pytest.fixture
def store(tmp_path: Path) -> TokenStore:
    random_store(tmp_path / "store")
    return open_picture_store(tmp_path / "store", "train", first=100)


@pytest.fixture
def pictures() -> Pictures:
    rng = np.random.default_rng(0)
    return Pictures([rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8) for count in (100, 24)], CPU)


def test_codes_are_rows_of_the_cache_behind_other_stores(store: TokenStore, pictures: Pictures) -> None:
    assert store.codes[:, :, 0].tolist() == [[100 + 2 * image, 101 + 2 * image] for image in range(12)]
    black, first = pictures.rows(np.array([BLACK, 100]))
    np.testing.assert_allclose(black, pictures.rows(np.array([BLACK]))[0])
    assert black.amax() < 0 and not torch.equal(black, first)


@pytest.mark.parametrize("fusion", ["add", "magiclens"])
def test_sides_are_embedded_as_the_published_calls_do(store: TokenStore, pictures: Pictures, fusion: str) -> None:
    model = baseline(fusion).eval()
    encoder = PictureEncoder(model, pictures)
    captions, questions = np.arange(3), np.arange(12, 15)
    pixels = pictures.rows(np.array([100, 102, 104]))
    with torch.no_grad():
        np.testing.assert_allclose(
            encoder.encode(gather(store, captions, "query")), model.encode_image(pixels), atol=1e-5
        )
        fused = encoder.encode(gather(store, questions, "query"))
        ids = torch.nn.functional.pad(_ids(store, questions), (0, 2))
        np.testing.assert_allclose(fused, model.encode_multimodal(pixels, ids), atol=1e-5)
        blank = encoder.encode(gather(store, questions, "query").with_codes(store.blank))
    assert np.abs(blank - fused).max() > 1e-3


def _ids(store: TokenStore, rows: np.ndarray) -> torch.Tensor:
    from fuselip_core.model.vocabulary import text_sequence

    side = gather(store, rows, "query")
    return text_sequence(*(torch.from_numpy(each.astype(np.int64)) for each in (side.text_ids, side.text_lengths)))


@pytest.mark.parametrize("fusion", ["add", "magiclens"])
def test_the_one_loop_trains_a_baseline_in_parts_and_reaches_every_weight(
    store: TokenStore, pictures: Pictures, tmp_path: Path, fusion: str
) -> None:
    settings = settings_of(mask_weight=0.0, accumulation=2, ema=0.5, steps=3, gradient_checkpointing=fusion == "add")
    model = baseline(fusion)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    lines: list[dict[str, float]] = []
    trainer = Trainer(
        PicturePairs(model, store, pictures), store, settings, Checkpoints(tmp_path), lambda m, step: lines.append(m)
    )
    trainer.run()
    assert "preflight/contrastive" in lines[0] and lines[-1]["masked"] == 0.0
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    assert not still
