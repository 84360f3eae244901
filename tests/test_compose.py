"""docker/compose.yaml: every service is watched, reachable from this machine only, and has no password of its own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from compose import compose, filled
from engine import image_of
from prefect_stack import free_port, wait_until

from fuselip_core.config import Settings

ONE_SHOT = {"buckets", "deployments", "store-folder"}


@pytest.fixture
def text(repository: Path) -> str:
    return (repository / "docker" / "compose.yaml").read_text()


@pytest.fixture
def services(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["services"]


def test_the_whole_stack_is_there(services: dict[str, Any]) -> None:
    assert set(services) == {
        "database",
        "store",
        "store-folder",
        "buckets",
        "mlflow",
        "prefect",
        "deployments",
        "worker",
        "models",
        "search",
    }
    assert "@champion" in " ".join(services["models"]["command"])


def test_images_of_others_are_pinned(repository: Path, services: dict[str, Any]) -> None:
    """To a digest, or to an exact version whose digest Renovate adds: no registry can be asked from here."""
    images = {service["image"] for service in services.values()}
    theirs = sorted(image for image in images if not image.startswith("bacor_fuselip_"))
    assert len(theirs) == 2
    assert all(re.search(r"@sha256:[0-9a-f]{64}$|:v?\d+\.\d+(\.\d+)?(-\w+)?$", image) for image in theirs), theirs
    assert "docker:pinDigests" in json.loads((repository / ".github" / "renovate.json").read_text())["extends"]


def test_every_service_is_watched_and_waits_for_what_it_needs(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert ("healthcheck" in service) != (name in ONE_SHOT), name
        for other, how in service.get("depends_on", {}).items():
            wanted = "service_completed_successfully" if other in ONE_SHOT else "service_healthy"
            assert how["condition"] == wanted, (name, other)
            assert other in services


def test_what_is_deployed_is_what_the_worker_runs(repository: Path, services: dict[str, Any]) -> None:
    deployed = re.findall(r"--name (\S+)", services["deployments"]["command"][-1])
    declared = {each["name"]: each for each in yaml.safe_load((repository / "prefect.yaml").read_text())["deployments"]}
    pools = {declared[name]["work_pool"]["name"] for name in deployed}
    assert len(deployed) >= 5 and pools == {"process"}
    assert "--pool process" in " ".join(services["worker"]["command"])


def test_every_deployment_works_with_what_the_form_shows(repository: Path, services: dict[str, Any]) -> None:
    """The worker's image has no torch, so stages and downloads run in the project's images by default."""
    for name in ("deployments", "worker"):
        assert services[name]["environment"]["FUSELIP_RUNNER"] == "docker"
    schema = "from flows.{0} import {0}; print({0}.parameters.properties['runner']['default'])"
    for flow in ("pipeline", "download", "evaluate", "register", "train"):
        command = [sys.executable, "-c", schema.format(flow)]
        environment = {**os.environ, "FUSELIP_RUNNER": "docker"}
        done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == "docker", done.stderr
    declared = yaml.safe_load((repository / "prefect.yaml").read_text())["deployments"]
    assert not [each["name"] for each in declared if each["parameters"].get("runner") == "process"]


def test_no_service_has_more_rights_or_room_than_it_needs(repository: Path, services: dict[str, Any]) -> None:
    assert "\nUSER 1000:1000\n" in (repository / "docker" / "Dockerfile.server").read_text()
    for name, service in services.items():
        assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"] and service["logging"]["options"]["max-size"] == "10m", name
        mine = service.get("user", "1000:1000" if service["image"] == "bacor_fuselip_server" else "root")
        assert (mine == "root") == (name == "store-folder"), name
        assert "PASSWORD" not in " ".join(service.get("command", [])), "every user of the machine could list it"


def test_links_lead_where_a_browser_gets(services: dict[str, Any]) -> None:
    ports = {name: services[name]["ports"][0].rpartition(":")[0] for name in ("prefect", "mlflow")}
    stated = services["worker"]["environment"]
    assert stated["PREFECT_UI_URL"] == f"http://{ports['prefect']}/v2"
    assert stated["FUSELIP_MLFLOW_UI"] == f"http://{ports['mlflow']}"


def test_the_workers_health_is_its_own(services: dict[str, Any]) -> None:
    assert "--with-healthcheck" in services["worker"]["command"]
    assert "http://127.0.0.1:8080/health" in " ".join(services["worker"]["healthcheck"]["test"])


def test_ports_are_this_machines_alone(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) >= 4 and all(port.startswith("127.0.0.1:") for port in ports)


def test_volumes_are_declared_and_files_exist(repository: Path, text: str, services: dict[str, Any]) -> None:
    declared = set(yaml.safe_load(text)["volumes"])
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert os.access(repository / "docker" / source, os.X_OK)
            elif not source.startswith(("/", "$")):
                assert source in declared
    for build in (service["build"] for service in services.values() if "build" in service):
        assert (repository / "docker" / build["context"] / build["dockerfile"]).is_file()


def test_secrets_must_be_given_and_are_nowhere(repository: Path, text: str) -> None:
    example = dict(
        line.split("=", 1)
        for line in (repository / "docker" / ".env.example").read_text().splitlines()
        if line and not line.startswith("#")
    )
    used = set(re.findall(r"\$\{([A-Z_]+)", text))
    assert used == set(example)
    required = set(re.findall(r"\$\{([A-Z_]+):\?", text))
    assert {name for name in used if re.search("PASSWORD|KEY", name)} <= required
    assert all(example[name] == "" for name in required)
    assert not re.search(r"(PASSWORD|SECRET|ACCESS_KEY\w*): (?!\$\{)", text)


def test_compose_itself_accepts_it(repository: Path, tmp_path: Path) -> None:
    values = filled(FUSELIP_REPOSITORY=str(repository))
    for given, wanted in ((values, True), (dict.fromkeys(values, ""), False)):
        done = subprocess.run([*compose(tmp_path, given), "config", "--quiet"], capture_output=True, text=True)
        assert (done.returncode == 0) == wanted, done.stderr
    assert "in compose.env" in done.stderr, "what is empty is not named"


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_the_search_service_answers_from_an_index_in_the_repository(
    repository: Path, finished_run: Settings, tmp_path: Path
) -> None:
    """The service alone, of the real file, by a real compose; the other services need images of others."""
    image_of("train")
    image_of("docker/search")
    place = tmp_path / "checkout"
    for name in ("prepared", "model"):
        shutil.copytree(finished_run.artifacts / name, place / "artifacts" / name)
    values = filled(FUSELIP_REPOSITORY=str(place), FUSELIP_UID=str(os.getuid()), FUSELIP_GID=str(os.getgid()))
    port = free_port()
    command = [*compose(tmp_path, values, {8000: port}), "--profile", "serve"]

    def call(*words: str) -> str:
        done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    # Built with the whole repository mounted, as the worker has it: a new index is made beside the old one.
    built = ["docker", "run", "--rm", "--read-only", "--tmpfs", "/tmp", "--user", f"{os.getuid()}:{os.getgid()}"]
    built += ["-v", f"{place}:{place}", "bacor_fuselip_search", "index", "build", str(place / "artifacts" / "prepared")]
    built += ["--model", str(place / "artifacts" / "model"), "--index", str(place / "index")]
    done = subprocess.run(built, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    try:
        call("up", "--detach", "--no-deps", "search")
        address = f"http://127.0.0.1:{port}"

        def ready() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{address}/ready", timeout=5).is_success
            return False

        try:
            wait_until(ready, "the search server's readiness", seconds=300)
        except AssertionError as error:
            raise AssertionError(call("logs", "search")[-3000:]) from error
        answer = httpx.post(f"{address}/v1/search", json={"text": "a disc", "limit": 3}, timeout=120)
        assert answer.is_success, answer.text
        assert len(answer.json()["data"]) == 3
        assert {path.stat().st_uid for path in (place / "index").rglob("*")} == {os.getuid()}
    finally:
        call("down", "--volumes", "--timeout", "20")
