"""Environment of a process that runs flows: a local store, no reports to anyone, time for a slow first start."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]

DEFAULTS = {
    "PREFECT_HOME": str(REPOSITORY / ".prefect"),
    # Without a configured server a flow starts its own; on a fresh database that takes longer than Prefect's 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The word `true`: MLflow does not take `1`.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def set_defaults() -> None:
    """Sets what is not set yet."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
