"""MLflow's store: its address, and the care of a local one (SQLite beside a folder of artifacts)."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

from filelock import FileLock

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import atomic_write

if TYPE_CHECKING:
    from mlflow import MlflowClient

SQLITE = "sqlite:///"
# Without it, MLflow's page guesses the kind of experiment, and shows tabs meant for language models.
KIND_TAG, KIND = "mlflow.experimentKind", "custom_model_development"
# Columns in which MLflow stores absolute paths.
ADDRESSES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)

logger = logging.getLogger("fuselip")


def repository_root() -> Path:
    """The nearest folder at or above the current one that DVC manages; the current one if there is none."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / ".dvc").is_dir()), here)


def git(repository: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> bytes:
    """Output of a git command; raises OSError or SubprocessError if it fails or there is no git."""
    command = ["git", "-C", str(repository), *arguments]
    variables = {**os.environ, **(environment or {})}
    return subprocess.run(command, capture_output=True, check=True, timeout=60, env=variables).stdout


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or SQLite in the repository's mlflow/ folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{repository_root() / 'mlflow' / 'mlflow.db'}"


def mlflow_client(uri: str) -> MlflowClient:
    """A client for `uri` that gives up within seconds; creates and checks an SQLite store (see `prepare_store`)."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    try:
        from mlflow import MlflowClient
    # Without the library, the repository's own mlflow/ folder imports as an empty namespace.
    except ImportError as error:
        raise FuselipError("MLflow is not installed; `pip install fuselip-rocov2[train]` brings it") from error
    prepare_store(uri)
    return MlflowClient(tracking_uri=uri)


def global_mlflow() -> Any:
    """MLflow with its process-wide tracking URI set to `tracking_uri()`.

    Needed wherever MLflow takes no client: it resolves models:/ addresses and starts runs in the store used last.
    """
    import mlflow

    mlflow.set_tracking_uri(tracking_uri())
    return mlflow


def experiment_id(client: MlflowClient, name: str, uri: str) -> str:
    """Id of the experiment, created if new. Artifacts of an SQLite store are in ``artifacts/`` beside it.

    Raises FuselipError for an experiment that was deleted.
    """
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(name)
    if not found:
        location = _artifacts_beside(_database(uri)).as_uri() if uri.startswith(SQLITE) else None
        try:
            return str(client.create_experiment(name, artifact_location=location, tags={KIND_TAG: KIND}))
        except MlflowException:
            found = client.get_experiment_by_name(name)  # another process was faster
            if not found:
                raise
    if found.lifecycle_stage == "deleted":
        raise FuselipError(
            f"the MLflow experiment {name} is deleted; restore it with `MLFLOW_TRACKING_URI={uri} .venv/bin/mlflow "
            f"experiments restore --experiment-id {found.experiment_id}` and run the same command again"
        )
    return str(found.experiment_id)


def prepare_store(uri: str) -> None:
    """Creates a missing local store, and corrects the paths in one that was moved. Ignores other stores.

    Raises FuselipError if the store is damaged, or if another program did not finish creating it.
    """
    if not uri.startswith(SQLITE):
        return
    database = _database(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    if not _is_there(database):
        with FileLock(database.with_name(f".{database.name}.lock")):
            if not _is_there(database):
                _make(database)
    _require_whole(database)
    _correct_addresses(database)


def require_answer(uri: str) -> None:
    """Raises FuselipError if no MLflow answers at `uri`, or if a local store can't be written."""
    try:
        if uri.startswith(("http://", "https://")):  # first without MLflow, which loads slowly and retries
            with contextlib.suppress(HTTPError):
                urlopen(uri, timeout=5).close()  # noqa: S310 - the scheme is one of two
        mlflow_client(uri).search_experiments(max_results=1)
    except FuselipError:
        raise
    except Exception as error:  # whatever the server, driver or scheme raises
        if isinstance(error, OSError) and uri.startswith(SQLITE):  # `errors.sentence_of` explains it
            raise
        reason = one_line(error)[:200]
        raise FuselipError(
            f"MLflow does not answer at {uri} ({reason}); start it, or correct MLFLOW_TRACKING_URI (empty: local store)"
        ) from error
    if uri.startswith(SQLITE) and not os.access(_database(uri), os.W_OK):
        raise FuselipError(f"{_database(uri)} can't be written; change its owner or mode, or MLFLOW_TRACKING_URI")


def store_folder(uri: str) -> Path | None:
    """The folder of a local store; None for any other address."""
    return _database(uri).parent if uri.startswith(SQLITE) else None


def _database(uri: str) -> Path:
    return Path(uri.removeprefix(SQLITE)).resolve()


def _artifacts_beside(database: Path) -> Path:
    return database.parent / "artifacts"


def _is_there(database: Path) -> bool:
    return database.is_file() and database.stat().st_size > 0


def _make(database: Path) -> None:
    """Creates the schema in a file beside `database` and renames it, so that no incomplete store is ever seen."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    for left in database.parent.glob(
        f".{database.name}.*.partial*"
    ):  # of killed processes, since this one has the lock
        left.unlink(missing_ok=True)
    for name in ("alembic", "mlflow.store.db.utils"):  # which log every table
        logging.getLogger(name).setLevel(logging.WARNING)
    with atomic_write(database) as partial:
        store = SqlAlchemyStore(f"{SQLITE}{partial}", _artifacts_beside(database).as_uri())
        store.engine.dispose()


def _require_whole(database: Path) -> None:
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            # MLflow creates the default experiment last.
            whole = "experiments" in tables and connection.execute("SELECT 1 FROM experiments").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked or no permission, which MLflow reports
            return
        raise FuselipError(
            f"MLflow's store {database} is damaged ({error}); restore a copy, or move it away and run `fuselip sync`, "
            "which sends the runs in artifacts/ again"
        ) from error
    if not whole:
        raise FuselipError(
            f"MLflow's store {database} is incomplete and has no runs, since the program that created it was stopped; "
            "delete it, unless another program is creating it right now, and run the same command again"
        )


def _correct_addresses(database: Path) -> None:
    """Changes all paths below the store's former folder to the present one.

    MLflow stores absolute paths, so a moved or copied checkout would read and write the files of the old one.
    """
    here = _artifacts_beside(database)
    if not here.is_dir():  # only the database was copied, and its files are still in the old place
        return
    with contextlib.closing(sqlite3.connect(database, timeout=60)) as connection, connection:
        former = connection.execute(
            "SELECT DISTINCT artifact_location FROM experiments JOIN experiment_tags USING (experiment_id)"
            " WHERE key = ? AND value = ? AND artifact_location LIKE 'file:///%/artifacts' AND artifact_location != ?",
            (KIND_TAG, KIND, here.as_uri()),
        ).fetchall()
        for (old,) in former:
            for table, column in ADDRESSES:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"  # noqa: S608 - names of this file
                    f" WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                    (here.as_uri(), len(old) + 1, old, len(old) + 1, f"{old}/"),
                )
            logger.info("MLflow's store has moved: paths below %s now point to %s", old, here)
