"""The runner that puts stages into containers: what it asks the engine for, and how containers end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from docker.errors import NotFound
from engine import BASE, engine, image_of
from filelock import FileLock
from repository_copy import copy_repository

from flows.run.container import (
    ContainerError,
    ContainerRequest,
    ContainerRunner,
    connect,
    request_for,
    run_container,
    sweep,
    volumes_of,
)
from fuselip_core.config import load_settings
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.errors import Interrupted

WAITS_FOR_TERM = (
    "import signal, sys, time\n"
    "def stop(*_): print('error: stopped at step 3 and saved', flush=True); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, stop)\n"
    "print('step 1', flush=True); print('step 2', flush=True); time.sleep(120)"
)


# Stands in for the stages: at work until it is stopped.
AT_WORK = """
import sys
import time


def prepare(settings):
    print("step 1", file=sys.stderr, flush=True)
    time.sleep(300)


codebook = tokenize = train = evaluate = register = prepare
"""


class Cancelled(Exception):
    """What a flow's engine raises in the thread that waits for a stage when the run is cancelled."""


def python(code: str, folder: Path, gpus: bool = False) -> ContainerRequest:
    """A container of the base image that runs `code`."""
    labels = {"fuselip.repository": str(folder), "fuselip.stage": "train"}
    return ContainerRequest(BASE, ("-c", code), Path("/"), {}, {}, labels, gpus, entrypoint=("python",))


def test_options_ask_for_user_gpu_and_a_closed_root() -> None:
    options = ContainerRequest("image", ("train",), Path("/repo"), {}, {}, {}, gpus=True).options()
    assert options["user"] == f"{os.getuid()}:{os.getgid()}"
    assert options["read_only"] and options["tmpfs"] and options["security_opt"] == ["no-new-privileges"]
    assert options["device_requests"][0]["Capabilities"] == [["gpu"]]
    assert "device_requests" not in ContainerRequest("image", ("train",), Path("/repo"), {}, {}, {}).options()


def test_every_folder_is_mounted_under_its_own_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    repository, data, store = tmp_path / "repository", tmp_path / "data", tmp_path / "store" / "mlflow.db"
    repository.mkdir()
    data.mkdir()
    settings = load_settings(recipe="sample", overrides=[f"prepare.root={data}", f"artifacts={repository / 'out'}"])
    volumes = volumes_of(repository, settings, {"MLFLOW_TRACKING_URI": f"sqlite:///{store}"})
    assert {source: how["mode"] for source, how in volumes.items()} == {
        str(repository): "rw",
        str(data): "ro",
        str(store.parent): "rw",
    }
    assert all(source == how["bind"] for source, how in volumes.items())


def test_a_missing_engine_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path / 'none.sock'}")
    with pytest.raises(ContainerError, match="no Docker Engine answers at unix://"):
        connect()


def test_lines_and_exit_code_come_through(tmp_path: Path) -> None:
    lines: list[str] = []
    code = "import sys; print('one'); print('error: no luck', file=sys.stderr); sys.exit(3)"
    client = engine()
    assert run_container(client, python(code, tmp_path), lines.append) == 3
    assert sorted(lines) == ["error: no luck", "one"]
    assert sweep(client, tmp_path, lines.append) == 0


def test_a_missing_image_says_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = engine()
    monkeypatch.setitem(sys.modules["flows.run.container"].IMAGES, "train", "bacor_fuselip_missing")
    monkeypatch.setenv("FUSELIP_GPUS", "none")
    with pytest.raises(ContainerError, match=r"docker build -f Dockerfile\.train -t bacor_fuselip_missing"):
        run_container(client, request_for(client, ["train"], tmp_path), print)


def test_refused_gpus_say_what_to_install(tmp_path: Path) -> None:
    client = engine()
    if "nvidia" in client.info().get("Runtimes", {}):
        pytest.skip("this engine has GPUs to give")
    with pytest.raises(ContainerError, match="nvidia-container-toolkit"):
        run_container(client, python("", tmp_path, gpus=True), print)
    assert sweep(client, tmp_path, print) == 0, "the container that could not start is still there"


def test_sigterm_reaches_the_container_and_its_last_words_us(tmp_path: Path) -> None:
    client, lines = engine(), []

    def hear(line: str) -> None:
        lines.append(line)
        if line == "step 2":
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()

    start = time.monotonic()
    assert run_container(client, python(WAITS_FOR_TERM, tmp_path), hear) == Interrupted.exit_code
    assert lines[-1] == "error: stopped at step 3 and saved"
    assert time.monotonic() - start < 60


def test_what_a_killed_run_left_is_stopped_and_removed(tmp_path: Path) -> None:
    client = engine()
    left = client.containers.create(**python(WAITS_FOR_TERM, tmp_path).options())
    left.start()
    other = client.containers.create(**python("", tmp_path / "other").options())
    attended = python("", tmp_path).options()
    attended["labels"]["fuselip.lock"] = "download.lock"
    download = client.containers.create(**attended)
    try:
        with FileLock(tmp_path / ".dvc" / "tmp" / "download.lock"):
            assert sweep(client, tmp_path, print) == 1
        assert not client.containers.list(all=True, filters={"id": left.id})
        assert client.containers.list(all=True, filters={"id": other.id})
        assert client.containers.list(all=True, filters={"id": download.id}), "a download beside a stage was stopped"
        assert sweep(client, tmp_path, print) == 1, "what nobody waits for any more stays"
    finally:
        for each in (other, download):
            with contextlib.suppress(NotFound):
                each.remove(force=True)


def test_a_container_without_memory_says_so(tmp_path: Path) -> None:
    client, lines = engine(), []
    limits = {"mem_limit": "32m", "memswap_limit": "32m"}
    labels = {"fuselip.repository": str(tmp_path)}
    request = ContainerRequest(
        BASE, ("-c", "b'x' * 10**9"), Path("/"), {}, {}, labels, limits=limits, entrypoint=("python",)
    )
    assert run_container(client, request, lines.append) == 137
    assert "ran out of memory; raise FUSELIP_MEMORY" in lines[-1]


def test_cancelling_a_flow_stops_the_container_of_its_stage(tmp_path: Path) -> None:
    """Through all that stands between: DVC's process, DVC, the shell, the client of the engine."""
    client = engine()
    image_of("download")
    from flows.run.folder import plan
    from flows.run.forms import RunRequest

    repository = copy_repository(tmp_path / "repository")
    (repository / "fuselip_core" / "stages.py").write_text(AT_WORK)
    (tmp_path / "sample").mkdir()
    run = plan(repository, RunRequest(source="phantom", root=tmp_path / "sample", name="boxed")).write()
    mine = {"label": f"fuselip.repository={repository}"}
    lines: list[str] = []

    def cancel(line: str) -> None:
        lines.append(line)
        if line == "step 1":
            assert len(client.containers.list(filters=mine)) == 1
            raise Cancelled

    start = time.monotonic()
    with pytest.raises(Cancelled):
        ContainerRunner().run("prepare", run, cancel)
    assert not client.containers.list(all=True, filters=mine)
    assert time.monotonic() - start < 280, "ended by itself"
    assert any("the same command resumes it" in line for line in lines), lines


def test_a_stage_in_a_container_is_up_to_date_for_dvc(tmp_path: Path) -> None:
    """The real prepare stage in the download image, then DVC's word on it, with and without containers."""
    image_of("download")
    from flows.run.folder import plan
    from flows.run.forms import RunRequest
    from flows.run.runner import ProcessRunner

    repository = copy_repository(tmp_path / "repository")
    draw_data_set(tmp_path / "sample", 0, {"train": 8, "valid": 4, "test": 4})
    request = RunRequest(source="phantom", root=tmp_path / "sample", name="boxed")
    run = plan(repository, request).write()
    lines: list[str] = []
    outcome = ContainerRunner().run("prepare", run, lines.append)
    assert outcome.status == "done", lines
    assert (run.artifacts / "prepared" / "manifest.json").is_file()
    assert (run.artifacts / "prepared").stat().st_uid == os.getuid()
    for runner in (ContainerRunner(), ProcessRunner()):
        assert runner.run("prepare", run, lines.append).status == "unchanged"
