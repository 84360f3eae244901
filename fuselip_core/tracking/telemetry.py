"""Turns off the telemetry of libraries, before they are imported."""

from __future__ import annotations

import os

OFF = {
    # MLflow accepts `true` but not `1`.
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DVC_NO_ANALYTICS": "true",
    "WANDB_ERROR_REPORTING": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def turn_off() -> None:
    """Sets the variables that are not set yet, for this process and its children."""
    for name, value in OFF.items():
        os.environ.setdefault(name, value)
