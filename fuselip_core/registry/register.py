"""Registration in MLflow: every trained encoder becomes a version; the alias moves only if all gates pass.

mlflow/README.md describes names and policy.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselip_core.cards.model_card import FOLDER, write_cards
from fuselip_core.config import Gate, Settings
from fuselip_core.errors import FuselipError, one_line
from fuselip_core.evaluation.comparisons import comparison_rows
from fuselip_core.files import read_json, read_numbers, sha256_of, write_json
from fuselip_core.registry.state import STATE_FOLDER, write_state
from fuselip_core.tracking.run import experiment_name, run_of
from fuselip_core.tracking.store import experiment_id, global_mlflow, mlflow_client, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

PACKAGE = Path(__file__).parents[1]
SERVED_MODEL = Path(__file__).with_name("served_model.py")
# What served_model.py imports, directly or indirectly. MLflow's own inference takes 11 s and misses some.
REQUIREMENTS = (
    "numpy",
    "open-clip-torch",
    "pandas",
    "pillow",
    "pyarrow",
    "pydantic",
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-openjpeg",
    "pyyaml",
    "rich",
    "safetensors",
    "torch",
    "torchvision",
    "transformers",
)
MODEL_URI = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
ABOUT = (
    "Embeds images, texts, and images with text in one vector each ({family}, size {size}). Input: the columns `image` "
    "(base64 of an image file) and `text`, either one empty. Output: one embedding of unit norm a row. Research "
    "software, no medical device."
)
EXAMPLE = {"image": [None], "text": ["chest radiograph with a left-sided nodule"]}
# Always the newest version, gates passed or not; MLflow reserves the word "latest".
NEWEST_ALIAS = "candidate"

logger = logging.getLogger("fuselip")


@dataclass(frozen=True)
class GateResult:
    """Result of one gate. value: None if the metric is missing. of: "gate", or the version that sets the bound."""

    metric: str
    at_least: float
    value: float | None
    passed: bool
    of: str = "gate"


def check_gates(gates: Sequence[Gate], metrics: Mapping[str, float], of: str = "gate") -> list[GateResult]:
    """One result for each gate, in order. A missing or undefined metric fails.

    A metric with an interval over cases must pass with its lower bound.
    """
    results = []
    for gate in gates:
        value = gate.value(metrics)
        passed = value is not None and not math.isnan(value) and value >= gate.at_least
        results.append(GateResult(gate.metric, gate.at_least, value, passed, of))
    return results


def register_run(settings: Settings) -> dict[str, Any]:
    """Writes the cards of the run in `settings.artifacts` and registers its model; returns registered.json."""
    from fuselip_core.model.embedder import Embedder

    model, measured = settings.artifacts / "model", settings.artifacts / "metrics.json"
    if not (model / "config.json").is_file():
        raise FuselipError(f"{model} holds no trained model; run the train stage first")
    metrics, trained = read_numbers(measured), read_numbers(model / "training.json")
    if any(metrics.get(name) != value for name, value in trained.items()):
        raise FuselipError(f"{measured} belongs to another training than {model}; run the evaluate stage again")
    write_cards(settings)
    registered = register_model(settings, model, metrics, Embedder.from_pretrained(model, "cpu").width)
    write_json(settings.artifacts / "registered.json", registered)
    return registered


def register_model(settings: Settings, model: Path, metrics: Mapping[str, float], width: int) -> dict[str, Any]:
    """Registers the encoder in folder `model` as a version, and moves the alias if all gates pass.

    `width` is the embedding's D. Returns the content of registered.json: name, version, alias (None if it does not
    move), gates, run_id, model_uri, tracking_uri. Registering the same model and metrics again makes no new version.
    """
    if not model.is_dir():
        raise FuselipError(f"no trained model in {model}; run the train stage first")
    if settings.register_.alias == NEWEST_ALIAS:
        raise FuselipError(
            f"register.alias {NEWEST_ALIAS} always names the newest version, gates passed or not; choose another alias"
        )
    try:
        return _register(settings, model, metrics, width)
    except FuselipError:
        raise
    # Any exception: MLflow passes on whatever its database or disk raises.
    except Exception as error:
        reason = one_line(error)[:300]
        raise FuselipError(
            f"the registry {tracking_uri()} did not accept the model ({reason}); check that it answers and run the "
            "same command again, which only registers"
        ) from error


def _register(settings: Settings, model: Path, metrics: Mapping[str, float], width: int) -> dict[str, Any]:
    name, uri, alias = f"{settings.register_.name}-{settings.model.size}", tracking_uri(), settings.register_.alias
    client = mlflow_client(uri)
    fingerprint = _fingerprint(model, metrics)
    found = _version_of(client, name, fingerprint)
    # The tag `gates` is set last, so a version with it was registered completely.
    known = found is not None and "gates" in found.tags
    if found is None:
        found = _log_version(client, settings, name, model, metrics, width, fingerprint)
        client.set_model_version_tag(name, found.version, "fingerprint", fingerprint)
    champion = _version_with(client, name, alias)
    gates = check_gates(settings.register_.gates, metrics)
    if champion and champion.version != found.version and settings.register_.against_champion:
        gates += _against(client, champion, found.tags | run_of(settings.artifacts).get("tags", {}), gates, metrics)
    missed = ", ".join(_missed(gate) for gate in gates if not gate.passed)
    if known:
        logger.info("%s version %s is registered already; its aliases stay as they are", name, found.version)
    else:
        _move_alias(client, name, NEWEST_ALIAS, found.version, "newest version")
        if missed:
            logger.warning("the alias %s of %s does not move: %s", alias, name, missed)
        else:
            _move_alias(client, name, alias, found.version, f"{len(gates)} gates passed")
        client.set_model_version_tag(name, found.version, "gates", "failed" if missed else "passed")
    now = _version_with(client, name, alias)
    return {
        "name": name,
        "version": int(found.version),
        "alias": alias if now and now.version == found.version else None,
        "gates": [asdict(gate) for gate in gates],
        "run_id": found.run_id,
        "model_uri": f"models:/{name}/{found.version}",
        "tracking_uri": uri,
    }


def _against(
    client: MlflowClient,
    champion: ModelVersion,
    tags: Mapping[str, str],
    gates: Sequence[GateResult],
    metrics: Mapping[str, float],
) -> list[GateResult]:
    """Compares each gate's metric with the champion's, within noise; empty if that was measured on other data."""
    of = f"version {champion.version}"
    if champion.tags.get("data_version") != tags.get("data_version") or "state" not in champion.tags:
        logger.info(
            "not compared with %s of %s: it was measured on other data, or its metrics are gone", of, champion.name
        )
        return []
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        place = client.download_artifacts(str(champion.run_id), f"{champion.tags['state']}/metrics.json", folder)
        best = read_json(
            Path(place), f"run `.venv/bin/python -m flows.promote` to give the alias to another version than {of}"
        )
    results = []
    for metric in dict.fromkeys(gate.metric for gate in gates if gate.metric in best):
        # Two measurements may differ by this much by chance alone, according to both intervals.
        bound = best[metric] - math.hypot(_noise(best, metric), _noise(metrics, metric))
        value = metrics.get(metric)
        results.append(GateResult(metric, bound, value, value is not None and value >= bound, of))
    return results


def _noise(metrics: Mapping[str, float], metric: str) -> float:
    """Half the interval of a metric; 0 if it has none."""
    return (metrics.get(f"{metric}/high", 0.0) - metrics.get(f"{metric}/low", 0.0)) / 2


def _missed(gate: GateResult) -> str:
    value = "missing" if gate.value is None else f"{gate.value:.4g}"
    return f"{gate.metric} {value} < {gate.at_least:.4g}{'' if gate.of == 'gate' else f' of {gate.of}'}"


def _version_with(client: MlflowClient, name: str, alias: str) -> ModelVersion | None:
    """The version with `alias`; None if there is none."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _move_alias(client: MlflowClient, name: str, alias: str, version: str, reason: str) -> str | None:
    """Points `alias` to `version` and records the reason in the log and as a tag; returns the previous version."""
    before = _version_with(client, name, alias)
    former = str(before.version) if before else None
    if former != str(version):
        client.set_registered_model_alias(name, alias, version)
        note = f"from version {former}: {reason}" if former else f"its first version: {reason}"
        client.set_model_version_tag(name, version, f"moved.{alias}", f"{datetime.now(UTC):%Y-%m-%d %H:%M}Z {note}")
        logger.info("%s of %s moves to version %s, %s", alias, name, version, note)
    return former


def promote(name: str, version: int | None, alias: str, despite_gates: bool = False) -> dict[str, Any]:
    """Moves `alias` of the registered model `name` to `version`, or to the newest one if it is None.

    Returns name, version, alias and `before`, the version that had the alias. Raises FuselipError if there is no such
    version, or if it failed a gate and `despite_gates` is not set.
    """
    from mlflow.exceptions import MlflowException

    client = mlflow_client(tracking_uri())
    try:
        if version is None:
            found = client.get_model_version_by_alias(name, NEWEST_ALIAS)
        else:
            found = client.get_model_version(name, str(version))
    except MlflowException as error:
        wanted = f"version {version} of {name}" if version else f"model {name}"
        raise FuselipError(f"there is no {wanted} on {tracking_uri()}; see its Models page") from error
    failed = found.tags.get("gates") == "failed"
    if failed and not despite_gates:
        raise FuselipError(
            f"{name} version {found.version} failed a gate; set despite_gates to move {alias} to it anyway"
        )
    reason = "promoted by hand" + (", despite a failed gate" if failed else "")
    before = _move_alias(client, name, alias, found.version, reason)
    return {"name": name, "version": int(found.version), "alias": alias, "before": int(before) if before else None}


def is_registered(registered: Mapping[str, Any]) -> bool:
    """Whether the version in a registered.json is still in the registry."""
    from mlflow.exceptions import MlflowException

    try:
        client = mlflow_client(tracking_uri())
        client.get_model_version(str(registered["name"]), str(registered["version"]))
    except (MlflowException, KeyError):
        return False
    return True


def fetch_state(uri: str, folder: Path) -> tuple[str, str, Path]:
    """Downloads the state of the model at `uri` (models:/NAME@ALIAS or /VERSION) into `folder`.

    Returns the model's name, its version and the path of the state. Raises FuselipError if there is none.
    """
    from mlflow.exceptions import MlflowException

    asked = MODEL_URI.fullmatch(uri)
    if not asked:
        raise FuselipError(f"'{uri}' is not a registered model; write models:/NAME@champion or models:/NAME/3")
    client = mlflow_client(tracking_uri())
    try:
        if asked["alias"]:
            found = client.get_model_version_by_alias(asked["name"], asked["alias"])
        else:
            found = client.get_model_version(asked["name"], asked["version"])
        if "state" not in found.tags:
            raise FuselipError(f"{uri} was registered by a version that stored no state; register it again")
        with _without_advice():
            place = client.download_artifacts(str(found.run_id), found.tags["state"], str(folder))
    except MlflowException as error:
        reason = one_line(error)
        raise FuselipError(f"{tracking_uri()} has no {uri} ({reason}); see MLFLOW_TRACKING_URI") from error
    return found.name, str(found.version), Path(place)


def _log_version(
    client: MlflowClient,
    settings: Settings,
    name: str,
    model: Path,
    metrics: Mapping[str, float],
    width: int,
    fingerprint: str,
) -> ModelVersion:
    import pandas as pd

    mlflow = global_mlflow()
    run_id = _run_for(client, settings)
    state = f"{STATE_FOLDER}/{fingerprint[:12]}"
    with tempfile.TemporaryDirectory() as folder, _without_advice():
        made_from = write_state(Path(folder), settings, metrics)
        client.log_artifacts(run_id, folder, state)
    cards = settings.artifacts / FOLDER
    with mlflow.start_run(run_id=run_id, log_system_metrics=False), _without_advice():
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(SERVED_MODEL),
            artifacts={"model": str(model)} | ({"cards": str(cards)} if cards.is_dir() else {}),
            code_paths=[str(PACKAGE)],
            pip_requirements=[f"{package}=={version(package)}" for package in REQUIREMENTS],
            signature=_signature(width),
            input_example=pd.DataFrame(EXAMPLE),
            registered_model_name=name,
            metadata={"recipe": settings.recipe, "family": settings.model.family, "size": settings.model.size},
        )
    found = client.get_model_version(name, str(logged.registered_model_version))
    commit = {"state": state, "git_commit": made_from["commit"], "git_dirty": str(made_from["changed"]).lower()}
    for key, value in {**run_of(settings.artifacts).get("tags", {}), **_short(metrics), **commit}.items():
        client.set_model_version_tag(found.name, found.version, key, str(value))
    client.update_registered_model(name, ABOUT.format(family=settings.model.family, size=settings.model.size))
    client.update_model_version(name, found.version, _description(settings, metrics, str(made_from["commit"])))
    return found


def _description(settings: Settings, metrics: Mapping[str, float], commit: str) -> str:
    """Origin and results of a version, as Markdown."""
    rows = [
        f"| {row['measure'] or '〃'} | {row['value']} | {row['control']} | {row['value of control']} |"
        for row in comparison_rows(dict(metrics))
    ]
    lines = [
        f"Recipe `{settings.recipe}`, data `{settings.prepare.source}`, measured on the split "
        f"`{settings.evaluate.split}`, commit `{commit[:12]}`. The run has the report and all numbers.",
        "",
        *(["| measure | value | control | its value |", "| --- | --- | --- | --- |", *rows] if rows else []),
    ]
    return "\n".join(lines)


@contextmanager
def _without_advice() -> Iterator[None]:
    """Silences MLflow's recommendations while it logs a model, but no other warnings."""
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    for name in ("mlflow.models.signature", "mlflow.utils.environment"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*(type hints|input example)", category=UserWarning)
        yield


def _run_for(client: MlflowClient, settings: Settings) -> str:
    """The run that trained the model, or a new one if the server does not know it."""
    from mlflow.exceptions import MlflowException

    known = run_of(settings.artifacts)
    if known.get("mlflow_uri") == tracking_uri():
        try:
            return str(client.get_run(known["mlflow_run_id"]).info.run_id)
        except MlflowException:
            logger.info("the run that trained this model is not on %s: starting a new one", tracking_uri())
    experiment = experiment_id(client, experiment_name(settings.recipe), tracking_uri())
    return str(client.create_run(experiment, run_name=f"register-{settings.model.size}").info.run_id)


def _signature(width: int) -> ModelSignature:
    """Parameters and output, but no input schema, so that the model itself checks the unchanged request.

    With a schema, MLflow would turn numbers into text, drop unknown columns and quote the request in its errors.
    """
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import DataType, ParamSchema, ParamSpec, Schema, TensorSpec

    # Unnamed, since MLflow checks an array against a single unnamed tensor.
    embedding = TensorSpec(np.dtype(np.float32), (-1, width))
    truncate = ParamSpec("truncate", DataType.boolean, False)
    return ModelSignature(outputs=Schema([embedding]), params=ParamSchema([truncate]))


def _fingerprint(model: Path, metrics: Mapping[str, float]) -> str:
    """Hash of the model's files and its metrics."""
    digest = hashlib.sha256(repr(sorted(metrics.items())).encode())
    for file in sorted(path for path in model.rglob("*") if path.is_file()):
        digest.update(f"{file.relative_to(model)}:{sha256_of(file)}\n".encode())
    return digest.hexdigest()


def _version_of(client: MlflowClient, name: str, fingerprint: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' and tags.fingerprint = '{fingerprint}'")
    return found[0] if found else None


def _short(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.4g}" for name, value in metrics.items() if name.endswith(("recall_at_1", "fused/accuracy"))}
