"""Where stored texts and prepared images meet a late-fusion model, which reads pixels and no codes.

A picture store is a token store whose codes are rows of a cache of pixels, in the views that were tokenized: so the
baselines see the same pairs, batches, crops and evaluations as the joint encoder. Where such a cache would be too large
its rows are decoded when they are asked for. Legend: B pairs, N images, V views,
S pixels a side, L tokens, W width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import normalize

from fuselip_core.data.shards.in_order import Draw, decoding_threads, pixel_batches
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.joined import Store
from fuselip_core.data.tokens.store import SideTokens, TokenStore
from fuselip_core.encoding.from_codes import StoredEncoder, gather_sides
from fuselip_core.errors import FuselipError
from fuselip_core.files import take_space, write_json
from fuselip_core.images import random_crop, squashed
from fuselip_core.model.compiled import compile_blocks
from fuselip_core.model.late_fusion import LateFusionModel
from fuselip_core.model.processing import CLIP_MEAN, CLIP_STD, as_pixels
from fuselip_core.model.vocabulary import join, text_sequence
from fuselip_core.progress import track

BLACK = -1  # row of the cache that stands for a black image

DrawView = Callable[[Image.Image, int, int], np.ndarray]  # (image, row, view) → uint8 (S, S, 3)


def open_picture_store(folder: Path, split: str, views: int | None = None, first: int = 0) -> TokenStore:
    """A token store with codes (N, V, 1) int32 that are rows of a cache; `first` is the cache's row of its view 0."""
    store = TokenStore(folder, split)
    shape = (store.images, views or store.views, 1)
    codes = np.arange(first, first + shape[0] * shape[1], dtype=np.int32).reshape(shape)
    return store.with_codes(codes, np.array([BLACK], np.int32))


class PictureSource(Protocol):
    """Where a late-fusion model's pixels come from: a cache of them, or image files."""

    device: torch.device
    looks_ahead: bool

    def rows(self, rows: np.ndarray) -> Tensor:
        """Cache rows (B), BLACK allowed → normalised pixels (B, 3, S, S) float32 on the device."""

    def expect(self, rows: np.ndarray) -> None:
        """Says which rows (B) will be asked for next."""


class Pictures:
    """Pixels of images by cache row, over one cache or several behind one another."""

    looks_ahead = False

    def __init__(self, caches: Sequence[np.ndarray], device: torch.device) -> None:
        self._caches, self.device = list(caches), device
        self._starts = np.cumsum([0, *map(len, caches)])[:-1]

    def expect(self, rows: np.ndarray) -> None:
        """Nothing to do: a cache has them already."""

    def rows(self, rows: np.ndarray) -> Tensor:
        """Cache rows (B), BLACK allowed → normalised pixels (B, 3, S, S) float32 on the device."""
        size = self._caches[0].shape[1]
        picked = np.zeros((len(rows), size, size, 3), np.uint8)
        cache_of = np.searchsorted(self._starts, rows, side="right") - 1
        for number, cache in enumerate(self._caches):
            chosen = np.flatnonzero((cache_of == number) & (rows >= 0))
            picked[chosen] = cache[rows[chosen] - self._starts[number]]
        return normalised(picked, self.device)


def normalised(pixels: np.ndarray, device: torch.device) -> Tensor:
    """uint8 (B, S, S, 3) → float32 (B, 3, S, S) on `device`, as the towers take it."""
    return normalize(as_pixels(pixels, device), list(CLIP_MEAN), list(CLIP_STD))


@dataclass(frozen=True)
class PictureSides:
    """Sides of pairs: cache rows of the images there are, which rows those are of all sides, and texts (2B, L)."""

    images: np.ndarray
    has_image: Tensor
    text_ids: Tensor
    sizes: tuple[int, ...]
    hidden: int = 0  # the baselines predict no tokens


class PicturePairs:
    """A late-fusion model on pixels and stored texts; see PairEncoder."""

    def __init__(self, model: LateFusionModel, store: Store, pictures: PictureSource) -> None:
        self.model, self.store, self.pictures = model, store, pictures
        self.looks_ahead = pictures.looks_ahead

    def compile(self, pairs: int, graphs: bool) -> None:
        """See PairEncoder: block by block, for any number of tokens."""
        compile_blocks(self.model)

    def expect(self, rows: np.ndarray, view_rng: np.random.Generator, parts: int) -> None:
        """See PairEncoder."""
        sides = [side for part in np.array_split(rows, parts) for side in gather_sides(self.store, part, view_rng)]
        self.pictures.expect(np.concatenate([side.codes[side.has_image, 0] for side in sides]))

    def inputs(self, rows: np.ndarray, view_rng: np.random.Generator) -> PictureSides:
        """Pair rows (B) → their images' cache rows and texts."""
        return picture_sides(gather_sides(self.store, rows, view_rng), self.model.config.context_length)

    def encode(self, inputs: PictureSides) -> tuple[Tensor, Tensor, Tensor]:
        """See PairEncoder; the masked loss is 0."""
        query, target = encode_pictures(self.model, inputs, self.pictures)
        return query, target, torch.zeros((), device=self.pictures.device)


class PictureEncoder(StoredEncoder):
    """A late-fusion model on a picture store."""

    def __init__(self, model: LateFusionModel, pictures: PictureSource) -> None:
        super().__init__(model)
        self.pictures = pictures

    def _embeddings(self, side: SideTokens) -> Tensor:
        inputs = picture_sides([side], self.model.config.context_length)
        return encode_pictures(self.model, inputs, self.pictures)[0]


def picture_sides(sides: Sequence[SideTokens], context_length: int) -> PictureSides:
    """Sides of pairs → what a late-fusion model reads of them; a row without a text has the empty text."""
    images = np.concatenate([side.codes[side.has_image, 0] for side in sides]).astype(np.int64)
    texts = [_texts(side, context_length) for side in sides]
    longest = max(text.shape[1] for text in texts)
    text_ids = torch.cat([torch.nn.functional.pad(text, (0, longest - text.shape[1])) for text in texts])
    has_image = torch.from_numpy(np.concatenate([np.asarray(side.has_image) for side in sides]))
    return PictureSides(images, has_image, text_ids, tuple(map(len, sides)))


def encode_pictures(model: LateFusionModel, inputs: PictureSides, pictures: PictureSource) -> tuple[Tensor, ...]:
    """Embeddings (B, W) of each side; all images go through their tower at once, and so do all texts."""
    device = pictures.device
    output = model(pictures.rows(inputs.images), inputs.text_ids.to(device), inputs.has_image.to(device))
    return output.embeddings.split(list(inputs.sizes))


def _texts(side: SideTokens, context_length: int) -> Tensor:
    ids, lengths = (torch.from_numpy(np.asarray(each).astype(np.int64)) for each in (side.text_ids, side.text_lengths))
    return join(None, text_sequence(ids, lengths), context_length)


def baseline_views(size: int, manifest: Mapping[str, Any], views: int) -> Draw:
    """All views of an image behind one another; see `baseline_view`."""
    draw_view = baseline_view(size, manifest)
    return lambda image, row: np.stack([draw_view(image, row, view) for view in range(views)])


def baseline_view(size: int, manifest: Mapping[str, Any]) -> DrawView:
    """The views that were tokenized, in the baselines' own preprocessing: squashed before it becomes RGB."""

    def draw(image: Image.Image, row: int, view: int) -> np.ndarray:
        if view == 0:
            return squashed(image, size)
        rng = np.random.default_rng([manifest["view_seed"], row, view])
        varied = {name: manifest.get(name, 0.0) for name in ("rotation", "contrast")}
        return random_crop(image, size, tuple(manifest["crop_scale"]), rng, **varied)

    return draw


def cache_pictures(
    path: Path, prepared: PreparedData, manifest: Mapping[str, Any], split: str, size: int, views: int
) -> np.ndarray:
    """Pixels (N * V, S, S, 3) uint8 of a split's images in the order of its token store, memory-mapped from `path`.

    Made once: a file that is there and of the same images and views is used as it is. Raises FuselipError where the
    prepared data are not those that were tokenized.
    """
    require_tokenized(prepared, manifest)
    identity = {
        name: manifest.get(name) for name in ("data_version", "crop_scale", "rotation", "contrast", "view_seed")
    }
    identity |= {"split": split, "size": size, "views": views}
    marker = path.with_suffix(".json")
    if not _is_whole(marker, path, identity):
        marker.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        count = prepared.row_count(split)
        pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(count * views, size, size, 3))
        take_space(path)
        batches = pixel_batches(prepared, split, baseline_views(size, manifest, views), batch_rows=256)
        for first, batch in track(batches, f"decoding {split} images", total=-(-count // 256)):
            pixels[first * views : (first + len(batch)) * views] = batch.reshape(-1, size, size, 3)
        pixels.flush()
        write_json(marker, identity)
    mapped: np.ndarray = np.load(path, mmap_mode="r")
    return mapped


def require_tokenized(prepared: PreparedData, manifest: Mapping[str, Any]) -> None:
    """Raises FuselipError where the prepared data are not those of the token store's `manifest`."""
    if prepared.data_version != manifest["data_version"]:
        raise FuselipError(f"{prepared.folder} is not what was tokenized; run the tokenize stage again")


def _is_whole(marker: Path, path: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return path.is_file() and bool(json.loads(marker.read_text(encoding="utf-8")) == dict(identity))
    except (OSError, ValueError):
        return False


class PictureFiles(Protocol):
    """Pictures by row (data/shards/by_row.py)."""

    def __len__(self) -> int: ...

    def picture(self, row: int) -> Image.Image: ...


class DecodedPictures:
    """Pixels by number, as pictures.Pictures has them; of several sources behind one another.

    A source is its image files with `views` pictures each, numbered row * V + view; `draw` makes a picture of one.
    """

    looks_ahead = True

    def __init__(self, sources: Sequence[tuple[PictureFiles, int, DrawView]], size: int, device: torch.device) -> None:
        self._sources, self._size, self.device = list(sources), size, device
        self._starts = np.cumsum([0, *(len(files) * views for files, views, _ in sources)])[:-1]
        self._pool = decoding_threads()
        self._held: dict[int, Future[np.ndarray]] = {}  # of the batch at hand and the next
        self._expected: set[int] = set()

    def expect(self, numbers: np.ndarray) -> None:
        """Begins to decode the pictures of the next batch; those before the one at hand are forgotten."""
        coming = {int(number) for number in numbers if number != BLACK}
        self._held = {number: job for number, job in self._held.items() if number in self._expected | coming}
        for number in sorted(coming - self._held.keys()):
            self._held[number] = self._pool.submit(self._decoded, number)
        self._expected = coming

    def rows(self, numbers: np.ndarray) -> Tensor:
        """Numbers (B), BLACK allowed → normalised pixels (B, 3, S, S) float32 on the device."""
        wanted = {int(number) for number in numbers if number != BLACK}
        jobs = {n: self._held.get(n) or self._pool.submit(self._decoded, n) for n in sorted(wanted)}
        picked = np.zeros((len(numbers), self._size, self._size, 3), np.uint8)
        for place, number in enumerate(numbers):
            if number != BLACK:
                picked[place] = jobs[int(number)].result()
        return normalised(picked, self.device)

    def _decoded(self, number: int) -> np.ndarray:
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        files, views, draw = self._sources[source]
        row, view = divmod(number - int(self._starts[source]), views)
        return draw(files.picture(row), row, view)
