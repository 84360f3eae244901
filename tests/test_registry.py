"""Registration in a real MLflow registry on SQLite: versions, aliases, gates, and the model that comes back."""

from __future__ import annotations

import base64
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import save_tiny_model

from flows.page.summary import next_commands
from flows.run.folder import Run
from fuselip_core.config import Gate, RegisterSettings, Settings, load_settings
from fuselip_core.errors import FuselipError
from fuselip_core.model.embedder import Embedder
from fuselip_core.registry.register import check_gates, is_registered, promote, register_model
from fuselip_core.tracking import run as tracking
from fuselip_core.tracking.store import mlflow_client

REPOSITORY = Path(__file__).parents[1]
Register = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry') / 'mlflow.db'}"
    mlflow_client(uri).search_experiments()
    return uri


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("trained") / "model")


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
    missed = {"metric": "recall", "value": 0.2, "passed": False}
    assert second["gates"] == [
        {**missed, "at_least": 0.3, "of": "gate"},
        {**missed, "at_least": 0.4, "of": "version 1"},
    ]
    client = MlflowClient(store)
    assert int(client.get_model_version_by_alias(first["name"], "champion").version) == 3
    assert client.get_model_version(first["name"], "2").tags["gates"] == "failed"


def aliases_of(store: str, name: str) -> dict[str, int]:
    return {alias: int(number) for alias, number in MlflowClient(store).get_registered_model(name).aliases.items()}


def test_a_version_that_is_found_again_moves_no_alias(
    register: Register, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = (Gate(metric="recall", at_least=0.3),)
    for value in (0.4, 0.5):
        name = register({"recall": value}, gate)["name"]
    with caplog.at_level(logging.INFO, logger="fuselip"):
        again = register({"recall": 0.4}, gate)
    assert again["version"] == 1 and again["alias"] is None
    assert aliases_of(store, name) == {"champion": 2, "candidate": 2}
    assert "version 1 is registered already; its aliases stay as they are" in caplog.text
    assert register({"recall": 0.5}, gate)["alias"] == "champion"


def test_a_registration_that_was_stopped_is_finished(register: Register, store: str) -> None:
    name = register({"recall": 0.4})["name"]
    client = MlflowClient(store)
    client.delete_model_version_tag(name, "1", "gates")
    for alias in ("champion", "candidate"):
        client.delete_registered_model_alias(name, alias)
    assert register({"recall": 0.4})["version"] == 1
    assert aliases_of(store, name) == {"champion": 1, "candidate": 1}


def test_a_version_below_the_champion_does_not_take_its_place(
    register: Register, store: str, caplog: pytest.LogCaptureFixture
) -> None:
    gate = (Gate(metric="recall", at_least=0.3),)
    register({"recall": 0.5}, gate)
    with caplog.at_level(logging.WARNING, logger="fuselip"):
        worse = register({"recall": 0.4}, gate)
    assert worse["alias"] is None and aliases_of(store, worse["name"])["champion"] == 1
    assert "does not move: recall 0.4 < 0.5 of version 1" in caplog.text
    assert register({"recall": 0.5, "other": 1.0}, gate)["alias"] == "champion"


def test_a_version_as_good_as_the_champion_within_noise_takes_its_place(register: Register, store: str) -> None:
    """Half intervals of 0.03 and 0.04: a difference of up to 0.05 may be chance."""
    gate = (Gate(metric="recall", at_least=0.1),)
    register({"recall": 0.5, "recall/low": 0.47, "recall/high": 0.53}, gate)
    for value, alias in ((0.44, None), (0.46, "champion")):
        tried = register({"recall": value, "recall/low": value - 0.04, "recall/high": value + 0.04}, gate)
        assert tried["alias"] == alias
        assert tried["gates"][-1]["at_least"] == pytest.approx(0.45) and tried["gates"][-1]["value"] == value


def test_a_champion_on_other_data_is_not_compared(register: Register, store: str) -> None:
    gate = (Gate(metric="recall", at_least=0.3),)
    name = register({"recall": 0.5}, gate)["name"]
    MlflowClient(store).set_model_version_tag(name, "1", "data_version", "another")
    assert register({"recall": 0.4}, gate)["alias"] == "champion"


def test_a_move_keeps_its_reason(register: Register, store: str, caplog: pytest.LogCaptureFixture) -> None:
    gate = (Gate(metric="recall", at_least=0.3),)
    with caplog.at_level(logging.INFO, logger="fuselip"):
        for value in (0.4, 0.5):
            name = register({"recall": value}, gate)["name"]
        promote(name, 1, "champion")
    assert "moves to version 1, its first version: 1 gates passed" in caplog.text
    assert "moves to version 2, from version 1: 2 gates passed" in caplog.text
    tags = MlflowClient(store).get_model_version(name, "1").tags
    assert tags["moved.champion"].endswith("Z from version 2: promoted by hand")


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


def test_model_and_version_say_what_they_are_and_how_they_are_asked(register: Register, tmp_path: Path) -> None:
    registered = register({"answers/fused/accuracy": 0.4, "answers/majority/accuracy": 0.2})
    client = MlflowClient(registered["tracking_uri"])
    assert "either one empty" in client.get_registered_model(registered["name"]).description
    said = client.get_model_version(registered["name"], "1").description
    assert "Recipe `sample`" in said and "| answers, image and question | 0.400 | commonest answer | 0.200 |" in said
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{registered['name']}/1", dst_path=str(tmp_path)))
    example = json.loads((folder / "serving_input_example.json").read_text())
    assert mlflow.pyfunc.load_model(str(folder)).predict(pd.DataFrame(**example["dataframe_split"])).shape == (1, 128)


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
        FuselipError, match=r"the registry http://127\.0\.0\.1:9 did not accept the model .*only registers"
    ):
        register({"recall": 0.4})


def test_weights_that_are_not_finite_are_refused_when_the_model_is_loaded(register: Register, tmp_path: Path) -> None:
    registered = register({"recall": 0.4})
    folder = Path(mlflow.artifacts.download_artifacts(f"models:/{registered['name']}/1", dst_path=str(tmp_path)))
    (weights,) = folder.rglob("model.safetensors")
    state = load_file(weights)
    state["ln_final.weight"][0] = float("nan")
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(Exception, match=r"ln_final\.weight"):
        mlflow.pyfunc.load_model(str(folder))


@contextmanager
def served(command: str, uri: str) -> Iterator[str]:
    """Address of the server that `command` starts in a shell without this environment; ended with its children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = re.sub(r"-p \d+", f"-p {port}", command)
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": os.environ.get("HOME", "/tmp"),
        "MLFLOW_TRACKING_URI": uri,
        "PORT": str(port),
    }
    process = subprocess.Popen(["/bin/bash", "-c", command], cwd=REPOSITORY, env=environment, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(900):
            assert process.poll() is None, f"{command} ended with code {process.returncode}"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def ask(address: str, content: Any) -> tuple[int, str]:
    body = json.dumps(content).encode()
    request = urllib.request.Request(f"{address}/invocations", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def require_own_environment() -> None:
    if not (REPOSITORY / ".venv" / "bin" / "mlflow").exists():
        pytest.skip("this checkout has no .venv, which the command names")


def test_the_documented_command_serves_the_model(register: Register, store: str) -> None:
    """As it stands in mlflow/README.md, in a shell without an activated environment."""
    require_own_environment()
    name = register({"recall": 0.4})["name"]
    page = (REPOSITORY / "mlflow" / "README.md").read_text()
    (command,) = re.findall(r"^PATH=.* mlflow models serve .*$", page, re.M)
    command = command.replace("sqlite:///mlflow/mlflow.db", store).replace("fuselip-sample-tiny", name)
    with served(command, "") as address:
        status, answer = ask(address, {"dataframe_records": [{"text": "left lung"}, {"text": "heart"}]})
        assert status == 200 and np.shape(json.loads(answer)["predictions"]) == (2, 128)


def test_the_last_lines_of_a_run_show_and_serve_the_model(register: Register, store: str) -> None:
    """As a finished run prints them; and what the server refuses, over HTTP."""
    require_own_environment()
    registered = register({"recall": 0.4})
    run = Run(REPOSITORY, REPOSITORY, load_settings(recipe="sample"))
    printed = [line.partition("#")[0] for line in next_commands(run, registered)]
    (show,) = (line for line in printed if line.split() == ["make", "serve-ui"])
    (serve,) = (line for line in printed if line.startswith("make serve-model MODEL=models:/"))
    with served(show, store) as address, urllib.request.urlopen(address, timeout=60) as page:
        assert b"MLflow" in page.read()
    with served(serve, store) as address:
        status, answer = ask(address, {"dataframe_records": [{"text": "left lung"}, {"text": "heart"}]})
        assert status == 200 and np.shape(json.loads(answer)["predictions"]) == (2, 128)
        long = "Smith " * 5000
        status, answer = ask(address, {"dataframe_records": [{"text": long}], "params": {"truncate": True}})
        assert status == 200
        columns = {"columns": ["image", "text"], "data": [[None, "a"], [float("nan"), float("nan")]]}
        for request, words in (
            ({"dataframe_records": [{"text": "a"}, {"text": long}]}, "row 1: the text has more than 2000 characters"),
            ({"dataframe_records": [{"text": 5}]}, "row 0: text is not a string"),
            ({"dataframe_records": [{"text": True}]}, "row 0: text is not a string"),
            ({"dataframe_records": [{"text": ["Smith"]}]}, "row 0: text is not a string"),
            ({"dataframe_records": [{"text": {"Smith": 1}}]}, "row 0: text is not a string"),
            ({"dataframe_records": [{"image": "Smith", "text": "a"}]}, "row 0: image is not base64"),
            ({"dataframe_records": [{"text": "a", "Smith": "b"}]}, "columns of the input are not"),
            ({"dataframe_records": [{"text": None}]}, "row 0 has neither"),
            ({"dataframe_split": columns}, "row 1 has neither"),
            ({"inputs": {"text": ["a", "Smith"], "image": [None]}}, "differ in length"),
        ):
            status, answer = ask(address, request)
            assert status == 400 and words in answer and "Smith" not in answer, answer


def test_the_registry_is_asked_without_torch() -> None:
    """The worker of the compose stack asks whether a model is registered, and promotes one; its image has no torch."""
    code = "import sys; sys.modules['torch'] = None; import fuselip_core.registry.register"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
