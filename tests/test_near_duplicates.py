"""Pictures that look like a held-out one stay out of training; those that only resemble it stay in."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from fuselip_core.config import PrepareSettings
from fuselip_core.data.prepare.near_duplicates import HeldOutIndex, fingerprint
from fuselip_core.data.prepare.prepare import prepare_data


def scene(seed: int, side: int = 96) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (7, 7), dtype=np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def variants(image: Image.Image) -> dict[str, bytes]:
    return {
        "pressed": jpeg(image, 40),
        "scaled": jpeg(image.resize((70, 70), Image.Resampling.BICUBIC)),
        "brighter": jpeg(ImageEnhance.Brightness(image).enhance(1.1)),
        "colour": jpeg(image.convert("RGB")),
    }


def build(folder: Path, count: int) -> HeldOutIndex:
    prints = [fingerprint(scene(seed)) for seed in range(count)]
    digests = [f"{seed:064x}" for seed in range(count)]
    bits = np.array([item.bits for item in prints], dtype=np.uint64)
    HeldOutIndex.build(folder, digests, bits, np.array([item.thumbnail for item in prints]))
    return HeldOutIndex(folder)


def test_the_index_finds_what_a_scan_over_all_finds(tmp_path: Path) -> None:
    index = build(tmp_path / "index", 300)
    assert index.has(f"{7:064x}") and not index.has(f"{300:064x}")
    for seed in range(0, 300, 7):
        assert all(index.has_near(fingerprint(Image.open(io.BytesIO(data)))) for data in variants(scene(seed)).values())
    assert not any(index.has_near(fingerprint(scene(seed))) for seed in range(1000, 1200))
    assert not index.has_near(fingerprint(Image.new("L", (50, 50)))), "an empty frame is like no other"


def test_radiographs_of_one_region_are_told_apart(shared: Path, tmp_path: Path) -> None:
    """Real pictures: no two cases of MedPix look the same to it, however alike they are."""
    with zipfile.ZipFile(shared / "data" / "medpix-rocov2" / "train_images.zip") as archive:
        names = [name for name in archive.namelist() if name.endswith(".jpg")][::6]
        prints = {name: fingerprint(Image.open(io.BytesIO(archive.read(name)))) for name in names}
    held = {name for number, name in enumerate(names) if number % 2}
    bits = np.array([prints[name].bits for name in sorted(held)], dtype=np.uint64)
    thumbnails = np.array([prints[name].thumbnail for name in sorted(held)])
    HeldOutIndex.build(tmp_path / "index", ["0" * 64] * len(held), bits, thumbnails)
    index = HeldOutIndex(tmp_path / "index")
    case = {name: Path(name).name.split("_")[0] for name in names}
    held_cases = {case[name] for name in held}
    others = [name for name in names if name not in held and case[name] not in held_cases]
    assert len(others) > 30
    assert not [name for name in others if index.has_near(prints[name])]
    assert all(index.has_near(prints[name]) for name in held)


@pytest.mark.parametrize("choice", ["drop", "keep"])
def test_look_alikes_stay_out_of_training(tmp_path: Path, choice: str) -> None:
    root = tmp_path / "raw"
    root.mkdir()
    train = {f"near_{name}": data for name, data in variants(scene(1)).items()}
    train |= {"same": jpeg(scene(2)), **{f"other_{seed}": jpeg(scene(seed)) for seed in range(50, 60)}}
    for split, pictures in (("train", train), ("test", {"a": jpeg(scene(1)), "b": jpeg(scene(2))})):
        with zipfile.ZipFile(root / f"{split}_images.zip", "w") as archive:
            for name, data in pictures.items():
                archive.writestr(f"{split}/{name}.jpg", data)
        captions = "".join(f"{name},a scan of {name}\n" for name in pictures)
        (root / f"{split}_captions.csv").write_text(f"ID,Caption\n{captions}")
    fields = {"source": "rocov2", "root": root, "workers": 1, "near_duplicates": choice}
    manifest = prepare_data(PrepareSettings.model_validate(fields), tmp_path / "out")
    near = len(variants(scene(1))) if choice == "drop" else 0
    assert manifest["duplicates"]["across_splits_near_left_out"] == near
    assert manifest["duplicates"]["across_splits_left_out"] == 1
    assert manifest["counts"]["train"]["images"] == len(train) - near - 1
