"""Measures `prepare`: images a second against `datasets` reading the same rows, and peak memory by number of rows.

    python benchmarks/data_prepare.py [--rows 10000 100000] [--workers 2] [--speed-images 1850] [--root FOLDER]

Speed: the real pictures of --root (ROCOv2's layout) are first written as the Hub's Parquet files; then both read them.
`datasets` decodes every image and does nothing else; prepare also hashes, fingerprints, writes and syncs. They take
turns, and the best of --repeats counts. Memory: small generated JPEG files in the Hub's layout, each size in a process
of its own; the peak is that of the process and of its largest worker. The last line is one JSON object.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import io
import json
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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


def real_rows(root: Path, split: str, most: int) -> Iterator[dict[str, Any]]:
    from fuselip_core.data.captions import list_rocov2
    from fuselip_core.data.places import ImageReader

    listing = list_rocov2(root)
    captions = {pair.group: pair.target.text for pair in listing.pairs}
    with ImageReader(1 << 28) as reader:
        entries = [image for image in listing.images if image.split == split][:most]
        for image in entries:
            data = {"bytes": reader.read(image.place), "path": None}
            yield {"image": data, "image_id": image.image_id, "caption": captions[image.image_id], "cui": ["C0040405"]}


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
    from fuselip_core.data.prepare import prepare_data

    fields = {"source": "rocov2", "root": root, "workers": workers, "rows_per_shard": ROWS_A_GROUP}
    return prepare_data(PrepareSettings.model_validate(fields), out)


def read_with_datasets(root: Path, cache: Path) -> int:
    """Every row of the training split through `datasets`, images decoded."""
    import datasets

    files = sorted(str(path) for path in root.glob("train-*.parquet"))
    rows = datasets.load_dataset("parquet", data_files={"train": files}, split="train", cache_dir=str(cache))
    rows = rows.cast_column("image", datasets.Image())
    for row in rows:
        row["image"].load()
    return len(rows)


def speed(root: Path, images: int, workers: int, repeats: int) -> dict[str, Any]:
    import datasets  # importing takes seconds, which are not counted

    assert datasets
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = folder / "raw"
        raw.mkdir()
        count = write_hub_files(raw, "train", real_rows(root, "train", images))
        best: dict[str, float] = {}
        for repeat in range(repeats):
            for what in ("datasets", "prepare"):
                start = time.perf_counter()
                if what == "datasets":
                    assert read_with_datasets(raw, folder / f"cache-{repeat}") == count
                else:
                    prepare(raw, folder / f"out-{repeat}", workers)
                best[what] = min(best.get(what, 1e9), time.perf_counter() - start)
        rates = {f"{what}_images_per_second": round(count / seconds, 1) for what, seconds in best.items()}
    ratio = rates["prepare_images_per_second"] / rates["datasets_images_per_second"]
    return {"images": count, **rates, "ratio_to_datasets": round(ratio, 2)}


def memory(rows: int, workers: int) -> dict[str, Any]:
    """Peak resident memory of a process that prepares `rows` generated rows (it is this script again)."""
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name) / "raw"
        raw.mkdir()
        write_hub_files(raw, "train", generated_rows("train", rows))
        write_hub_files(raw, "test", generated_rows("test", 1000))
        command = [sys.executable, __file__, "--child", name, "--workers", str(workers)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return {"rows": rows, **json.loads(done.stdout.splitlines()[-1])}


def child(folder: Path, workers: int) -> dict[str, Any]:
    start = time.perf_counter()
    from fuselip_core.data import prepare as imported  # so that the floor is that of the code alone

    assert imported
    floor = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = prepare(folder / "raw", folder / "out", workers)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    kept = manifest["counts"].get("train", {"images": 0})["images"]
    return {
        "imports_mb": round(floor / 1024, 1),
        "peak_mb": round(peaks[0] / 1024, 1),
        "peak_worker_mb": round(peaks[1] / 1024, 1),
        "images_per_second": round((kept + 1000) / (time.perf_counter() - start), 1),
        "train_images": kept,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--speed-images", type=int, default=1850)
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.workers)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    result: dict[str, Any] = {"load_average": round(os.getloadavg()[0], 1), "cores": os.cpu_count()}
    result["memory"] = [memory(rows, arguments.workers) for rows in arguments.rows]
    if arguments.root.is_dir():
        result["speed"] = speed(arguments.root, arguments.speed_images, arguments.workers, arguments.repeats)
    peaks = [part["peak_mb"] for part in result["memory"]]
    result["memory_growth_mb"] = round(peaks[-1] - peaks[0], 1)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
