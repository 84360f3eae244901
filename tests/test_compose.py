"""docker/compose.yaml: every service is watched, reachable from this machine only, and has no password of its own."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ONE_SHOT = {"buckets", "deployments"}


@pytest.fixture
def text(repository: Path) -> str:
    return (repository / "docker" / "compose.yaml").read_text()


@pytest.fixture
def services(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)["services"]


def test_the_whole_stack_is_there(services: dict[str, Any]) -> None:
    assert set(services) == {"database", "store", "buckets", "mlflow", "prefect", "deployments", "worker", "models"}
    assert "@champion" in " ".join(services["models"]["command"])


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
    assert "--pool process" in services["worker"]["command"][-1]


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


def test_compose_itself_accepts_it(repository: Path, text: str, tmp_path: Path) -> None:
    """Docker's plugin, or Debian's docker-compose, which is older and knows no name of the whole."""
    commands = (["docker", "compose"], ["docker-compose"])
    command = next((each for each in commands if answers(each)), None)
    if command is None:
        pytest.skip("needs the compose plugin of docker, or Debian's docker-compose")
    docker = tmp_path / "docker"
    docker.mkdir()
    old = command == ["docker-compose"]
    (docker / "compose.yaml").write_text(re.sub(r"^name: .*\n", "", text, flags=re.MULTILINE) if old else text)
    example = (repository / "docker" / ".env.example").read_text()
    filled = re.sub(r"=$", "=1000", example, flags=re.MULTILINE)
    filled = filled.replace("FUSELIP_REPOSITORY=1000", f"FUSELIP_REPOSITORY={repository}")
    for content, wanted in ((filled, True), (example, False)):
        (tmp_path / "env").write_text(content)
        files = ["--env-file", str(tmp_path / "env"), "-f", str(docker / "compose.yaml")]
        done = subprocess.run([*command, *files, "config", "--quiet"], capture_output=True, text=True)
        assert (done.returncode == 0) == wanted, done.stderr
    assert "in docker/.env" in done.stderr, "what is empty is not named"


def answers(command: list[str]) -> bool:
    """Whether there is such a command."""
    with contextlib.suppress(OSError):
        return subprocess.run([*command, "version"], capture_output=True).returncode == 0
    return False
