"""Measures the tokenize stage against the image tokenizer alone: how much decoding and storing cost beside it.

    python benchmarks/tokenize.py [--size small] [--images 192] [--rounds 3] [--threads 2] [--out FILE]

stage       the stage's own code from prepared JPEG files to a finished token store: decode, squash, encode, write
tokenizer   the same number of images through the tokenizer, in batches of the same size, pixels at hand
decoding    JPEG files to pixels with the stage's threads, nothing else

They take turns; medians count. `fraction_of_tokenizer` is the stage's rate over the tokenizer's. The last line is one
JSON object.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called like this file

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import finish, in_rounds, machine, medians, parser_of, peak_memory_mb, spread, table, timed
from workload import captions, pictures

from fuselip_core.config import PrepareSettings, TokenizeSettings
from fuselip_core.data.prepare.prepare import prepare_data
from fuselip_core.data.shards.in_order import evaluation_view, pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.processing import TextTokenizer, as_pixels
from fuselip_core.model.titok import TiTok
from fuselip_core.tokenizer.tokenize import Tokenizing, store_identity


def prepared_images(folder: Path, count: int) -> PreparedData:
    """`count` pictures with captions, through prepare."""
    raw = folder / "raw" / "train"
    raw.mkdir(parents=True)
    for number, (data, text) in enumerate(zip(pictures(count), captions(count), strict=True)):
        (raw / f"{number:06d}.jpg").write_bytes(data)
        (raw / f"{number:06d}.jpg.txt").write_text(text, encoding="utf-8")
    settings = PrepareSettings.model_validate(
        {"source": "rocov2", "root": folder / "raw", "shared_images": "keep", "near_duplicates": "keep", "workers": 1}
    )
    prepare_data(settings, folder / "prepared")
    return PreparedData(folder / "prepared")


class Bench:
    """A tokenizer with random weights, as fast as a trained one, and images."""

    def __init__(self, size: str, images: int, batch: int, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.images, self.batch, self.folder = images, batch, folder
        torch.manual_seed(0)
        self.tokenizer = TiTok(tokenizer_config(size)).to(self.device).eval()
        self.prepared = prepared_images(folder, images)
        self.encode_text = TextTokenizer(context_length=77).encode
        self.targets = (folder / f"tokens-{number}" for number in itertools.count())
        side = self.tokenizer.config.image_size
        self.pixels = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)

    def stage(self) -> None:
        settings = TokenizeSettings.model_validate({"batch_size": self.batch})
        identity = store_identity(self.prepared, "benchmark", self.tokenizer, settings)
        Tokenizing(self.prepared, self.tokenizer, self.encode_text, settings, identity, next(self.targets)).run()

    @torch.inference_mode()
    def alone(self) -> None:
        for start in range(0, self.images, self.batch):
            self.tokenizer.codes(as_pixels(self.pixels[: self.images - start], self.device)).cpu()

    def decoding(self) -> None:
        draw = evaluation_view(self.tokenizer.config.image_size)
        for _ in pixel_batches(self.prepared, "train", draw, self.batch):
            pass


def measure(size: str, images: int, batch: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(size, images, batch, Path(name))
        # First calls load tables and choose kernels.
        bench.tokenizer.codes(as_pixels(bench.pixels, bench.device))
        bench.encode_text("first")
        variants = {"stage": bench.stage, "tokenizer": bench.alone, "decoding": bench.decoding}
        seconds = in_rounds({name: timed(work) for name, work in variants.items()}, rounds)
    middle = medians(seconds)
    return {
        "images_per_second": {name: round(images / value, 2) for name, value in middle.items()},
        "fraction_of_tokenizer": round(middle["tokenizer"] / middle["stage"], 3),
        "spread": {name: round(spread(values), 2) for name, values in seconds.items()},
        "peak_memory_mb": peak_memory_mb(),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=("tiny", "small", "base"), default="small")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="Threads of torch; all cores if not given.")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    settings = {"size": given.size, "images": given.images, "batch": given.batch}
    result = settings | machine() | measure(given.size, given.images, given.batch, given.rounds)
    print(table(["variant", "images/s"], list(result["images_per_second"].items())))
    print(f"\nthe stage runs at {100 * result['fraction_of_tokenizer']:.0f} % of the tokenizer alone")
    finish(result, given.out)


if __name__ == "__main__":
    main()
