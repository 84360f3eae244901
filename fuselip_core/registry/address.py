"""A registered model's folder, by its address in MLflow's registry."""

from __future__ import annotations

from pathlib import Path

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.tracking.services import tracking_uri


def fetch_model(address: str) -> Path:
    """The folder of the model that `address` (models:/NAME@ALIAS or models:/NAME/VERSION) means, downloaded if needed.

    Raises FuselipError where the registry has no such model, or what it has is no encoder of this project.
    """
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.models import Model

    try:
        # Not as arguments of the next call: MLflow resolves models:/ in the registry that the process used last.
        mlflow.set_tracking_uri(tracking_uri())
        place = mlflow.artifacts.download_artifacts(address)
        artifacts = Model.load(place).flavors["python_function"]["artifacts"]
        return Path(place) / artifacts["model"]["path"]
    except KeyError as error:
        raise FuselipError(f"{address} is no encoder of this project; name one that `fuselip register` made") from error
    except (MlflowException, OSError) as error:
        reason = one_line(error)[:200]
        raise FuselipError(f"{tracking_uri()} has no {address} ({reason}); see MLFLOW_TRACKING_URI") from error


def pin_version(address: str) -> str:
    """models:/NAME/VERSION for models:/NAME@ALIAS, which may mean another version tomorrow; other names unchanged."""
    name, alias = address.removeprefix("models:/").rpartition("@")[::2]
    if not address.startswith("models:/") or not name:
        return address
    from mlflow import MlflowClient

    return f"models:/{name}/{MlflowClient(tracking_uri()).get_model_version_by_alias(name, alias).version}"
