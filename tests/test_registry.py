"""Registration in a real MLflow registry on SQLite: versions, aliases, gates, and the model that comes back."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from fuselip_core.config import Gate, RegisterSettings, Settings, load_settings
from fuselip_core.errors import FuselipError
from fuselip_core.model.embedder import Embedder
from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel
from fuselip_core.model.hub import save_model
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.titok import TiTok
from fuselip_core.registry.register import check_gates, is_registered, register_model
from fuselip_core.tracking import run as tracking
from fuselip_core.tracking.services import mlflow_client

Register = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    mlflow_client(uri).search_experiments()
    return uri


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    tokenizer = TiTok(tokenizer_config("tiny"))
    model = FuseLIPModel(FuseLIPConfig.of_size("tiny", tokenizer.config))
    model.attach_image_tokenizer(tokenizer)
    folder = tmp_path_factory.mktemp("trained") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture
def register(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str, model_folder: Path
) -> Register:
    """Registers the tiny model under a name of this test's own."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name)[:60]
    base = load_settings(recipe="sample", artifacts=tmp_path / "artifacts")

    def call(
        metrics: dict[str, float],
        gates: tuple[Gate, ...] = (),
        model: Path = model_folder,
        alias: str = "champion",
    ) -> dict[str, Any]:
        registering = RegisterSettings(name=name, alias=alias, gates=gates)
        return register_model(base.model_copy(update={"register_": registering}), model, metrics, width=128)

    return call


def test_gates_compare_and_name_what_is_missing() -> None:
    gates = [Gate(metric="a", at_least=0.5), Gate(metric="b", at_least=0.5), Gate(metric="c", at_least=0.5)]
    results = check_gates(gates, {"a": 0.5, "b": 0.4999, "d": 1.0})
    assert [result.passed for result in results] == [True, False, False]
    assert results[2].value is None
    assert not check_gates(gates[:1], {"a": float("nan")})[0].passed
    # A metric with an interval over cases passes by its lower bound.
    (bounded,) = check_gates(gates[:1], {"a": 0.6, "a/low": 0.49, "a/high": 0.7})
    assert not bounded.passed and bounded.value == 0.49


def test_alias_moves_only_if_all_gates_pass(register: Register, store: str) -> None:
    gate = (Gate(metric="recall", at_least=0.3),)
    first, second, third = (register({"recall": value}, gate) for value in (0.4, 0.2, 0.5))
    assert [each["version"] for each in (first, second, third)] == [1, 2, 3]
    assert [each["alias"] for each in (first, second, third)] == ["champion", None, "champion"]
    assert second["gates"] == [{"metric": "recall", "at_least": 0.3, "value": 0.2, "passed": False}]
    client = MlflowClient(store)
    assert int(client.get_model_version_by_alias(first["name"], "champion").version) == 3
    assert client.get_model_version(first["name"], "2").tags["gates"] == "failed"


def test_failing_version_leaves_the_champion_where_it_is(register: Register, store: str) -> None:
    gate = (Gate(metric="recall", at_least=0.3),)
    good, bad = register({"recall": 0.4}, gate), register({"recall": 0.1}, gate)
    client = MlflowClient(store)
    assert int(client.get_model_version_by_alias(good["name"], "champion").version) == good["version"]
    assert int(client.get_model_version_by_alias(good["name"], "candidate").version) == bad["version"]


def test_an_alias_that_no_gate_guards_is_refused(register: Register) -> None:
    with pytest.raises(FuselipError, match=r"register\.alias candidate always names the newest version"):
        register({"recall": 0.4}, alias="candidate")


def test_same_model_and_metrics_are_no_second_version(register: Register) -> None:
    assert register({"recall": 0.4})["version"] == register({"recall": 0.4})["version"] == 1


def test_missing_model_names_the_stage(register: Register, tmp_path: Path) -> None:
    with pytest.raises(FuselipError, match="run the train stage first"):
        register({}, model=tmp_path / "none")


def test_registration_can_be_looked_up_and_lost(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = register({"recall": 0.4})
    assert is_registered(registered)
    assert not is_registered({**registered, "version": 99})
    assert not is_registered({})


def test_version_belongs_to_the_run_that_trained_it(register: Register, tmp_path: Path, store: str) -> None:
    settings: Settings = load_settings(recipe="sample", artifacts=tmp_path / "artifacts")
    with tracking.open_run(settings, "train") as run:
        run.metrics({"loss": 1.0}, 1)
    registered = register({"recall": 0.4})
    assert registered["run_id"] == tracking.run_of(settings.artifacts)["mlflow_run_id"]
    version = MlflowClient(store).get_model_version(registered["name"], "1")
    assert version.run_id == registered["run_id"]
    assert version.tags["recipe"] == "sample" and len(version.tags["git_commit"]) == 40


def test_model_comes_back_and_embeds_every_kind_of_row(register: Register, model_folder: Path) -> None:
    registered = register({"recall": 0.4})
    loaded = mlflow.pyfunc.load_model(f"models:/{registered['name']}@champion")
    picture = Image.fromarray(np.arange(64 * 64, dtype=np.uint8).reshape(64, 64))
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    encoded = base64.b64encode(stream.getvalue()).decode()
    table = pd.DataFrame({"image": [encoded, None, encoded], "text": [None, "left lung", "where is it?"]})
    embeddings = loaded.predict(table)
    expected = Embedder.from_pretrained(model_folder, "cpu").embed(
        images=[picture, None, picture], texts=[None, "left lung", "where is it?"]
    )
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    with pytest.raises(mlflow.exceptions.MlflowException, match="row 0 has neither"):
        loaded.predict(pd.DataFrame({"image": [None], "text": [""]}))


def test_model_states_its_requirements_and_holds_no_pickle(register: Register, tmp_path: Path) -> None:
    registered = register({"recall": 0.4})
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{registered['name']}/1", dst_path=str(tmp_path)))
    requirements = (folder / "requirements.txt").read_text()
    assert "torch==" in requirements and "open-clip-torch==" in requirements and "pillow==" in requirements
    assert not list(folder.rglob("*.pkl"))
    assert (folder / "code" / "fuselip_core" / "model").is_dir()


def test_a_registry_that_is_away_is_one_sentence(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(
        FuselipError, match=r"the registry http://127\.0\.0\.1:9 did not take the model .*only registers"
    ):
        register({"recall": 0.4})
