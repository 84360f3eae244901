"""Measures `prepare`: images a second against `datasets` reading the same rows, and peak memory by number of rows.

    python benchmarks/data_prepare.py [--rows 10000 100000] [--rounds 3] [--copies 2] [--root FOLDER] [--out FILE]

Speed: the real pictures of --root (ROCOv2's layout, both splits) are first written as the Hub's Parquet files, --copies
times under other ids; then all variants read them, once a round. `datasets` decodes every image and does nothing else,
once through its cache (`datasets`), once without one (`datasets_streaming`); prepare also hashes, looks for copies of
held-out pictures, writes and syncs. `--rounds 0` leaves it out. Memory: small generated JPEG files in the Hub's layout,
each number of `--rows` in a process of its own; the peaks are that process's and its largest worker's.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import contextlib
import io
import itertools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measure import finish, in_own_process, in_rounds, machine, medians, parser_of, peak_memory_mb, spread
from PIL import Image

ROOT = Path(__file__).parents[2] / "shared" / "data" / "medpix-rocov2"
SCHEMA = pa.schema(
    [
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_id", pa.string()),
        ("caption", pa.string()),
        ("cui", pa.list_(pa.string())),
    ]
)
ROWS_A_FILE, ROWS_A_GROUP = 5000, 500


def write_hub_files(folder: Path, split: str, rows: Iterator[dict[str, Any]]) -> int:
    """The Hub's layout: `<split>-00000.parquet`, ...; returns the number of rows."""
    total = number = 0
    waiting: list[dict[str, Any]] = []
    writer: pq.ParquetWriter | None = None
    for row in rows:
        if writer is None:
            writer = pq.ParquetWriter(folder / f"{split}-{number:05d}.parquet", SCHEMA)
        waiting.append(row)
        total += 1
        if len(waiting) == ROWS_A_GROUP:
            writer.write_table(pa.Table.from_pylist(waiting, SCHEMA))
            waiting.clear()
        if total % ROWS_A_FILE == 0:
            writer.close()
            writer, number = None, number + 1
    if writer is not None:
        if waiting:
            writer.write_table(pa.Table.from_pylist(waiting, SCHEMA))
        writer.close()
    return total


def real_rows(root: Path, split: str, copies: int) -> Iterator[dict[str, Any]]:
    """Every picture of a split that has a caption, `copies` times under ids of their own."""
    from fuselip_core.data.prepare.image_reader import ImageReader
    from fuselip_core.data.sources.rocov2 import list_rocov2

    listing = list_rocov2(root)
    captions = {pair.group: pair.target.text for pair in listing.pairs}
    with ImageReader() as reader:
        entries = [image for image in listing.images if image.split == split and image.image_id in captions]
        for copy, entry in itertools.product(range(copies), entries):
            data = {"bytes": reader.read(entry.place), "path": None}
            name = f"{entry.image_id}_{copy}"
            yield {"image": data, "image_id": name, "caption": captions[entry.image_id], "cui": ["C0040405"]}


def generated_rows(split: str, count: int) -> Iterator[dict[str, Any]]:
    """Small pictures, each of its own look."""
    rng = np.random.default_rng([ord(letter) for letter in split])
    for number in range(count):
        stream = io.BytesIO()
        small = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(stream, "JPEG")
        name = f"ROCOv2_2023_{split}_{number:06d}"
        caption = f"CT of patient {number}, axial slice through the upper abdomen without contrast"
        image = {"bytes": stream.getvalue(), "path": None}
        yield {"image": image, "image_id": name, "caption": caption, "cui": ["C0040405"]}


def prepare(root: Path, out: Path, workers: int) -> dict[str, Any]:
    from fuselip_core.config import PrepareSettings
    from fuselip_core.data.prepare.prepare import prepare_data

    fields = {"source": "rocov2", "root": root, "workers": workers, "rows_per_shard": ROWS_A_GROUP}
    return prepare_data(PrepareSettings.model_validate(fields), out)


def read_with_datasets(root: Path, cache: Path, streaming: bool) -> int:
    """Every row of both splits through `datasets`, images decoded."""
    import datasets

    count = 0
    for split in ("train", "test"):
        files = {split: sorted(str(path) for path in root.glob(f"{split}-*.parquet"))}
        rows = datasets.load_dataset(
            "parquet", data_files=files, split=split, cache_dir=str(cache), streaming=streaming
        ).cast_column("image", datasets.Image())
        for row in rows:
            row["image"].load()
            count += 1
    return count


def speed(root: Path, copies: int, rounds: int) -> dict[str, Any]:
    """Images a second of all variants, medians of the rounds; the ratio is to the faster way of `datasets`."""
    import datasets  # importing takes seconds, which are not counted

    assert datasets
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "raw"
        raw.mkdir()
        # The validation split as the held-out one: what prepare looks for copies of.
        splits = {"train": "train", "test": "valid"}
        count = sum(write_hub_files(raw, to, real_rows(root, split, copies)) for to, split in splits.items())
        variants = {
            "datasets": lambda: reading(raw, count, False),
            "datasets_streaming": lambda: reading(raw, count, True),
            "prepare_1_worker": lambda: preparing(raw, 1),
            "prepare_2_workers": lambda: preparing(raw, 2),
        }
        seconds = in_rounds(variants, rounds)
    rates = {name: round(count / value, 1) for name, value in medians(seconds).items()}
    fastest = max(rates["datasets"], rates["datasets_streaming"])
    return {
        "images": count,
        "images_per_second": rates,
        "spread": {name: round(spread(values), 2) for name, values in seconds.items()},
        "ratio_to_datasets": {
            name: round(rate / fastest, 2) for name, rate in rates.items() if name.startswith("prepare")
        },
    }


def reading(raw: Path, count: int, streaming: bool) -> float:
    """Seconds of `datasets` with an empty cache."""
    with tempfile.TemporaryDirectory(dir=raw.parent) as cache:
        start = time.perf_counter()
        assert read_with_datasets(raw, Path(cache), streaming) == count
        return time.perf_counter() - start


def preparing(raw: Path, workers: int) -> float:
    """Seconds of prepare, the start of its workers included."""
    with tempfile.TemporaryDirectory(dir=raw.parent) as out:
        start = time.perf_counter()
        prepare(raw, Path(out) / "prepared", workers)
        return time.perf_counter() - start


def memory(rows: int, workers: int) -> dict[str, Any]:
    """Peak resident memory of a process that prepares `rows` generated rows (it is this script again)."""
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        raw.mkdir()
        write_hub_files(raw, "train", generated_rows("train", rows))
        write_hub_files(raw, "test", generated_rows("test", 1000))
        return {"rows": rows, **in_own_process(__file__, "--child", name, "--workers", str(workers))}


def child(folder: Path, workers: int) -> dict[str, Any]:
    """What one process needed, its workers apart."""
    start = time.perf_counter()
    from fuselip_core.data.prepare import prepare as imported  # so that the floor is that of the code alone

    assert imported
    floor = peak_memory_mb()
    with peak_of_children() as largest:
        manifest = prepare(folder / "raw", folder / "out", workers)
    return {
        "imports_mb": floor,
        "peak_mb": peak_memory_mb(),
        "peak_worker_mb": largest(),
        "images_per_second": round(
            sum(part["images"] for part in manifest["counts"].values()) / (time.perf_counter() - start), 1
        ),
    }


@contextlib.contextmanager
def peak_of_children() -> Iterator[Callable[[], float]]:
    """Yields a function: the largest resident memory that any child process had, in MB; looked at every 50 ms."""
    # Not getrusage, whose figure begins with that of the process that starts another.
    largest, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            for children in Path("/proc/self/task").glob("*/children"):
                with contextlib.suppress(OSError, IndexError):
                    for number in children.read_text(encoding="ascii").split():
                        status = Path(f"/proc/{number}/status").read_text(encoding="ascii")
                        largest[0] = max(largest[0], int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield lambda: round(largest[0], 1)
    finally:
        done.set()
        watcher.join()


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000], help="sizes of the memory runs")
    parser.add_argument("--workers", type=int, default=2, help="workers of the memory runs")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the speed runs; 0 leaves them out")
    parser.add_argument("--copies", type=int, default=2, help="how often each real picture is read")
    parser.add_argument("--root", type=Path, default=ROOT, help="real pictures in ROCOv2's layout")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        finish(child(arguments.child, arguments.workers))
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result: dict[str, Any] = machine()
    if arguments.rounds and arguments.root.is_dir():
        result["speed"] = speed(arguments.root, arguments.copies, arguments.rounds)
    result["memory"] = [memory(rows, arguments.workers) for rows in arguments.rows]
    finish(result, arguments.out)


if __name__ == "__main__":
    main()
