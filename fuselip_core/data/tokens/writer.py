"""Writes a token store shard by shard, so that an interrupted run can resume and a split is complete or absent.

A split is written to ``<split>.partial``, where every shard of codes gets a marker once it is on disk. A killed process
therefore loses at most the shards it was working on. The folder is renamed once it also contains pairs and texts.

Legend: N images, V views, K codes an image, T unique texts, P pairs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fuselip_core.data.tokens.store import (
    ABSENT,
    ANSWER_TYPES,
    DTYPES,
    MANIFEST,
    Array,
    PairColumns,
    plain_json,
    read_npy_header,
)
from fuselip_core.errors import FuselipError
from fuselip_core.files import find_json, replace_folder, write_json


class TokenStoreWriter:
    """Writes one split of a store, and keeps the finished shards of an interrupted run.

    identity: what the codes depend on (tokenizer, data version, preprocessing, views, ...; JSON values). Shards with
    another identity or shape are deleted. Once one process has opened the split, others may write other shards of it.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        images: int,
        views: int,
        codes_per_image: int,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        self.split = split
        self.shape = (images, views, codes_per_image)
        self.final = Path(folder) / split
        self.partial = Path(folder) / f"{split}.partial"
        self._description = {"shape": list(self.shape), "identity": plain_json(identity or {})}
        self._markers = self.partial / "done"
        if not self.finished:
            self._open_partial()

    @property
    def finished(self) -> bool:
        """Whether the split is complete and of the same identity, so that nothing is left to do."""
        return find_json(self.final / "split.json") == self._description

    @property
    def done_rows(self) -> Array:
        """(N) bool: images whose codes are on disk."""
        done = np.full(self.shape[0], self.finished)
        if not self.finished:
            for marker in self._markers.iterdir():
                start, _, stop = marker.name.partition("-")
                done[int(start) : int(stop)] = True
        return done

    def pending(self, rows_per_shard: int) -> list[tuple[int, int]]:
        """Row ranges (start, stop) of at most `rows_per_shard` images that contain an image without codes."""
        done = self.done_rows
        starts = range(0, self.shape[0], rows_per_shard)
        ranges = [(start, min(start + rows_per_shard, self.shape[0])) for start in starts]
        return [(start, stop) for start, stop in ranges if not done[start:stop].all()]

    def write_codes(self, start_row: int, codes: Array) -> None:
        """Writes codes (n, V, K) of any integer dtype for the images from `start_row` on, and flushes them to disk.

        Raises FuselipError for a shape or value that does not fit.
        """
        stop = start_row + len(codes)
        if codes.shape[1:] != self.shape[1:] or start_row < 0 or stop > self.shape[0]:
            raise FuselipError(
                f"codes {codes.shape} from row {start_row} do not fit split '{self.split}' {self.shape} of the token "
                "store; delete its .partial folder if the data have changed"
            )
        if codes.size and (codes.min() < 0 or codes.max() > np.iinfo(np.uint16).max):
            raise FuselipError(
                f"codes of split '{self.split}' are outside 0..65535, the range of a store; use a smaller codebook"
            )
        data = np.ascontiguousarray(codes, np.uint16).tobytes()
        row_bytes = self.shape[1] * self.shape[2] * 2
        # Not by memory map, so that a full disk raises an error instead of killing the process.
        with (self.partial / "codes.npy").open("r+b") as stream:
            offset = read_npy_header(stream)[2]
            stream.seek(offset + start_row * row_bytes)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        (self._markers / f"{start_row:012d}-{stop:012d}").touch()

    def finish(
        self, pairs: PairColumns, text_ids: Array, text_offsets: Array, strings: Sequence[str] | pa.Array, blank: Array
    ) -> None:
        """Adds pairs and texts, and renames the folder to its final name.

        text_ids: flat ids of the T unique texts, without start, end and padding; text_offsets (T + 1);
        strings: the T texts; blank (K): codes of a black image.
        Raises FuselipError if an image lacks codes, or a pair refers to a row outside the split.
        """
        missing = int((~self.done_rows).sum())
        if missing:
            raise FuselipError(f"{missing} images of split '{self.split}' have no codes yet; run the tokenize stage")
        _check_pairs(pairs, self.shape[0], len(text_offsets) - 1, self.split)
        if len(strings) != len(text_offsets) - 1:
            raise FuselipError(f"{len(strings)} strings do not fit {len(text_offsets) - 1} tokenized texts")
        columns = {name: np.asarray(getattr(pairs, name)).astype(dtype) for name, dtype in DTYPES.items()}
        columns["texts"] = np.asarray(text_ids).astype(np.uint16)
        columns["text_offsets"] = np.asarray(text_offsets).astype(np.int64)
        columns["blank"] = np.asarray(blank).astype(np.uint16)
        for name, column in columns.items():
            _write_array(self.partial / f"{name}.npy", column)
        _write_strings(self.partial / "texts.arrow", strings)
        replace_folder(self.partial, self.final)
        shutil.rmtree(self.final / "done", ignore_errors=True)

    def _open_partial(self) -> None:
        if find_json(self.partial / "split.json") == self._description:
            return
        shutil.rmtree(self.partial, ignore_errors=True)
        self._markers.mkdir(parents=True)
        with (self.partial / "codes.npy").open("wb") as stream:
            header = {"descr": "<u2", "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(stream, header)
            stream.truncate(stream.tell() + int(np.prod(self.shape)) * 2)
        # Last, because it marks the folder as ready for shards.
        write_json(self.partial / "split.json", self._description)


def index_pairs(
    pairs: pa.Table, image_ids: Sequence[str] | pa.Array, kinds: Sequence[str], concepts: pa.Array | None = None
) -> tuple[PairColumns, pa.Array]:
    """Pairs with ids and strings → row indices, and the unique texts (T) in order of first use.

    pairs: as of PreparedData.pairs. image_ids (N), concepts (N, lists of codes): in the order of the images. Raises
    FuselipError for a pair with an unknown image or kind.
    """
    known = _as_array(image_ids)
    strings = pa.chunked_array(
        [chunk for name in ("query_text", "target_text") for chunk in pairs.column(name).cast(pa.string()).chunks],
        pa.string(),
    )
    texts = pc.unique(strings.drop_null())
    columns = {}
    for side in ("query", "target"):
        columns[f"{side}_image"] = _rows_in(pairs.column(f"{side}_image"), known, "image")
        columns[f"{side}_text"] = _rows_in(pairs.column(f"{side}_text"), texts, "text")
    groups = pairs.column("group").cast(pa.string())
    columns["group"] = _rows_in(groups, pc.unique(groups.drop_null()), "group")
    columns["kind"] = _rows_in(pairs.column("kind"), _as_array(kinds), "kind").astype(np.uint8)
    types = _rows_in(pc.fill_null(pairs.column("answer_type").cast(pa.string()), ""), _as_array(ANSWER_TYPES), "answer")
    if concepts is not None:
        columns["alike"] = _alike(columns, concepts)
    return PairColumns(**columns, answer_type=types.astype(np.uint8)), texts


def _alike(columns: Mapping[str, Array], concepts: pa.Array) -> Array:
    """The column `alike` (see PairColumns): row of the first image with the same concepts, or of the image itself."""
    of_image = np.arange(len(concepts), dtype=np.int32)
    first: dict[tuple[str, ...], int] = {}
    for row in np.flatnonzero(pc.fill_null(pc.list_value_length(concepts), 0)):
        of_image[row] = first.setdefault(tuple(sorted(set(concepts[int(row)].as_py()))), int(row))
    image_to_text = (columns["query_image"] >= 0) & (columns["query_text"] < 0) & (columns["target_image"] < 0)
    alike = np.full(len(image_to_text), ABSENT, np.int32)
    alike[image_to_text] = of_image[columns["query_image"][image_to_text]]
    return alike


def write_manifest(folder: Path, identity: Mapping[str, Any], kinds: Sequence[str], **more: Any) -> None:
    """Writes the manifest as the last step of tokenizing: identity, kinds and counts of the finished splits."""
    splits = {}
    for place in sorted(Path(folder).iterdir()):
        if (place / "split.json").is_file() and not place.name.endswith(".partial") and place.name[0] != ".":
            images, views, codes_per_image = find_json(place / "split.json")["shape"]
            pairs = np.load(place / "kind.npy", mmap_mode="r" if (place / "kind.npy").stat().st_size > 128 else None)
            counts = np.bincount(pairs, minlength=len(kinds))
            by_kind = {kind: int(count) for kind, count in zip(kinds, counts, strict=True) if count}
            splits[place.name] = {
                "images": images,
                "views": views,
                "codes_per_image": codes_per_image,
                "pairs": by_kind,
            }
    write_json(Path(folder) / MANIFEST, {**plain_json(identity), "kinds": list(kinds), "splits": splits, **more})


def _check_pairs(pairs: PairColumns, images: int, texts: int, split: str) -> None:
    limits = {"query_image": images, "target_image": images, "query_text": texts, "target_text": texts}
    rows = {len(getattr(pairs, name)) for name in DTYPES}
    if len(rows) != 1:
        raise FuselipError(f"pair columns of split '{split}' have different lengths: {sorted(rows)}")
    for name, limit in limits.items():
        column = np.asarray(getattr(pairs, name))
        if column.size and (column.min() < ABSENT or column.max() >= limit):
            raise FuselipError(f"{name} of split '{split}' is outside 0..{limit - 1}; prepare and tokenize again")


def _rows_in(values: pa.ChunkedArray, known: pa.Array, what: str) -> Array:
    """Index of each value in `known`, ABSENT for null; raises FuselipError for an unknown value."""
    indices = pc.index_in(values.cast(pa.string()), value_set=known, skip_nulls=True)
    lost = pc.and_(pc.is_null(indices), pc.is_valid(values))
    if pc.any(lost).as_py():
        example = values.filter(lost)[0].as_py()
        raise FuselipError(f"a pair names the {what} '{example}', which the prepared data lacks; prepare again")
    return np.asarray(pc.fill_null(indices, ABSENT), np.int32)


def _as_array(values: Sequence[str] | pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    return values.cast(pa.string()) if isinstance(values, pa.Array) else pa.array(values, pa.string())


def _write_array(path: Path, array: Array) -> None:
    with path.open("wb") as stream:
        np.lib.format.write_array(stream, np.ascontiguousarray(array), version=(1, 0))
        stream.flush()
        os.fsync(stream.fileno())


def _write_strings(path: Path, strings: Sequence[str] | pa.Array) -> None:
    """Arrow's file format without compression, so that single strings can be read from a memory map."""
    column = strings if isinstance(strings, pa.ChunkedArray) else pa.chunked_array([_as_array(strings)], pa.string())
    table = pa.table({"text": column})
    with path.open("wb") as stream:
        with pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table, max_chunksize=1 << 16)
        stream.flush()
        os.fsync(stream.fileno())
