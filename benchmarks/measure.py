"""What the benchmarks share: rounds in turn, medians, memory, and how results are shown.

A machine's speed drifts. So variants are never timed one after the other but in rounds, each of which runs every
variant once, in an order that changes; a variant's time is the median of its rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

SHARED = Path(__file__).parents[2] / "shared" / "data"

Variants = Mapping[str, Callable[[], float]]  # name → runs once and returns the seconds that count


def in_rounds(variants: Variants, rounds: int, seed: int = 0) -> dict[str, list[float]]:
    """Runs every variant once a round, in shuffled order; returns the seconds of each variant, a round each."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    shuffle = random.Random(seed).shuffle
    for number in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(variants[name]())
        shown = ", ".join(f"{name} {seconds[name][-1]:.3g} s" for name in variants)
        print(f"round {number + 1} of {rounds}: {shown}", file=sys.stderr, flush=True)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of each variant's rounds."""
    return {name: statistics.median(values) for name, values in seconds.items()}


def spread(values: Sequence[float]) -> float:
    """Largest over smallest, so that a disturbed measurement shows."""
    return max(values) / min(values)


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    """`work` as a variant: all of its time counts, a GPU's included."""

    def run() -> float:
        wait_for_gpu()
        start = time.perf_counter()
        work()
        wait_for_gpu()
        return time.perf_counter() - start

    return run


def wait_for_gpu() -> None:
    """Returns when a GPU, if torch is in use and there is one, has done what it was given."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in MB (10^6 bytes)."""
    # Not getrusage, whose figure begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return round(int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6, 1)


def resident_mb() -> float:
    """Resident memory of this process now, in MB."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


class PeakResident:
    """Largest resident memory while the block runs, looked at every 20 ms: `.mb`, and `.added_mb` since its start."""

    def __enter__(self) -> PeakResident:
        self.before = self.mb = resident_mb()
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()
        self.mb = max(self.mb, resident_mb())

    @property
    def added_mb(self) -> float:
        return round(self.mb - self.before, 1)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.mb = max(self.mb, resident_mb())


def in_own_process(script: str, *arguments: str) -> dict[str, Any]:
    """Runs a benchmark script again with `arguments`; returns the JSON object on its last line."""
    done = subprocess.run([sys.executable, script, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


def machine() -> dict[str, Any]:
    """What a figure must be read with."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        found |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows the script's own text as it is written, with the option that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="File that takes the JSON object as well.")
    return parser


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def finish(result: Mapping[str, Any], out: Path | None = None) -> None:
    """Prints `result` as one JSON object on the last line, and writes it to `out`."""
    line = json.dumps(result)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(line + "\n", encoding="utf-8")
    print(line)
