"""Prefect flows: they compose the stages and hold no domain logic.

Prefect, MLflow, DVC and wandb read the environment when they are imported, so this package sets its defaults on import,
before any flow module imports Prefect. A value that is already set stays.
"""

from flows.environment import set_defaults

set_defaults()
