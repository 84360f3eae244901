"""A Docker Engine for the tests that need one, and the images of this checkout."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from docker import DockerClient, from_env
from docker.errors import DockerException, ImageNotFound

# A read-only root file system, with the one place that everything needs.
CLOSED = ("--read-only", "--tmpfs", "/tmp")
REPOSITORY = Path(__file__).parents[1]
BASE = "python:3.11-slim-bookworm"
# Where both clients are installed, Debian's has both builders.
DOCKER = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"


def engine() -> DockerClient:
    """A client of the engine; skips the test, or fails with FUSELIP_NEED_DOCKER, where none answers or has the base."""
    absent = pytest.fail if os.environ.get("FUSELIP_NEED_DOCKER") else pytest.skip
    try:
        client = from_env(timeout=60)
        client.ping()
        client.images.get(BASE)
    except ImageNotFound:
        absent(f"needs the image {BASE}")
    except DockerException:
        absent("needs a Docker Engine (DOCKER_HOST); ../shared/tools/docker-engine.sh starts one")
    return client


@functools.cache
def image_of(name: str) -> str:
    """The image of this checkout, built once a session; `name` is that of its Dockerfile, `docker/` in front or not."""
    engine()
    build(name)
    return f"bacor_fuselip_{Path(name).name}"


def build(name: str, tag: str = "latest", buildkit: bool = True, folder: Path = REPOSITORY) -> str:
    """Builds a Dockerfile of `folder` as users do and returns what the builder said."""
    place = Path(name)
    dockerfile, image = place.with_name(f"Dockerfile.{place.name}"), f"bacor_fuselip_{place.name}:{tag}"
    command = [DOCKER, "build", "-f", str(dockerfile), "-t", image, "."]
    environment = {**os.environ, "DOCKER_BUILDKIT": str(int(buildkit))}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout + done.stderr


def run(image: str, *words: str, options: tuple[str, ...] = (), user: int = 12345) -> subprocess.CompletedProcess[str]:
    """``docker run`` as a user without a passwd entry."""
    command = [DOCKER, "run", "--rm", "-u", f"{user}:{user}", *options, image, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=550)


class Mounted:
    """Folders of a user on the host, as the published command lines mount them; closed: nothing else may be written."""

    def __init__(self, place: Path, data: Path, user: int = 12345) -> None:
        self.place, self.user = place, user
        self.models, self.logs = place / "models", place / "logs"
        place.chmod(0o755)
        self.options: tuple[str, ...] = ("-v", f"{data}:/workspace/ROCOv2_data:ro")
        for folder in (self.models, self.logs):
            folder.mkdir()
            os.chown(folder, user, user)
            self.options += ("-v", f"{folder}:/workspace/{folder.name}")

    def run(self, *words: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        """The training image with `words`."""
        return run("bacor_fuselip_train", *words, options=(*CLOSED, *self.options, *options), user=self.user)


def services() -> dict[str, Any]:
    """Those of the stack, as docker/compose.yaml has them."""
    return dict(yaml.safe_load((REPOSITORY / "docker" / "compose.yaml").read_text())["services"])


@contextlib.contextmanager
def serving(
    image: str, *words: str, check: Sequence[str], options: tuple[str, ...] = CLOSED, user: int = 12345
) -> Iterator[str]:
    """Name of a container that serves, given out once `check`, a health check, passes in it."""
    name = f"fuselip-test-{os.getpid()}"
    command = [DOCKER, "run", "-d", "--name", name, "-u", f"{user}:{user}", *options, image, *words]
    subprocess.run(command, check=True, capture_output=True)
    try:
        late = time.monotonic() + 240
        while (tried := subprocess.run([DOCKER, "exec", name, *check], capture_output=True, text=True)).returncode:
            said = subprocess.run([DOCKER, "logs", name], capture_output=True, text=True)
            ended = "is not running" in tried.stderr
            assert not ended and time.monotonic() < late, said.stdout[-2000:] + said.stderr[-2000:]
            time.sleep(1)
        yield name
    finally:
        subprocess.run([DOCKER, "rm", "-f", name], capture_output=True)


def ask(name: str, code: str) -> subprocess.CompletedProcess[str]:
    """``python -c`` inside a container that serves."""
    return subprocess.run([DOCKER, "exec", name, "python", "-c", code], capture_output=True, text=True)


def labels_of(image: str) -> dict[str, str]:
    """An image's OCI labels."""
    done = subprocess.run([DOCKER, "image", "inspect", image], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout)[0]["Config"]["Labels"])
