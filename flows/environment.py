"""Default environment of processes that run flows: a local store, no telemetry, time for a slow first start."""

from __future__ import annotations

import os
from pathlib import Path

from fuselip_core.tracking.telemetry import OFF

REPOSITORY = Path(__file__).resolve().parents[1]
# What MLflow's page shows beside a run or model: other trainings, not what is there for language models.
MLFLOW_TRAININGS = "workflowType=machine_learning"

DEFAULTS = {
    "PREFECT_HOME": str(REPOSITORY / ".prefect"),
    # Without a configured server a flow starts its own; on a fresh database that takes longer than Prefect's 20 s.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    **OFF,
}


def set_defaults() -> None:
    """Sets what is not set yet."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
