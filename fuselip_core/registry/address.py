"""A registered model's folder, by its address in MLflow's registry."""

from __future__ import annotations

from pathlib import Path

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.tracking.store import global_mlflow, tracking_uri


def fetch_model(address: str) -> Path:
    """The folder of the model at `address` (models:/NAME@ALIAS or models:/NAME/VERSION), downloaded if needed.

    Raises FuselipError if the registry has no such model, or if it is not an encoder of this project.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        place = global_mlflow().artifacts.download_artifacts(address)
        artifacts = Model.load(place).flavors["python_function"]["artifacts"]
        return Path(place) / artifacts["model"]["path"]
    except KeyError as error:
        raise FuselipError(
            f"{address} is not an encoder of this project; name one made by `fuselip register`"
        ) from error
    except (MlflowException, OSError) as error:
        reason = one_line(error)[:200]
        raise FuselipError(f"{tracking_uri()} has no {address} ({reason}); see MLFLOW_TRACKING_URI") from error


def pin_version(address: str) -> str:
    """Replaces the alias of models:/NAME@ALIAS by its present version, models:/NAME/VERSION; keeps other names."""
    name, alias = address.removeprefix("models:/").rpartition("@")[::2]
    if not address.startswith("models:/") or not name:
        return address
    from mlflow import MlflowClient

    return f"models:/{name}/{MlflowClient(tracking_uri()).get_model_version_by_alias(name, alias).version}"
