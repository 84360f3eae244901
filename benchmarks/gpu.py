"""The parts of benchmarks/gpu.sh, which see; one a call, each with its figures as one JSON object.

    python benchmarks/gpu.py checks|train|busy|tokenize|codebook|evaluate [--dry] [--out FILE]
    python benchmarks/gpu.py table --results FOLDER

`mfu` is the work of a step's matrix products, attention's included and padding not, over its time and the GPU's own
published rate. `busy_share` is the time of all kernels over that of the steps.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import importlib.util
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_checks import CHECKS
from measure import finish, machine, parser_of, table, wait_for_gpu
from train import OURS, Bench, published_rate

from fuselip_core.config import CodebookSettings
from fuselip_core.model.compiled import graphs_compiled
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.titok import TiTok
from fuselip_core.tokenizer.trainer import CodebookTrainer
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.memory import step_memory

# Size, batch, variant; what the targets are about first, so that a limit of time cuts the rest.
STEPS = (
    ("small", 1024, "compiled"),
    ("base", 512, "compiled"),
    ("small", 2048, "compiled"),
    ("base", 1024, "compiled"),
    ("small", 256, "ours"),
    ("small", 256, "compiled"),
    ("small", 1024, "replayed"),
)
DRY_STEPS = (("tiny", 8, "ours"), ("tiny", 8, "compiled"))


def checks(dry: bool) -> dict[str, Any]:
    """Every check by name: "holds", or what does not."""
    device, found = torch.device("cpu" if dry else "cuda"), {}
    for check in CHECKS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(device, Path(folder))
                found[check.__name__] = "holds"
            except Exception as error:  # whatever it is, the other checks are worth their seconds
                found[check.__name__] = f"{type(error).__name__}: {error}"[:500]
    return found


def train(dry: bool) -> dict[str, Any]:
    """Rates, MFU, peak and estimated memory and graphs of each size, batch and variant; `published` once."""
    found: dict[str, Any] = {}
    for size, batch, variant in DRY_STEPS if dry else STEPS:
        name = f"{size} {batch} {variant}"
        try:
            found[name] = step_figures(size, batch, variant, 2 if dry else 10)
        except Exception as error:  # out of memory, say, which is a result
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(name, found[name], file=sys.stderr, flush=True)
    size, batch = ("tiny", 8) if dry else ("small", 256)
    with tempfile.TemporaryDirectory() as folder:
        found[f"{size} {batch} published"] = {
            "pairs_per_second": round(3 * batch / Bench(size, batch, Path(folder)).published(3), 1)
        }
    return found


def step_figures(size: str, batch: int, variant: str, steps: int) -> dict[str, Any]:
    """What train says of one size, batch and variant."""
    with tempfile.TemporaryDirectory() as folder:
        bench, before = Bench(size, batch, Path(folder)), graphs_compiled()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        bench.ours(2, variant)  # compiles what there is to compile
        seconds = bench.ours(steps, variant) / steps
        work = sum(
            sum(6.0 * t * a * b for t, a, b in step.linear()) + step.attention() for step in bench.step_shapes(1)
        )
        settings = bench.settings.model_copy(update=OURS[variant])
        estimate = step_memory(bench.model.config, settings, batch, 1, bench.device.type)
    found = {
        "pairs_per_second": round(batch / seconds, 1),
        "graphs": graphs_compiled() - before,
        "estimated_gb": round(estimate.total / 1e9, 2),
    }
    if rate := published_rate():
        found["mfu"] = round(work / seconds / rate, 3)
    if torch.cuda.is_available():
        found["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return found


def busy(dry: bool) -> dict[str, Any]:
    """Share of the time of ten steps in which the GPU computes."""
    size, batch, variant = ("tiny", 8, "ours") if dry else ("small", 1024, "compiled")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(size, batch, Path(folder))
        bench.ours(2, variant)
        with torch.profiler.profile() as profiled:
            start = time.perf_counter()
            bench.ours(10, variant)
            wait_for_gpu()
            wall = time.perf_counter() - start
        events = profiled.key_averages()
    name = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    computing = sum(getattr(event, name) for event in events) / 1e6
    slowest = sorted(events, key=lambda event: -getattr(event, name))[:8]
    return {
        "busy_share": round(computing / wall, 3),
        "slowest": {event.key[:60]: round(getattr(event, name) / 1e6, 4) for event in slowest},
    }


def tokenize(dry: bool) -> dict[str, Any]:
    """The tokenize stage beside the tokenizer alone and decoding alone."""
    module = _benchmark("tokenize")
    found: dict[str, Any] = module.measure("tiny", 16, 8, 1) if dry else module.measure("small", 4096, 256, 1)
    return found


def codebook(dry: bool) -> dict[str, Any]:
    """Images a second of training the image tokenizer, pixels at hand."""
    size, batch, steps = ("tiny", 8, 4) if dry else ("small", 64, 40)
    config = tokenizer_config(size)
    side = config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (max(batch * 4, 64), side, side, 3), dtype=np.uint8)
    device = torch.device("cpu" if dry else "cuda")
    at: list[float] = []

    class Images:
        def __len__(self) -> int:
            return len(pixels)

        def rows(self, rows: np.ndarray) -> np.ndarray:
            wait_for_gpu()
            at.append(time.perf_counter())
            return pixels[np.sort(rows)]

    settings = CodebookSettings.model_validate({"steps": steps, "batch_size": batch, "revive_every": 0})
    with tempfile.TemporaryDirectory() as folder:
        trainer = CodebookTrainer(
            TiTok(config, decoder=True).to(device), Images(), settings, Checkpoints(Path(folder)), _quiet
        )  # type: ignore[arg-type]
        trainer._begin = lambda: None  # type: ignore[method-assign]  # k-means is no part of a step
        trainer.run()
    return {"images_per_second": round(batch * (steps - 2) / (at[-1] - at[1]), 1)}


def evaluate(dry: bool) -> dict[str, Any]:
    """Exact retrieval, both directions."""
    found: dict[str, Any] = _benchmark("evaluate").measure(*((500, 64, 1) if dry else (9927, 384, 1)))
    return found


def _quiet(values: Any, step: int) -> None:
    """Logs nothing."""


def _benchmark(name: str) -> Any:
    """A benchmark beside this one by its file, since Python has modules of such names."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARTS: dict[str, Callable[[bool], dict[str, Any]]] = {
    part.__name__: part for part in (checks, train, busy, tokenize, codebook, evaluate)
}


def show(results: Path) -> None:
    """All parts in `results` as one table, and as one JSON object on the last line."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("*.json"))}
    rows = [
        [part, name, json.dumps(value) if isinstance(value, dict) else value]
        for part, figures in found.items()
        for name, value in figures.items()
    ]
    print(table(["part", "what", "figure"], rows))
    finish({"machine": machine(), **found})


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("part", choices=(*PARTS, "table"))
    parser.add_argument("--dry", action="store_true", help="On the CPU, at size tiny.")
    parser.add_argument("--results", type=Path, help="Folder of the parts' objects, for the table.")
    given = parser.parse_args()
    logging.getLogger("fuselip").setLevel(logging.WARNING)
    if given.part == "table":
        show(given.results)
    else:
        finish(PARTS[given.part](given.dry), given.out)


if __name__ == "__main__":
    main()
