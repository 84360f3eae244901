"""Measures how fast pairs come out of the token store, and whether a store of CC12M's size is as fast as a small one.

    python benchmarks/data.py [--pairs 60000 12400000] [--batches 400] [--rounds 5] [--folder FOLDER] [--out FILE]

A ready batch: 256 pair rows from the mixture, then the codes, ids and lengths of both sides as arrays (`gather`).
packed: the same, then on to one packed sequence of joint ids with its layout, which is what the encoder takes.
Stores are made of random codes (128 an image) and random ids in the lengths of real captions, each measured in
processes of its own that take turns. start: from nothing to the first batch, imports not counted. Memory: the peak of
the whole process. The large store takes 4 GB in --folder (a temporary folder if not given). The last line is one JSON
object.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from measure import finish, in_own_process, machine, parser_of, peak_memory_mb, resident_mb, table
from workload import IDENTITY, LOG_MEDIAN, LOG_SPREAD, caption_columns

from fuselip_core.data.tokens.store import TokenStore, gather
from fuselip_core.data.tokens.writer import TokenStoreWriter, write_manifest
from fuselip_core.training.mixture import Mixture

BATCH, CODES, CODEBOOK = 256, 128, 4096
SHARD = 1 << 16
WARM_UP = 20


def build(folder: Path, pairs: int) -> None:
    """A store of `pairs` caption pairs, as `tokenize` would leave it."""
    rng = np.random.default_rng(0)
    writer = TokenStoreWriter(folder, "train", pairs, 1, CODES, IDENTITY)
    for start, stop in writer.pending(SHARD):
        writer.write_codes(start, rng.integers(0, CODEBOOK, (stop - start, 1, CODES), dtype=np.uint16))
    lengths = np.exp(rng.normal(LOG_MEDIAN, LOG_SPREAD, pairs)).round().clip(1, 300).astype(np.int64)
    offsets = np.append(0, np.cumsum(lengths))
    ids = rng.integers(1, 49_000, int(offsets[-1]), dtype=np.uint16)
    strings = np.char.mod("%d", np.arange(pairs)).tolist()
    writer.finish(caption_columns(pairs), ids, offsets, strings, np.zeros(CODES, np.uint16))
    write_manifest(folder, IDENTITY, ["caption"])


def read(folder: Path, batches: int) -> dict[str, Any]:
    """Rate, time to the first batch, and memory of this process, which does nothing else."""
    imports = resident_mb()
    start = time.perf_counter()
    store = TokenStore(folder, "train")
    mixture = Mixture(store, {"caption": 1.0}, BATCH, seed=0)
    _ready(store, next(mixture), 0)
    started = time.perf_counter() - start
    for step in range(WARM_UP):
        _ready(store, next(mixture), step)
    start = time.perf_counter()
    for step in range(batches):
        _ready(store, next(mixture), step)
    rate = batches * BATCH / (time.perf_counter() - start)
    return {
        "start_seconds": round(started, 3),
        "pairs_per_second": round(rate),
        "peak_memory_mb": peak_memory_mb(),
        "imports_mb": imports,
    }


def _ready(store: TokenStore, rows: np.ndarray, step: int) -> list[Any]:
    rng = np.random.default_rng([0, step])
    return [gather(store, rows, side, rng) for side in ("query", "target")]


def read_packed(folder: Path, batches: int) -> dict[str, Any]:
    """Rate of packed batches."""
    import torch

    from fuselip_core.encoding.from_codes import pack_sides
    from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel

    torch.set_num_threads(1)
    store = TokenStore(folder, "train")
    mixture = Mixture(store, {"caption": 1.0}, BATCH, seed=0)
    config = FuseLIPConfig(width=8, heads=1, layers=1, codebook_size=CODEBOOK, codes_per_image=CODES)
    model = FuseLIPModel(config)  # packing asks it for its vocabulary and context length alone
    for step in range(WARM_UP):
        pack_sides(_ready(store, next(mixture), step), model)
    start = time.perf_counter()
    for step in range(batches):
        pack_sides(_ready(store, next(mixture), step), model)
    return {"pairs_per_second": round(batches * BATCH / (time.perf_counter() - start))}


def measure(folder: Path, sizes: list[int], batches: int, rounds: int) -> dict[str, Any]:
    """Figures of every size, in rounds that take turns."""
    found: dict[int, list[dict[str, Any]]] = {pairs: [] for pairs in sizes}
    for pairs in sizes:
        place = folder / str(pairs)
        if not (place / "manifest.json").is_file():
            # In a process of its own too: what building takes is no memory of training.
            in_own_process(__file__, "--build", str(place), "--pairs", str(pairs))
    for _ in range(rounds):
        for pairs in sizes:
            found[pairs].append(in_own_process(__file__, "--read", str(folder / str(pairs)), "--batches", str(batches)))
    packed = in_own_process(__file__, "--packed", str(folder / str(sizes[0])), "--batches", str(batches))
    stores = [
        {"pairs": pairs} | {key: median(part[key] for part in found[pairs]) for key in found[pairs][0]}
        for pairs in sizes
    ]
    slower = 1 - stores[-1]["pairs_per_second"] / stores[0]["pairs_per_second"]
    return {
        "stores": stores,
        "packed_pairs_per_second": packed["pairs_per_second"],
        "slower_at_full_size": round(slower, 3),
    }


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--pairs", type=int, nargs="+", default=[60_000, 12_400_000])
    parser.add_argument("--batches", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="Where stores are made, and found again by the next run.")
    for name in ("--build", "--read", "--packed"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    if given.build:
        build(given.build, given.pairs[0])
        finish({})
    elif given.read:
        finish(read(given.read, given.batches))
    elif given.packed:
        finish(read_packed(given.packed, given.batches))
    else:
        with tempfile.TemporaryDirectory() as name:
            result = machine() | measure(given.folder or Path(name), given.pairs, given.batches, given.rounds)
        header = ["pairs in the store", "start, s", "peak of the process, MB", "pairs/s"]
        keys = ("pairs", "start_seconds", "peak_memory_mb", "pairs_per_second")
        print(table(header, [[f"{store[key]:,}" for key in keys] for store in result["stores"]]))
        finish(result, given.out)


if __name__ == "__main__":
    main()
