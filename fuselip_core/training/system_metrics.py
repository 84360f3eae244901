"""What a process takes of its machine while it runs, for the curves of a run."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

MEGABYTE = 1 << 20
_PAGE = os.sysconf("SC_PAGE_SIZE")
_last = [time.monotonic(), time.process_time()]


def machine_metrics() -> dict[str, float]:
    """Names under ``system/``: memory, processors in use since the last call, and the GPU's share if there is one."""
    found = {}
    with contextlib.suppress(OSError):
        found["system/memory_mb"] = int(Path("/proc/self/statm").read_text("ascii").split()[1]) * _PAGE / MEGABYTE
    now = time.monotonic(), time.process_time()
    if now[0] - _last[0] > 0.01:
        found["system/processors"] = (now[1] - _last[1]) / (now[0] - _last[0])
    _last[:] = now
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / MEGABYTE
        # Needs NVIDIA's management library, which not every installation has.
        with contextlib.suppress(Exception):
            found["system/gpu_percent"] = float(torch.cuda.utilization())
    return found
