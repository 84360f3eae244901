"""A small prepared data set and settings for tests of training: four kinds of pictures and their names."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from fuselip_core.config import Settings, check_settings

SHAPES = ("left", "right", "top", "bottom")


def draw(shape: str, rng: np.random.Generator) -> Image.Image:
    """A dark square picture, one half of which is bright."""
    pixels = rng.integers(0, 40, (32, 32), dtype=np.uint8)
    half = {
        "left": np.s_[:, :16],
        "right": np.s_[:, 16:],
        "top": np.s_[:16],
        "bottom": np.s_[16:],
    }[shape]
    pixels[half] += 180
    return Image.fromarray(pixels)


def write_raw(folder: Path, train: int = 48, held_out: int = 16) -> None:
    """A data set in ROCOv2's layout, with questions as the sample has them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    with _table(folder / "license_information.csv", "ID", "PMCID", "Attribution", "Link") as licence:
        for split, count in (("train", train), ("valid", held_out), ("test", held_out)):
            names = [f"ROCOv2_2023_{split}_{number:06d}" for number in range(1, count + 1)]
            shapes = [SHAPES[number % 4] for number in range(count)]
            _write_split(folder, split, names, shapes, rng)
            for name in names:
                licence.writerow([name, f"PMC{split}{name[-6:]}", "nobody", "none"])
    with _table(folder / "cui_mapping.csv", "CUI", "Canonical name") as mapping:
        mapping.writerow(["C0040405", "X-Ray Computed Tomography"])


def _write_split(folder: Path, split: str, names: list[str], shapes: list[str], rng: np.random.Generator) -> None:
    with zipfile.ZipFile(folder / f"{split}_images.zip", "w") as archive:
        for name, shape in zip(names, shapes, strict=True):
            stream = io.BytesIO()
            draw(shape, rng).save(stream, "JPEG", quality=92)
            archive.writestr(f"{split}/{name}.jpg", stream.getvalue())
    rows = list(zip(names, shapes, strict=True))
    with _table(folder / f"{split}_captions.csv", "ID", "Caption") as captions:
        captions.writerows([name, f"The {shape} half is bright, seen in {name[-3:]}."] for name, shape in rows)
    with _table(folder / f"{split}_questions.csv", "ID", "Question", "Answer") as questions:
        questions.writerows([name, "Which half is bright?", shape] for name, shape in rows)
    for kind in ("concepts", "concepts_manual"):
        with _table(folder / f"{split}_{kind}.csv", "ID", "CUIs") as concepts:
            concepts.writerows([name, "C0040405"] for name, _ in rows)


def write_sugarcrepe(folder: Path) -> None:
    """Two of SugarCrepe's lists in their published form, about four pictures."""
    (folder / "val2017").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for number, shape in enumerate(SHAPES):
        draw(shape, rng).save(folder / "val2017" / f"{number:012d}.jpg")
    for name in ("add_att", "swap_obj"):
        rows = {
            str(number): {
                "filename": f"{number:012d}.jpg",
                "caption": f"The {shape} half is bright.",
                "negative_caption": f"The {SHAPES[(number + 1) % 4]} half is bright.",
            }
            for number, shape in enumerate(SHAPES)
        }
        (folder / f"{name}.json").write_text(json.dumps(rows))


class _table:
    """A CSV file with a header, for `with`."""

    def __init__(self, path: Path, *header: str) -> None:
        self._stream = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._stream)
        self._writer.writerow(header)

    def __enter__(self):
        return self._writer

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def small_settings(raw: Path, artifacts: Path, **train: object) -> Settings:
    """Settings of a run that takes seconds."""
    return check_settings(
        {
            "artifacts": artifacts,
            "prepare": {"root": raw, "workers": 1},
            "codebook": {"steps": 6, "batch_size": 8},
            "tokenize": {"views": 2},
            "train": {
                "steps": 12,
                "batch_size": 8,
                "mixture": {"caption": 0.5, "vqa": 0.5},
                "checkpoint_every": 2,
                "validate_every": 6,
                **train,
            },
        },
        origin="test",
    )
