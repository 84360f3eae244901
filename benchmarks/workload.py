"""Captions, pictures and token stores to measure with: real ones where ../shared has them, made-up ones elsewhere."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from measure import SHARED
from PIL import Image

from fuselip_core.data.tokens.store import ABSENT, DTYPES, PairColumns
from fuselip_core.data.tokens.writer import TokenStoreWriter, write_manifest

CAPTIONS = SHARED / "roco-captions" / "captions.txt"
PICTURES = SHARED / "medpix-rocov2" / "train_images.zip"
IDENTITY = {"made_by": "benchmarks"}
# Of those captions: log-normal with a median of 28 tokens, 77 at the 95th percentile.
LOG_MEDIAN, LOG_SPREAD = np.log(28), np.log(77 / 28) / 1.645
WORDS = (
    "axial",
    "computed",
    "tomography",
    "of",
    "the",
    "chest",
    "shows",
    "a",
    "mass",
    "in",
    "left",
    "upper",
    "lobe",
    "arrow",
)


def captions(count: int, seed: int = 0) -> list[str]:
    """Real radiology captions in random order, or made-up ones of the same lengths."""
    rng = np.random.default_rng(seed)
    if CAPTIONS.is_file():
        lines = CAPTIONS.read_text(encoding="utf-8").splitlines()
        return [lines[row] for row in rng.choice(len(lines), count, replace=count > len(lines))]
    lengths = np.exp(rng.normal(LOG_MEDIAN, LOG_SPREAD, count)).round().clip(1, 300).astype(int)
    return [" ".join(rng.choice(WORDS, length)) for length in lengths]


def pictures(count: int) -> list[bytes]:
    """JPEG files of real radiology images (at most 448 pixels a side), or of made-up ones."""
    if PICTURES.is_file():
        with zipfile.ZipFile(PICTURES) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            real = [archive.read(name) for name in names[:count]]
        return [real[number % len(real)] for number in range(count)]
    return [_made_up_picture(seed) for seed in range(count)]


def _made_up_picture(seed: int, side: int = 448) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def caption_columns(count: int) -> PairColumns:
    """Pair i is image i and text i."""
    rows = np.arange(count, dtype=np.int32)
    absent = np.full(count, ABSENT, np.int32)
    values = {"query_image": rows, "target_text": rows, "query_text": absent, "target_image": absent, "group": rows}
    zeros = {name: np.zeros(count, dtype) for name, dtype in DTYPES.items()}
    return PairColumns(**(zeros | values))


def write_caption_store(folder: Path, texts: list[list[int]], codes_per_image: int, codebook_size: int) -> None:
    """A store with the split "train": one caption pair a text (its ids), random codes, one view."""
    count = len(texts)
    rng = np.random.default_rng(1)
    writer = TokenStoreWriter(folder, "train", count, 1, codes_per_image, IDENTITY)
    writer.write_codes(0, rng.integers(0, codebook_size, (count, 1, codes_per_image), dtype=np.uint16))
    offsets = np.cumsum([0, *map(len, texts)])
    flat = np.fromiter((token for text in texts for token in text), np.uint16, count=int(offsets[-1]))
    blank = np.zeros(codes_per_image, np.uint16)
    writer.finish(caption_columns(count), flat, offsets, [str(row) for row in range(count)], blank)
    write_manifest(folder, IDENTITY, ["caption"])
