"""Text lengths, modalities and image sizes of a prepared data set, in one pass with one batch in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fuselip_core.data.shards.reader import PreparedData

SIDES = ("query_text", "target_text")
UNKNOWN = "not stated"


@dataclass
class Lengths:
    """Histogram of the number of words in a text."""

    counts: Counter[int] = field(default_factory=Counter)

    def summary(self) -> dict[str, float]:
        """Number of texts, and minimum, median, mean, 95th percentile and maximum of their words."""
        words = np.array(sorted(self.counts))
        texts = np.array([self.counts[count] for count in words])
        ends = np.cumsum(texts)
        at = {share: int(words[np.searchsorted(ends, share * ends[-1])]) for share in (0.5, 0.95)}
        return {
            "texts": int(ends[-1]),
            "least": int(words[0]),
            "median": at[0.5],
            "mean": float((words * texts).sum() / ends[-1]),
            "p95": at[0.95],
            "most": int(words[-1]),
        }


@dataclass
class Statistics:
    """Histograms by split; `lengths` by (split, kind, side)."""

    lengths: dict[tuple[str, str, str], Lengths]
    modalities: dict[str, Counter[str]]
    sizes: dict[str, Counter[int]]  # longer side in pixels
    shapes: dict[str, Counter[float]]  # width / height, rounded to a tenth
    licences: dict[str, Counter[str]]


def gather(prepared: PreparedData) -> Statistics:
    """Statistics of all splits, without reading pictures."""
    found = Statistics({}, {}, {}, {}, {})
    for split in prepared.splits:
        found.modalities[split], found.licences[split] = Counter(), Counter()
        found.sizes[split], found.shapes[split] = Counter(), Counter()
        for batch in prepared.iter_images(split, ["modality", "width", "height", "licence"], 1 << 16):
            _add_images(split, batch, found)
        for batch in pair_batches(prepared, split, ["kind", *SIDES]):
            for row in batch.to_pylist():
                for side in SIDES:
                    if row[side] is not None:
                        lengths = found.lengths.setdefault((split, row["kind"], side), Lengths())
                        lengths.counts[len(row[side].split())] += 1
    return found


def _add_images(split: str, batch: pa.RecordBatch, found: Statistics) -> None:
    for row in batch.to_pylist():
        found.modalities[split][row["modality"] or UNKNOWN] += 1
        found.sizes[split][max(row["width"], row["height"])] += 1
        found.shapes[split][round(row["width"] / row["height"], 1)] += 1
        found.licences[split][row["licence"] or UNKNOWN] += 1


def pair_batches(prepared: PreparedData, split: str, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Batches of some columns of a split's pairs."""
    for path in prepared.shards("pairs", split):
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(1 << 14, columns=columns)


def draw_pairs(prepared: PreparedData, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` random pairs of each kind of a split (reservoir sampling), in their order."""
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    seen: Counter[str] = Counter()
    for batch in pair_batches(prepared, split, ["pair_id", "kind", "query_image", "target_image", *SIDES]):
        kinds = batch.column("kind").to_pylist()
        for row, kind in enumerate(kinds):
            seen[kind] += 1
            place = int(rng.integers(seen[kind]))
            chosen = drawn.setdefault(kind, [])
            if len(chosen) < count:
                chosen.append((seen[kind], batch.slice(row, 1).to_pylist()[0]))
            elif place < count:
                chosen[place] = seen[kind], batch.slice(row, 1).to_pylist()[0]
    return [pair for kind in sorted(drawn) for _, pair in sorted(drawn[kind], key=lambda item: item[0])]


def draw_questions(prepared: PreparedData, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """`count` random questions of each evaluation task, as pairs of the query and its right option."""
    rng = np.random.default_rng(seed)
    table = prepared.candidates(split)
    tasks: dict[str, list[int]] = {}
    for row, task in enumerate(table.column("task").to_pylist()):
        tasks.setdefault(task, []).append(row)
    rows = [row for task in sorted(tasks) for row in sorted(rng.permutation(tasks[task])[:count].tolist())]
    drawn = [table.slice(row, 1).to_pylist()[0] for row in rows]
    options = prepared.options(split, {row["options"] for row in drawn}) if drawn else {}
    pairs = []
    for row in drawn:
        right = options[row["options"]][row["answer"]]
        query = {"pair_id": row["candidates_id"], "kind": f"{row['task']}, 1 of {len(options[row['options']])}"}
        query |= {side: row[side] for side in ("query_image", "query_text")}
        pairs.append({**query, "target_image": right.image, "target_text": right.text})
    return pairs


def bytes_of(prepared: PreparedData, split: str, names: set[str]) -> dict[str, bytes]:
    """The bytes of some images; only row groups that contain one of the ids are read."""
    found: dict[str, bytes] = {}
    for path in prepared.shards("images", split) if names else ():
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                here = file.read_row_group(group, columns=["image_id"]).column("image_id").to_pylist()
                wanted = [row for row, name in enumerate(here) if name in names]
                if wanted:
                    column = file.read_row_group(group, columns=["bytes"]).column("bytes")
                    found |= {here[row]: column[row].as_py() for row in wanted}
    return found
