"""Images as codes and texts as token ids, made once and memory-mapped: (N, views, K) uint16, 256 bytes a view.

Legend: B pairs of a batch, N images, V views, K codes an image, T unique texts, P pairs, L longest text of the batch.

Codes are the image tokenizer's own indices, never joint ids, which all shift by one if the mask token is enabled. A
store is a folder with ``manifest.json`` and one folder for each split, written by ``writer.py``.
"""

from __future__ import annotations

import copy
import json
import mmap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import find_json

ABSENT = -1  # row index of a side without image, or without text
ANSWER_TYPES = ("", "closed", "open")  # index = code in the answer_type column
# Mapped pages are released after this many rows, or the whole store would count towards the memory of a long run.
ROWS_BETWEEN_RELEASES = 1 << 16
MANIFEST = "manifest.json"

Array = npt.NDArray[Any]
SideName = Literal["query", "target"]


@dataclass(frozen=True)
class SideTokens:
    """One side of B pairs. Codes of a side without image are 0; texts are padded with 0 to the longest.

    codes (B, K) uint16, has_image (B) bool, text_ids (B, L) uint16 without start and end, text_lengths (B) int32.
    """

    codes: Array
    has_image: Array
    text_ids: Array
    text_lengths: Array

    def __len__(self) -> int:
        return len(self.has_image)

    def part(self, rows: slice | Array) -> SideTokens:
        """The chosen rows, padded to their own longest text."""
        lengths = self.text_lengths[rows]
        longest = int(lengths.max(initial=0))
        return SideTokens(self.codes[rows], self.has_image[rows], self.text_ids[rows, :longest], lengths)

    def with_codes(self, codes: Array) -> SideTokens:
        """A copy with other codes, (B, K) or (K) uint16 for all rows."""
        return replace(self, codes=np.broadcast_to(codes, self.codes.shape))


@dataclass(frozen=True)
class PairColumns:
    """Row indices of P pairs; ABSENT if a side lacks the part.

    query_image, query_text, target_image, target_text, group: (P) int32; kind, answer_type: (P) uint8.
    alike (P) int32: image → text pairs with the same number are right for each other, because they have the same image
    or images with the same concepts; ABSENT for all other pairs, and for all pairs in stores without this column.
    """

    query_image: Array
    query_text: Array
    target_image: Array
    target_text: Array
    kind: Array
    group: Array
    answer_type: Array
    alike: Array = field(default_factory=lambda: np.array(ABSENT, np.int32))

    def __post_init__(self) -> None:
        object.__setattr__(self, "alike", np.broadcast_to(self.alike, np.shape(self.kind)))


DTYPES = {column.name: np.dtype(np.int32) for column in fields(PairColumns)} | {
    "kind": np.dtype(np.uint8),
    "answer_type": np.dtype(np.uint8),
}


class TokenStore:
    """A finished split, read-only. Opening reads only headers.

    codes (N, V, K) uint16, texts (sum of lengths) uint16, text_offsets (T + 1) int64, blank (K) uint16 (codes of a
    black image), pairs: the columns, kinds: names of the kind codes, manifest: the store's manifest.
    Raises FuselipError if the store is missing or incomplete, or if split and manifest are of different runs.
    """

    def __init__(self, folder: Path, split: str) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = read_manifest(self.folder)
        self.kinds: tuple[str, ...] = tuple(self.manifest["kinds"])
        place = self.folder / split
        if not (place / "split.json").is_file():
            raise FuselipError(f"{folder} has no split '{split}'; run the tokenize stage on data that has one")
        _check_split(place, self.manifest)
        self._maps: list[mmap.mmap] = []
        self._rows_read = 0
        self._strings: pa.ChunkedArray | None = None
        self.codes = self._map(place / "codes.npy")
        self.texts = self._map(place / "texts.npy")
        self.text_offsets = self._map(place / "text_offsets.npy")
        self.blank = np.array(self._map(place / "blank.npy"))
        there = [name for name in DTYPES if name != "alike" or (place / "alike.npy").is_file()]
        self.pairs = PairColumns(**{name: self._map(place / f"{name}.npy") for name in there})

    def __len__(self) -> int:
        return len(self.pairs.kind)

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self.codes.shape[0])

    @property
    def views(self) -> int:
        """Number of views of an image; view 0 is for evaluation."""
        return int(self.codes.shape[1])

    @property
    def codes_per_image(self) -> int:
        """Number of codes of a view."""
        return int(self.codes.shape[2])

    def rows_of(self, kind: str) -> Array:
        """Pair rows of a kind, uint32 ascending; raises FuselipError, which lists the known kinds, for no pair."""
        rows = np.zeros(0, np.uint32)
        if kind in self.kinds:
            rows = np.flatnonzero(self.pairs.kind == self.kinds.index(kind)).astype(np.uint32)
        if not len(rows):
            counts = np.bincount(self.pairs.kind, minlength=len(self.kinds))
            there = [f"{name} ({count})" for name, count in zip(self.kinds, counts, strict=True) if count]
            raise FuselipError(
                f"no pairs of kind '{kind}' in split '{self.split}' of {self.folder}; "
                f"there are: {', '.join(there) or 'none at all'}"
            )
        return rows

    def texts_of(self, rows: Iterable[int]) -> list[str]:
        """Strings of text rows; "" for ABSENT."""
        if self._strings is None:
            path = self.folder / self.split / "texts.arrow"
            try:
                with pa.memory_map(str(path)) as source:
                    self._strings = pa.ipc.open_file(source).read_all().column("text")
            except (OSError, pa.ArrowException, KeyError) as error:
                raise self._damaged(path, error) from error
        wanted = pa.array([None if row < 0 else int(row) for row in rows], pa.int64())
        return [text or "" for text in self._strings.take(wanted).to_pylist()]

    def with_codes(self, codes: Array, blank: Array) -> TokenStore:
        """A copy with other codes (N, V, K) of any integer type, and those (K) of a black image."""
        other = copy.copy(self)
        other.codes, other.blank = codes, blank
        return other

    def with_texts(self, texts: Array, offsets: Array) -> TokenStore:
        """A copy with other ids of the T texts: flat, of any integer type, and offsets (T + 1)."""
        other = copy.copy(self)
        other.texts, other.text_offsets = texts, offsets
        return other

    def release(self) -> None:
        """Releases mapped pages to the system, which keeps them in its page cache while there is room."""
        for mapped in self._maps:
            mapped.madvise(mmap.MADV_DONTNEED)

    def count_rows(self, rows: int) -> None:
        """Counts rows read, and releases mapped pages from time to time."""
        self._rows_read += rows
        if self._rows_read >= ROWS_BETWEEN_RELEASES:
            self._rows_read = 0
            self.release()

    def _map(self, path: Path) -> Array:
        try:
            with path.open("rb") as stream:
                shape, dtype, offset = read_npy_header(stream)
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            array: Array = np.ndarray(shape, dtype, buffer=mapped, offset=offset)
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(path, error) from error
        self._maps.append(mapped)
        return array

    def _damaged(self, path: Path, error: Exception) -> FuselipError:
        reason = one_line(error)[:200]
        return FuselipError(f"{path} is damaged ({reason}); delete {self.folder} and tokenize again")


def gather(
    store: TokenStore, pair_rows: Array, side: SideName, view_rng: np.random.Generator | None = None
) -> SideTokens:
    """One side of the pairs `pair_rows` (B, any integer dtype), vectorised.

    Images in view 0, or with `view_rng` each in a random view.
    """
    columns = store.pairs
    images = (columns.query_image if side == "query" else columns.target_image)[pair_rows]
    texts = (columns.query_text if side == "query" else columns.target_text)[pair_rows]
    store.count_rows(len(images))
    views = 0 if view_rng is None else view_rng.integers(0, store.views, len(images))
    codes, has_image = gather_codes(store, images, views)
    text_ids, text_lengths = gather_texts(store, texts)
    return SideTokens(codes, has_image, text_ids, text_lengths)


def gather_codes(store: TokenStore, images: Array, views: Array | int = 0) -> tuple[Array, Array]:
    """Image rows (B), ABSENT allowed → codes (B, K) uint16 (0 if absent), has_image (B) bool."""
    has_image = images >= 0
    if not has_image.any():
        return np.zeros((len(images), store.codes_per_image), np.uint16), has_image
    codes = store.codes[np.maximum(images, 0), views]
    if not has_image.all():
        codes[~has_image] = 0
    return codes, has_image


def gather_texts(store: TokenStore, rows: Array) -> tuple[Array, Array]:
    """Text rows (B), ABSENT allowed → ids (B, L) of the store's type, padded with 0, and their lengths (B) int32."""
    has_text = rows >= 0
    if not has_text.any():
        return np.zeros((len(rows), 0), np.uint16), np.zeros(len(rows), np.int32)
    present = np.maximum(rows, 0).astype(np.int64)
    starts = store.text_offsets[present]
    lengths = np.where(has_text, store.text_offsets[present + 1] - starts, 0)
    places = np.arange(int(lengths.max()))
    inside = places < lengths[:, None]
    ids = np.zeros(inside.shape, store.texts.dtype)
    ids[inside] = store.texts[(starts[:, None] + places)[inside]]
    return ids, lengths.astype(np.int32)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store; raises FuselipError if there is none."""
    manifest = find_json(Path(folder) / MANIFEST)
    if "kinds" not in manifest:
        raise FuselipError(f"{folder} holds no finished token store; run the tokenize stage first")
    return manifest


def plain_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """`content` after a round trip through JSON: tuples become lists, and paths strings."""
    plain: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return plain


def _check_split(place: Path, manifest: Mapping[str, Any]) -> None:
    """Raises FuselipError for a split that was tokenized again but whose manifest is still the old one."""
    identity = find_json(place / "split.json").get("identity")
    if not isinstance(identity, dict):
        raise FuselipError(f"{place / 'split.json'} is damaged; delete {place.parent} and tokenize again")
    other = [name for name, value in identity.items() if manifest.get(name) != value]
    if other:
        raise FuselipError(
            f"{place} and {place.parent / MANIFEST} differ in {', '.join(other)}: "
            "tokenizing was interrupted; run the tokenize stage again"
        )


def read_npy_header(stream: Any) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    np.lib.format.read_magic(stream)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if fortran_order:
        raise ValueError("columns must be stored row by row")
    return shape, dtype, stream.tell()
