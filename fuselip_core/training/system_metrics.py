"""What a process takes of its machine while it runs, for the curves of a run.

Not MLflow's own system metrics: those go straight to its server, so that a run without one, or with Weights & Biases,
would have none, and they measure the machine instead of the process.
"""

from __future__ import annotations

import contextlib

import psutil
import torch

MEGABYTE = 1 << 20
_process = psutil.Process()


def machine_metrics() -> dict[str, float]:
    """Names under ``system/``: memory, processors in use since the last call, and the GPU's share if there is one."""
    found = {
        "system/memory_mb": _process.memory_info().rss / MEGABYTE,
        "system/processors": _process.cpu_percent() / 100,
    }
    if torch.cuda.is_available():
        found["system/gpu_memory_mb"] = torch.cuda.max_memory_allocated() / MEGABYTE
        # Needs NVIDIA's management library, which not every installation has.
        with contextlib.suppress(Exception):
            found["system/gpu_percent"] = float(torch.cuda.utilization())
    return found
