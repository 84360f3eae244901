"""The one call that embeds pictures, files, texts and pairs, for both families."""

from __future__ import annotations

import base64
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.exceptions import MlflowException
from PIL import Image

from fuselip_core import Embedder
from fuselip_core.config import PrepareSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.errors import FuselipError
from fuselip_core.images import decode
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.hub import Model, save_model
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.model.presets import open_clip_config
from fuselip_core.model.processing import FuseLIPProcessor
from fuselip_core.model.titok import TiTok, TiTokConfig
from fuselip_core.model.vocabulary import END_OF_TEXT
from fuselip_core.registry.served_model import read_rows

CODEBOOK = TiTokConfig(
    image_size=32, patch_size=16, latent_tokens=4, codebook_size=16, code_size=4, width=32, layers=1, heads=2
)


def early() -> Model:
    model = FuseLIPModel(
        FuseLIPConfig(width=32, heads=2, layers=1, context_length=24, codebook_size=16, codes_per_image=4)
    )
    model.attach_image_tokenizer(TiTok(CODEBOOK))
    return model


def late() -> Model:
    towers = open_clip_config("tiny")
    towers["vision_cfg"] |= {"image_size": 32, "layers": 1}
    towers["text_cfg"] |= {"layers": 1}
    return LateFusionModel(LateFusionConfig(towers=towers, fusion="magiclens", fusion_layers=1))


@pytest.fixture(scope="module", params=[early, late], ids=["fuselip", "late-fusion"])
def embedder(request: pytest.FixtureRequest) -> Embedder:
    torch.manual_seed(0)
    model = request.param()
    return Embedder(model, FuseLIPProcessor.of_config(model.config))


@pytest.fixture
def pictures() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (3, 40, 50), dtype=np.uint8)
    return [Image.fromarray(value) for value in values]


def test_rows_equal_single_calls(embedder: Embedder, pictures: list[Image.Image], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    pictures[0].save(path)
    images = [pictures[0], None, str(path), pictures[1], None, path, pictures[2]]
    texts = [None, "a long text about nothing in particular", "effusion", None, "", None, "left effusion"]
    together = embedder.embed(images=images, texts=texts)
    assert together.shape == (7, embedder.width)
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(embedder.embed(images, texts, batch_size=2), together, atol=1e-5)
    single = [embedder.embed([image], [text])[0] for image, text in zip(images, texts, strict=True)]
    np.testing.assert_allclose(single, together, atol=1e-5)
    np.testing.assert_allclose(together[5], together[0], atol=1e-5)
    assert np.abs(together[2] - together[0]).max() > 1e-3


def test_one_side_may_be_left_out(embedder: Embedder, pictures: list[Image.Image]) -> None:
    assert embedder.embed(images=pictures).shape == (3, embedder.width)
    assert embedder.embed(texts=["a", "b"]).shape == (2, embedder.width)
    assert embedder.embed(images=[], texts=[]).shape == (0, embedder.width)
    assert embedder.embed().shape == (0, embedder.width)


def test_wrong_rows_are_named(embedder: Embedder, pictures: list[Image.Image], tmp_path: Path) -> None:
    with pytest.raises(FuselipError, match="row 1 has neither image nor text"):
        embedder.embed(images=[pictures[0], None], texts=["a", None])
    with pytest.raises(FuselipError, match="2 images but 1 texts"):
        embedder.embed(images=pictures[:2], texts=["a"])
    with pytest.raises(FuselipError, match=r"row 1: image .*missing\.png cannot be read"):
        embedder.embed(images=[pictures[0], tmp_path / "missing.png"])
    whole = tmp_path / "whole.png"
    pictures[0].save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:600])
    with pytest.raises(FuselipError, match=r"row 0: image .*cut\.png cannot be read"):
        embedder.embed(images=[cut], texts=["a"])
    with pytest.raises(FuselipError, match="row 1: image cannot be read"):
        embedder.embed(images=[pictures[0], Image.open(cut)])  # nobody has read it yet
    with pytest.raises(FuselipError, match="too deep: values of mode I have no defined range; window it"):
        embedder.embed(images=[Image.new("I", (4, 4))])
    with pytest.raises(FuselipError, match="row 0: a text is a string, not int"):
        embedder.embed(texts=[3])  # type: ignore[list-item]
    with pytest.raises(FuselipError, match="row 0: an image is a Pillow image or a path, not int"):
        embedder.embed(images=[3])  # type: ignore[list-item]
    with pytest.raises(FuselipError, match="texts must be a list"):
        embedder.embed(texts="a")
    with pytest.raises(FuselipError, match="batch_size is 0"):
        embedder.embed(texts=["a"], batch_size=0)


def test_a_file_is_one_thing_to_prepare_library_and_server(embedder: Embedder, shared: Path, tmp_path: Path) -> None:
    """Deep, turned and dark files: the same picture by every way in, or the same refusal."""
    values = np.linspace(0, 65_535, 40 * 50).reshape(40, 50).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    root = tmp_path / "raw"
    root.mkdir()
    Image.fromarray(values).save(root / "deep.png")
    Image.fromarray((values // 256).astype(np.uint8)).save(root / "turned.png", exif=exif)
    Image.fromarray(values // 16).save(root / "dark.png")
    Image.fromarray(values.astype(np.float32)).save(root / "float.tiff")
    files = sorted(root.iterdir())
    with zipfile.ZipFile(root / "train_images.zip", "w") as archive:
        for path in files:
            archive.write(path, f"train/{path.stem}.jpg")
    rows = "".join(f"{path.stem},a scan of {path.stem}\n" for path in files)
    (root / "train_captions.csv").write_text(f"ID,Caption\n{rows}")
    settings = PrepareSettings.model_validate({"source": "rocov2", "root": root, "workers": 1, "most_set_aside": 1})
    prepare_data(settings, tmp_path / "prepared")
    batches = PreparedData(tmp_path / "prepared").iter_images("train")
    taken = {row["image_id"]: row for batch in batches for row in batch.to_pylist()}
    lines = (tmp_path / "prepared" / "quarantine.jsonl").read_text().splitlines()
    refused = {item["id"]: item["reason"] for item in map(json.loads, lines)}
    assert {"deep", "turned"} <= taken.keys() and {"dark": "too_dark", "float": "too_deep"}.items() <= refused.items()
    for path in files:
        served = pd.DataFrame({"image": [base64.b64encode(path.read_bytes()).decode()]})
        if path.stem in taken:
            expected = embedder.embed(images=[decode(taken[path.stem]["bytes"])])
            for images in ([path], [Image.open(path)], read_rows(served)[0]):
                np.testing.assert_array_equal(embedder.embed(images=images), expected, err_msg=path.name)
            size = taken[path.stem]["width"], taken[path.stem]["height"]
            assert size == ((40, 50) if path.stem == "turned" else Image.open(path).size)
        else:
            words = refused[path.stem].replace("_", " ")
            for images in ([path], [Image.open(path)]):
                with pytest.raises(FuselipError, match=words):
                    embedder.embed(images=images)
            with pytest.raises(MlflowException, match=words):
                read_rows(served)


def test_saved_embedder_comes_back(embedder: Embedder, pictures: list[Image.Image], tmp_path: Path) -> None:
    save_model(embedder.model, tmp_path / "model")
    loaded = Embedder.from_pretrained(tmp_path / "model", device="cpu")
    again, once = (each.embed(pictures, ["a", None, "b"]) for each in (loaded, embedder))
    np.testing.assert_allclose(again, once, atol=1e-6)  # not to the bit: kernels depend on where in memory tensors lie


def test_no_rows_give_no_embeddings_and_what_is_no_list_is_refused(embedder: Embedder) -> None:
    assert embedder.embed(texts=[]).shape == embedder.embed(images=[], texts=[]).shape == (0, embedder.width)
    assert embedder.embed(texts=(text for text in ("a", "b"))).shape == (2, embedder.width)
    for wrong in ({"texts": "x"}, {"texts": b"x"}, {"images": "ct.png"}, {"images": 5}):
        with pytest.raises(FuselipError, match="must be a list"):
            embedder.embed(**wrong)
    assert repr(embedder).startswith("Embedder(fuselip") and f"width {embedder.width}" in repr(embedder)


def test_end_of_text_written_in_a_text_is_the_token(embedder: Embedder) -> None:
    """As published: it is no error, and the text is pooled there."""
    ids = embedder.processor.text_tokenizer(["liver <end_of_text> lesion"])[0]
    plain = embedder.processor.text_tokenizer(["liver lesion"])[0]
    assert (ids == END_OF_TEXT).sum() == 2 and (plain == END_OF_TEXT).sum() == 1
    assert np.isfinite(embedder.embed(texts=["liver <end_of_text> lesion"])).all()


def test_sentence_transformers_take_the_encoder_as_a_module(embedder: Embedder, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from fuselip_core.model.sentence_module import SentenceModule

    pictures = [Image.new("RGB", (32, 32), (level, 50, 100)) for level in (10, 200)]
    texts = ["a nodule", "no finding, seen again"]
    both = [{"image": picture, "text": text} for picture, text in zip(pictures, texts, strict=True)]
    model = sentence_transformers.SentenceTransformer(modules=[SentenceModule(embedder)], device="cpu")
    assert model.get_embedding_dimension() == embedder.width
    model.save(str(tmp_path / "saved"))
    again = sentence_transformers.SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    asked: list[tuple[list[Any], Any, Any]] = [
        (pictures, pictures, None),
        (texts, None, texts),
        (both, pictures, texts),
    ]
    for rows, images, words in asked:
        for each in (model, again):
            assert np.allclose(each.encode(rows), embedder.embed(images, words), atol=1e-5)
    assert model(model[0].preprocess(both))["sentence_embedding"].requires_grad
