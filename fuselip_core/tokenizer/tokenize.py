"""The tokenize stage: every view of every image becomes codes once, and every text ids, so that training reads both.

Shard by shard and resumable, as a pipeline: threads decode ahead of the model, and a shard is written while the next
one is encoded. What lies between two of them is bounded. Each image is decoded once for all of its views.
Legend: N images of a shard, V views, K codes an image, S pixels a side.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from fuselip_core.config import Settings, TokenizeSettings
from fuselip_core.data.shards.in_order import ahead, drawn_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.shards.schemas import IMAGE_SCHEMA
from fuselip_core.data.tokens.writer import TokenStoreWriter, index_pairs, write_manifest
from fuselip_core.distributed import local_device
from fuselip_core.files import replace_folder
from fuselip_core.images import draw_part, random_crop, to_pixels
from fuselip_core.model.processing import TextTokenizer, as_pixels
from fuselip_core.model.titok import TiTok, codebook_id
from fuselip_core.progress import track
from fuselip_core.tokenizer.crops import Uncut

logger = logging.getLogger("fuselip")
EXACT = ("float32", "pillow")
BATCHES_AHEAD = 2  # decoded and waiting for the model
MOST_UNCUT = 2**20  # pixels of a picture that waits for the GPU whole; larger ones are cropped where they are decoded
Shard = tuple[str, int, int]  # split, first row, row after the last

EncodeText = Callable[[str], Sequence[int]]
PREPROCESSING = "RGB, squashed to {size} x {size}, bicubic with antialiasing, 0..1"


def store_identity(
    prepared: PreparedData, codebook: str, tokenizer: TiTok, settings: TokenizeSettings
) -> dict[str, Any]:
    """What the codes depend on; stored in the manifest, where training and evaluation see what they are given."""
    config = tokenizer.config
    return {
        "codebook": codebook,
        "data_version": prepared.manifest["data_version"],
        "preprocessing": PREPROCESSING.format(size=config.image_size),
        "codes_per_image": config.latent_tokens,
        "codebook_size": config.codebook_size,
        "views": settings.views,
        "crop_scale": list(settings.crop_scale),
        "rotation": settings.rotation,
        "contrast": settings.contrast,
        "view_seed": settings.seed,
        "precision": settings.precision,
        "crops": crops_by(settings, next(tokenizer.parameters()).device),
    }


def crops_by(settings: TokenizeSettings, device: torch.device) -> str:
    """Who makes the crops, by `tokenize.crops`: pillow or device. What is turned or varied in contrast is Pillow's."""
    if settings.rotation or settings.contrast:
        return "pillow"
    return ("device" if device.type == "cuda" else "pillow") if settings.crops == "auto" else settings.crops


def views_of(size: int, settings: TokenizeSettings, crops: str) -> Callable[[Image.Image, int], np.ndarray | Uncut]:
    """View 0 is the evaluation view; view v > 0 a random crop drawn from (seed, row, v) alone.

    Pictures become pixels uint8 (V, S, S, 3) or, where the device makes the crops, what it needs for that.
    """

    def draw(image: Image.Image, row: int) -> np.ndarray | Uncut:
        whole = to_pixels(image, size)[None]
        rngs = [np.random.default_rng([settings.seed, row, view]) for view in range(1, settings.views)]
        if crops == "device" and rngs and image.width * image.height <= MOST_UNCUT:
            boxes = [draw_part(image.width, image.height, settings.crop_scale, rng) for rng in rngs]
            return Uncut(whole, np.asarray(image.convert("RGB")), np.array(boxes))
        varied = {"rotation": settings.rotation, "contrast": settings.contrast}
        parts = [random_crop(image, size, settings.crop_scale, rng, **varied)[None] for rng in rngs]
        return np.concatenate([whole, *parts])

    return draw


def tokenize_data(settings: Settings) -> dict[str, Any]:
    """Prepared images and texts → codes and ids in tokens/; returns the number of images and pairs of each split."""
    work = open_tokenizing(settings)
    counts = work.run()
    replace_folder(work.target, settings.artifacts / "tokens")
    return counts


def open_tokenizing(settings: Settings) -> Tokenizing:
    """The work that is to do, or to go on with, in artifacts/work/tokens/; raises FuselipError where input is missing.

    Not in the stage's own folder: DVC empties that before the stage starts, and what a killed run left must survive.
    """
    prepared, source = PreparedData(settings.artifacts / "prepared"), settings.artifacts / "codebook"
    tokenizer = TiTok.load(source).to(local_device())
    identity = store_identity(prepared, codebook_id(source), tokenizer, settings.tokenize)
    encode_text = TextTokenizer(context_length=77).encode  # which cuts nothing
    return Tokenizing(
        prepared, tokenizer, encode_text, settings.tokenize, identity, settings.artifacts / "work" / "tokens"
    )


class Tokenizing:
    """Writes the token store of `prepared` into `target`, resuming a run of the same identity."""

    def __init__(
        self,
        prepared: PreparedData,
        tokenizer: TiTok,
        encode_text: EncodeText,
        settings: TokenizeSettings,
        identity: dict[str, Any],
        target: Path,
    ) -> None:
        self.prepared, self.tokenizer, self.encode_text = prepared, tokenizer.eval(), encode_text
        self.settings, self.identity, self.target = settings, identity, target
        self.device = next(tokenizer.parameters()).device
        self.crops = crops_by(settings, self.device)
        self.equal_codes: float | None = None  # share of codes that faster crops and precision leave as they are

    def run(self) -> dict[str, Any]:
        """All splits, then the manifest; returns the number of images and pairs of each split."""
        kinds = kinds_of(self.prepared)
        counts = {split: self._split(split, kinds) for split in self.prepared.splits}
        write_manifest(self.target, self.identity, kinds)
        return counts if self.equal_codes is None else counts | {"equal_codes": self.equal_codes}

    def writer(self, split: str) -> TokenStoreWriter:
        """Where the codes of a split grow."""
        shape = (self.prepared.row_count(split), self.settings.views, self.tokenizer.config.latent_tokens)
        return TokenStoreWriter(self.target, split, *shape, self.identity)

    def write_shard(self, writer: TokenStoreWriter, start: int, stop: int) -> None:
        """Codes of the images from `start` to before `stop`, on disk on return."""
        for first, codes in self._codes(writer.split, [(start, stop)]):
            writer.write_codes(first, codes)

    def _split(self, split: str, kinds: list[str]) -> dict[str, Any]:
        writer, pairs = self.writer(split), self.prepared.pairs(split)
        counts: dict[str, Any] = {"images": self.prepared.row_count(split), "pairs": pairs.num_rows}
        if writer.finished:
            return counts
        shards = writer.pending(self.settings.rows_per_shard)
        with ThreadPoolExecutor(1, "codes") as disk:
            written: Future[None] | None = None
            for start, codes in track(self._codes(split, shards), f"tokenizing {split} images, shards", len(shards)):
                if written:
                    written.result()
                written = disk.submit(writer.write_codes, start, codes)
            if written:
                written.result()
        finish_split(writer, self.prepared, kinds, self.encode_text, self._blank())
        return counts

    def _codes(self, split: str, shards: Sequence[tuple[int, int]]) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, codes (N, V, K) uint16) of each shard (first row, row after the last)."""
        settings, draw = self.settings, views_of(self.tokenizer.config.image_size, self.settings, self.crops)

        def drawn() -> Iterator[tuple[tuple[int, int], int, list[np.ndarray | Uncut]]]:
            for shard in shards:
                for first, batch in drawn_batches(self.prepared, split, draw, settings.batch_size, *shard):
                    yield shard, first, batch

        with contextlib.closing(ahead(drawn(), BATCHES_AHEAD)) as batches:
            for (start, stop), group in itertools.groupby(batches, key=lambda item: item[0]):
                codes = np.zeros((stop - start, settings.views, self.tokenizer.config.latent_tokens), np.uint16)
                for _, first, batch in group:
                    codes[first - start : first - start + len(batch)] = self._encode(batch)
                yield start, codes

    @torch.inference_mode()
    def _encode(self, batch: Sequence[np.ndarray | Uncut]) -> np.ndarray:
        """N images → codes (N, V, K), a view of all images at a time."""
        if len(plain := [each for each in batch if not isinstance(each, Uncut)]) == len(batch):
            pixels = torch.from_numpy(np.stack(plain)).to(self.device)
        else:
            views = (each.views if isinstance(each, Uncut) else torch.from_numpy(each).to for each in batch)
            pixels = torch.stack([made(self.device) for made in views])
        codes = torch.stack([self._view_codes(pixels[:, view], view) for view in range(pixels.shape[1])], dim=1)
        if self.equal_codes is None and len(codes[0]) > 1 and (self.settings.precision, self.crops) != EXACT:
            self._compare(batch, pixels[:, 1], codes[:, 1])
        return codes.cpu().numpy()

    def _compare(self, batch: Sequence[np.ndarray | Uncut], pixels: torch.Tensor, codes: torch.Tensor) -> None:
        """View 1 of the first batch once more, cut by Pillow and in float32: what the faster ways change."""
        exact = [
            torch.tensor(each.cut_by_pillow(0), device=self.device) if isinstance(each, Uncut) else own
            for each, own in zip(batch, pixels, strict=True)
        ]
        self.equal_codes = float((self._view_codes(torch.stack(exact), 0) == codes).float().mean())
        logger.info(
            "tokenize.precision=%s, crops by %s: %.1f %% of the codes of crops are those of float32 and Pillow",
            *(self.settings.precision, self.crops, 100 * self.equal_codes),
        )

    def _view_codes(self, pixels: torch.Tensor, view: int) -> torch.Tensor:
        """uint8 (N, S, S, 3) → codes (N, K) int64. Codes are compared in float32, or near ones would change places."""
        scaled = as_pixels(pixels, self.device)
        with lower_precision(self.settings.precision if view else "float32", self.device):
            latents = self.tokenizer.encode(scaled)
        return self.tokenizer.quantize.nearest(self.tokenizer.quantize.flatten(latents.float()))

    def _blank(self) -> np.ndarray:
        size = self.tokenizer.config.image_size
        return self._encode([np.zeros((1, size, size, 3), np.uint8)])[0, 0]


@contextlib.contextmanager
def lower_precision(name: str, device: torch.device) -> Iterator[None]:
    """The precision `name` of `tokenize.precision` for what is multiplied within; codes are compared in float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    try:
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def tokenize_texts(prepared: PreparedData, target: Path) -> None:
    """A store of the pairs and texts alone, in `target`, for models that bring their own codes or read pixels."""
    kinds = kinds_of(prepared)
    identity = {
        "data_version": prepared.data_version,
        "codebook": None,
        "views": 1,
        "crop_scale": [1.0, 1.0],
        "view_seed": 0,
    }
    for split in prepared.splits:
        writer = TokenStoreWriter(target, split, prepared.row_count(split), 1, 1, identity)
        if not writer.finished:
            writer.write_codes(0, np.zeros(writer.shape, np.uint16))
            finish_split(writer, prepared, kinds, TextTokenizer(context_length=77).encode, np.zeros(1, np.uint16))
    write_manifest(target, identity, kinds)


def kinds_of(prepared: PreparedData) -> list[str]:
    """Kinds of the pairs of all splits."""
    columns = [prepared.pairs(split).column("kind") for split in prepared.splits]
    return sorted({str(kind) for column in columns for kind in column.unique().to_pylist()})


def finish_split(
    writer: TokenStoreWriter, prepared: PreparedData, kinds: list[str], encode_text: EncodeText, blank: np.ndarray
) -> None:
    """Adds pairs and texts to the codes of a split; blank (K): codes of a black image."""
    split = writer.split
    pairs, concepts = prepared.pairs(split), _concepts(prepared, split)
    columns, texts = index_pairs(pairs, prepared.row_ids(split), kinds, concepts)
    ids = [encode_text(text) for text in track(texts.to_pylist(), f"tokenizing {split} texts")]
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int64)
    flat = np.fromiter((token for text in ids for token in text), np.uint16, count=int(offsets[-1]))
    writer.finish(columns, flat, offsets, texts, blank)


def _concepts(prepared: PreparedData, split: str) -> pa.ChunkedArray:
    """Concepts of each image; a made one has none."""
    batches = prepared.iter_images(split, columns=["concepts"], batch_rows=65536)
    kind = IMAGE_SCHEMA.field("concepts").type
    made = prepared.row_count(split) - prepared.image_count(split)
    return pa.chunked_array([*(batch.column("concepts") for batch in batches), pa.nulls(made, kind)], kind)


def pending_shards(settings: Settings) -> list[Shard]:
    """Shards whose codes are not on disk yet. Opens every split for writing: call it once, before `write_shard`."""
    work = open_tokenizing(settings)
    writers = [work.writer(split) for split in work.prepared.splits]
    rows = settings.tokenize.rows_per_shard
    return [(each.split, *place) for each in writers if not each.finished for place in each.pending(rows)]


def write_shard(settings: Settings, shard: Shard) -> int:
    """Writes the codes of one shard and returns how many images that were; written twice, it is the same."""
    work: Tokenizing = open_tokenizing(settings)
    split, start, stop = shard
    work.write_shard(work.writer(split), start, stop)
    return stop - start
