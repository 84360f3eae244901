"""docker/compose.yaml as a whole, brought up by a real compose: no run, model or artifact is lost, whatever ends.

Where the images of the database and the store cannot be fetched, stand-ins with their names and command lines are built
from tests/stand_in_images and removed at the end: Debian's PostgreSQL 15 for 17, and nanio, a small S3 server from PyPI
that checks signatures and keeps objects as files, for versitygw. Of the real two nothing is shown then.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest
from chromium import opened_browser, opened_page
from compose import PROJECT, compose, filled
from docker.errors import ImageNotFound
from engine import BASE, DOCKER, engine, image_of, services
from mlflow import MlflowClient
from playwright.sync_api import Page, expect
from prefect_form import fill_form, open_form, say, send_form
from prefect_stack import Prefect, free_port, wait_until
from repository_copy import copy_repository

from flows.run.container import LABEL as OF_STAGE
from flows.server.recover import RECOVERIES
from fuselip_core.data.phantom.data_set import draw_data_set
from fuselip_core.files import read_json

pytestmark = [pytest.mark.long, pytest.mark.timeout(2400)]
STAND_INS = Path(__file__).with_name("stand_in_images")
DEPLOYMENT = "adapt-rocov2-small"
NAME = "whole"
OVERRIDES = {
    "codebook.steps": 2,
    "codebook.batch_size": 16,
    "train.batch_size": 16,
    "train.validate_every": 20,
    "train.checkpoint_every": 3,
    "evaluate.examples": 2,
}
LONG_STEPS = 100
# Of the repository and of all that runs with it mounted.
USER = os.getuid() or 12345


@dataclass
class Composed(Prefect):
    """The whole stack, up."""

    command: list[str]
    values: dict[str, str]
    store: str

    def compose(self, *words: str) -> str:
        """What a compose command says; fails with its words if it fails."""
        say(f"compose {' '.join(words)}")
        done = subprocess.run([*self.command, *words], capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{(done.stdout + done.stderr)[-3000:]}\n{self.said()}"
        return done.stdout

    def said(self) -> str:
        done = subprocess.run([*self.command, "logs", "--no-color", "--tail", "40"], capture_output=True, text=True)
        return done.stdout + done.stderr

    def up(self) -> None:
        self.compose("up", "--detach")
        self.wait_for_health()

    def wait_for_health(self) -> None:
        """Until every server passes its health check and Prefect reaches its database."""

        def healthy() -> bool:
            states = [self.container(name).attrs["State"] for name, each in served().items()]
            return all(state.get("Health", {}).get("Status") == "healthy" for state in states) and self.is_ready()

        try:
            wait_until(healthy, "the health of all servers", seconds=400)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.api}/ready", timeout=10).is_success
        except httpx.TransportError:
            return False

    def container(self, service: str) -> Any:
        labels = [f"com.docker.compose.project={PROJECT}", f"com.docker.compose.service={service}"]
        (found,) = engine().containers.list(all=True, filters={"label": labels})
        return found

    def crash(self, *services: str) -> None:
        """Kills the main processes of `services` and of all stages at once, and waits until the services are back.

        ``docker kill`` would be an administrator's word that a service is to stay away.
        """
        found = {name: self.container(name) for name in services}
        pids = [each.attrs["State"]["Pid"] for each in (*found.values(), *self.stages().values())]
        command = [DOCKER, "run", "--rm", "--pid=host", "--user=root", BASE, "python", "-c"]
        subprocess.run([*command, f"import os; [os.kill(pid, 9) for pid in {pids}]"], check=True, capture_output=True)

        def are_back() -> bool:
            counts = {name: self.container(name).attrs["RestartCount"] for name in found}
            return all(count > found[name].attrs["RestartCount"] for name, count in counts.items())

        wait_until(are_back, f"the restart of {services}", seconds=120)
        self.wait_for_health()

    def stages(self) -> dict[str, Any]:
        """Containers of stages, by stage."""
        found = engine().containers.list(all=True, filters={"label": f"{OF_STAGE}.repository={self.repository}"})
        return {each.labels[f"{OF_STAGE}.stage"]: each for each in found}

    @property
    def artifacts(self) -> Path:
        return self.repository / "runs" / NAME / "artifacts"

    def last_step(self) -> int:
        """Step of the newest checkpoint of the training; 0 if there is none."""
        found = self.artifacts.glob("checkpoints/*/step-*")
        return max((int(path.name.removeprefix("step-")) for path in found), default=0)

    def log_of(self, run_id: str) -> str:
        """What a run has logged, in order."""
        wanted = {"logs": {"flow_run_id": {"any_": [run_id]}}, "limit": 200}
        pages = [self.post("logs/filter", {**wanted, "offset": offset}) for offset in range(0, 2000, 200)]
        return "\n".join(each["message"] for page in pages for each in page)

    def s3(self) -> Any:
        """A client of the store, with the keys that compose gave it."""
        names = {"aws_access_key_id": "STORE_ACCESS_KEY", "aws_secret_access_key": "STORE_SECRET_KEY"}
        keys = {name: self.values[variable] for name, variable in names.items()}
        return boto3.client("s3", endpoint_url=self.store, region_name="us-east-1", **keys)

    def weights(self) -> set[bytes]:
        """What the store holds of models."""
        keys = [key for key in self.kept()["objects"] if key.endswith("/model.safetensors")]
        return {self.s3().get_object(Bucket="mlflow", Key=key)["Body"].read() for key in keys}

    def kept(self) -> dict[str, Any]:
        """What must outlive the containers: Prefect's runs, MLflow's runs and versions, the objects of the store."""
        client = MlflowClient(self.mlflow)
        runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
        versions = client.search_model_versions()
        objects = self.s3().get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        flow_runs = self.post("flow_runs/filter", {})
        return {
            "flow runs": {run["id"]: (run["state"]["type"], run["parameters"]) for run in flow_runs},
            "runs": {run.info.run_id: (run.info.status, str(sorted(run.data.metrics.items()))) for run in runs},
            "versions": {f"{each.name}/{each.version}": (each.run_id, each.tags) for each in versions},
            "objects": {each["Key"]: (each["Size"], each["ETag"]) for page in objects for each in page["Contents"]},
        }


def served() -> dict[str, Any]:
    """The services of compose.yaml that stay up, but for those of the profile serve."""
    return {name: each for name, each in services().items() if "healthcheck" in each and "profiles" not in each}


@pytest.fixture
def images() -> Iterator[None]:
    """Every image of compose.yaml; those of others are built as stand-ins if the engine has none, and removed again."""
    for name in ("download", "train", "docker/server"):
        image_of(name)
    made = []
    for service in ("database", "store"):
        name = services()[service]["image"]
        try:
            engine().images.get(name)
        except ImageNotFound:
            folder = STAND_INS / name.rpartition(":")[0].rpartition("/")[2]
            command = [DOCKER, "build", "-t", name, str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            made.append(name)
    yield
    for name in made:
        engine().images.remove(name)


@pytest.fixture
def composed(images: None, tmp_path: Path) -> Iterator[Composed]:
    repository = copy_repository(tmp_path / "repository")
    draw_data_set(repository / "images", 0, {"train": 48, "valid": 24, "test": 24})
    if os.getuid() != USER:
        subprocess.run(["chown", "-R", f"{USER}:{USER}", str(repository)], check=True)
    socket = os.environ.get("DOCKER_HOST", "/var/run/docker.sock").removeprefix("unix://")
    values = filled(
        **{name: secrets.token_hex(16) for name in ("POSTGRES_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY")},
        FUSELIP_REPOSITORY=str(repository),
        FUSELIP_UID=str(USER),
        FUSELIP_GID=str(USER),
        DOCKER_GID=str(Path(socket).stat().st_gid),
        DOCKER_SOCKET=socket,
    )
    ports = {port: free_port() for port in (4200, 5000, 7070)}
    prefect, mlflow, store = (f"http://127.0.0.1:{port}" for port in ports.values())
    stack = Composed(repository, prefect, mlflow, compose(tmp_path, values, ports), values, store)
    try:
        stack.up()
        yield stack
    finally:
        for left in stack.stages().values():
            left.remove(force=True)
        stack.compose("down", "--volumes", "--timeout", "20")


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    size = {"width": 1280, "height": 900}
    with opened_browser() as browser, opened_page(browser, [], tmp_path / "last.png", viewport=size) as page:
        yield page


def test_nothing_is_lost(page: Page, composed: Composed) -> None:
    root = str(composed.repository / "images")
    request = {"recipe": "sample", "size": "tiny", "root": root, "name": NAME, "steps": 3, "overrides": OVERRIDES}
    first = run_from_the_page(page, composed, request)
    assert read_json(composed.artifacts / "registered.json", "see the log")["version"] == 1
    second = run_through_all_ends(composed, {**request, "steps": LONG_STEPS})
    kept = composed.kept()
    assert {first, second} <= set(kept["flow runs"]) and len(kept["versions"]) == 2
    composed.compose("down")
    composed.up()
    assert composed.kept() == kept
    assert (composed.artifacts / "model" / "model.safetensors").read_bytes() in composed.weights()


def run_from_the_page(page: Page, composed: Composed, request: dict[str, Any]) -> str:
    """A run that is started in Prefect's form, and completed on its page."""
    open_form(page, composed, DEPLOYMENT)
    fill_form(page, request)
    run_id = send_form(page)
    address = page.url
    # Drawing a run that is under way keeps a core busy.
    page.goto("about:blank")
    asked = composed.wait(run_id, {"Completed"})["parameters"]
    assert asked["runner"] == "docker" and asked["request"]["root"] == request["root"]
    page.goto(address)
    expect(page.get_by_text("Completed", exact=True).first).to_be_visible()
    page.goto("about:blank")
    return run_id


def run_through_all_ends(composed: Composed, request: dict[str, Any]) -> str:
    """A run whose training loses database, worker and container, and then the stack; its id once it is completed."""
    run_id = composed.start(f"pipeline/{DEPLOYMENT}", request=request, runner="docker")
    wait_until(composed.last_step, "a checkpoint")
    composed.crash("database", "worker")
    killed = composed.last_step()
    wait_until(lambda: composed.last_step() > killed, "the next checkpoint")
    composed.compose("down")
    assert not composed.stages(), "a stage goes on without the stack"
    stopped = composed.last_step()
    composed.up()
    run = composed.wait(run_id, {"Completed"})
    assert run["labels"][RECOVERIES] == "2"
    resumed = re.findall(r"resuming from step (\d+)", composed.log_of(run_id))
    assert [int(step) for step in resumed] == [killed, stopped]
    history = (composed.artifacts / "history.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in history]
    assert steps == sorted(steps) and steps[-1] == request["steps"]
    return run_id
