"""MLflow's local store: made whole or not at all, found where it was moved to, and damaged ones are named."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from fuselip_core.errors import FuselipError, sentence_of
from fuselip_core.tracking.store import experiment_id, mlflow_client, prepare_store

FIRST_RUN = """
import sys
from fuselip_core.tracking.store import experiment_id, mlflow_client
print("starts", flush=True)
client = mlflow_client(sys.argv[1])
client.create_run(experiment_id(client, "e", sys.argv[1]))
"""
ASKS = """
import sys
from fuselip_core.errors import run_to_exit
from fuselip_core.tracking.store import require_answer
run_to_exit(lambda: require_answer(sys.argv[1]))
"""


def first_run(uri: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", FIRST_RUN, uri], stdout=subprocess.PIPE, text=True)


def runs_of(uri: str) -> int:
    client = mlflow_client(uri)
    return len(client.search_runs([experiment_id(client, "e", uri)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store with one run that has a file; made once, tests copy it."""
    folder = tmp_path_factory.mktemp("made") / "mlflow"
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    client = mlflow_client(uri)
    run = client.create_run(experiment_id(client, "e", uri)).info.run_id
    client.log_text(run, "old", "old.txt")
    client.create_registered_model("m")
    client.create_model_version("m", f"{(folder / 'artifacts').as_uri()}/models/m-1/artifacts", run)
    return folder


def test_a_first_run_that_is_killed_leaves_no_store_behind(tmp_path: Path) -> None:
    """Killed as soon as the file that becomes the store is there, in the middle of its migrations."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    process = first_run(uri)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".mlflow.db.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(tmp_path.glob(".mlflow.db.*.partial")) and not (tmp_path / "mlflow.db").exists()
    assert runs_of(uri) == 0
    assert not list(tmp_path.glob("*.partial*")) and not list(tmp_path.glob(".*.partial*"))


def test_two_first_runs_at_once_share_one_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    both = [first_run(uri), first_run(uri)]
    for process in both:
        process.communicate(timeout=180)
    assert [process.returncode for process in both] == [0, 0]
    assert runs_of(uri) == 2


def test_a_half_made_store_is_named_with_the_way_out(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE _alembic_tmp_params (x)")
        connection.execute("CREATE TABLE experiments (x)")
    with pytest.raises(FuselipError, match=rf"{database} is incomplete.*delete it.*run the same command again"):
        mlflow_client(f"sqlite:///{database}")
    database.write_bytes(b"no database" * 1000)
    with pytest.raises(FuselipError, match=rf"{database} is damaged .*restore a copy"):
        mlflow_client(f"sqlite:///{database}")


def test_an_empty_file_is_no_store_yet(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    assert runs_of(f"sqlite:///{tmp_path / 'mlflow.db'}") == 0


def test_a_moved_store_reads_and_writes_where_it_is(made: Path, tmp_path: Path) -> None:
    """As in a copied checkout: files of before are found, new ones do not go to the old place."""
    shutil.copytree(made, tmp_path / "mlflow")
    before = sorted(made.rglob("*"))
    for file in (tmp_path / "mlflow").rglob("old.txt"):
        file.write_text("copied")
    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    client = mlflow_client(uri)
    (run,) = client.search_runs([experiment_id(client, "e", uri)])
    assert Path(client.download_artifacts(run.info.run_id, "old.txt")).read_text() == "copied"
    # Another run: MLflow remembers within a process where a run's files are, and `made` was written in this one.
    another = client.create_run(experiment_id(client, "e", uri)).info
    client.log_text(another.run_id, "new", "new.txt")
    here = (tmp_path / "mlflow" / "artifacts").as_uri()
    assert another.artifact_uri.startswith(here)
    assert client.get_model_version("m", "1").source == f"{here}/models/m-1/artifacts"
    assert sorted(made.rglob("*")) == before
    assert client.get_experiment("0").artifact_location == f"{here}/0"


def test_a_database_copied_without_its_files_keeps_their_place(made: Path, tmp_path: Path) -> None:
    shutil.copy(made / "mlflow.db", tmp_path / "mlflow.db")
    client = mlflow_client(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (run,) = client.search_runs(["1"])
    assert Path(client.download_artifacts(run.info.run_id, "old.txt")).read_text() == "old"


def test_a_relative_address_and_a_link_are_the_same_store(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(made)
    monkeypatch.chdir(tmp_path)
    client = mlflow_client("sqlite:///link/mlflow.db")
    location = client.get_experiment_by_name("e").artifact_location
    assert location == (made / "artifacts").as_uri()


def test_a_deleted_experiment_is_named_with_the_command_that_restores_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "mlflow")
    uri = f"sqlite:///{tmp_path / 'mlflow' / 'mlflow.db'}"
    client = MlflowClient(uri)
    client.delete_experiment("1")
    with pytest.raises(FuselipError, match="experiments restore --experiment-id 1`") as caught:
        experiment_id(client, "e", uri)
    words = str(caught.value).split("`")[1].replace(".venv/bin/mlflow", str(Path(sys.executable).parent / "mlflow"))
    subprocess.run(["/bin/bash", "-c", words], check=True, capture_output=True)
    assert experiment_id(client, "e", uri) == "1"


def test_a_first_run_on_a_full_disk_leaves_no_store_and_says_so(small_disk: Path) -> None:
    other = small_disk / "other"
    other.write_bytes(bytes(600_000))
    uri = f"sqlite:///{small_disk / 'mlflow.db'}"
    first = subprocess.run([sys.executable, "-c", ASKS, uri], capture_output=True, text=True, timeout=100)
    assert (first.returncode, first.stderr.splitlines()[-1]) == (
        1,
        f"error: no space is left on the disk at {small_disk / 'mlflow.db'}; free some and run the same command again",
    )
    assert sorted(path.name for path in small_disk.iterdir()) == [".mlflow.db.lock", "other"]
    other.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert runs_of(uri) == 0
    # The disk fills up later: the store stays whole.
    client = mlflow_client(uri)
    room = shutil.disk_usage(small_disk).free
    other.write_bytes(bytes(room))
    with pytest.raises(Exception, match="disk is full") as caught:
        for _ in range(50):
            client.create_run("0")
    assert sentence_of(caught.value).startswith("no space is left on the disk at MLflow's store; free some")
    other.unlink()
    assert runs_of(uri) == 0
    client.create_run(experiment_id(client, "e", uri))
    assert runs_of(uri) == 1


def test_other_stores_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_store("http://127.0.0.1:9")
    assert not list(tmp_path.iterdir())
