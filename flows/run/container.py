"""Runs stages in containers: DVC stays outside and decides; the stage's command runs in the project's image.

The flow puts docker/stage/ first in PATH, so that DVC's ``fuselip train ...`` arrives in `main` below. What DVC, the
lock and a stopped run look like is therefore the same as without containers, and so are the outputs: the container
sees the repository under its own path and runs its code; the image brings the libraries.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

from filelock import FileLock, Timeout

from flows.run.runner import OnLine, ProcessRunner
from fuselip_core.config import Settings, load_settings
from fuselip_core.errors import FuselipError, run_to_exit
from fuselip_core.lock import sole_process
from fuselip_core.registry.state import changes_of, commit_of

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

LABEL = "fuselip"
IMAGES = {"download": "bacor_fuselip_download", "train": "bacor_fuselip_train", "search": "bacor_fuselip_search"}
KINDS = {"prepare": "download", "data": "download", "embed": "search", "index": "search"}  # of a verb; else train
# A stage saves its state in this time; less than flows/run/child.py waits for this process.
GRACE_SECONDS = 45
ENTRYPOINT = ("/usr/local/bin/entrypoint", "python", "-m", "fuselip_core.container", "fuselip")
# Also thread counts, which decide the order of sums, so that a container makes the same bytes.
PASSED_ON = (
    "FUSELIP_",
    "MLFLOW_",
    "WANDB_",
    "HF_",
    "ZENODO_",
    "OMP_",
    "MKL_",
    "OPENBLAS_",
    "AWS_",
    "DO_NOT_TRACK",
    "NO_PROXY",
    "HTTP_PROXY",
    "HTTPS_PROXY",
)
NO_DRIVER = "could not select device driver"
TOOLKIT = (
    "the Docker Engine can't hand out GPUs: install NVIDIA's Container Toolkit on this machine (package "
    "nvidia-container-toolkit, then `nvidia-ctk runtime configure --runtime=docker` and restart docker), "
    "or set FUSELIP_GPUS=none to train on the CPU"
)


class ContainerError(FuselipError):
    """The engine, the image or the GPU is missing; the message says what to install, build or start."""


class ContainerRunner(ProcessRunner):
    """Runs the stage through DVC in a child process, and there its command in a container."""

    def environment(self, repository: Path) -> dict[str, str]:
        """An environment in which `fuselip` means a container."""
        environment = super().environment(repository)
        environment["PATH"] = f"{repository / 'docker' / 'stage'}{os.pathsep}{environment['PATH']}"
        environment["FUSELIP_REPOSITORY"] = str(repository)
        return environment


@dataclass(frozen=True)
class ContainerRequest:
    """Everything about a container that is to run ``fuselip <arguments>``."""

    image: str
    arguments: Sequence[str]
    folder: Path
    environment: Mapping[str, str]
    volumes: Mapping[str, Mapping[str, str]]
    labels: Mapping[str, str]
    gpus: bool = False
    network: str = "bridge"
    limits: Mapping[str, Any] = field(default_factory=dict)
    entrypoint: Sequence[str] = ENTRYPOINT

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the SDK's ``containers.create``."""
        from docker.types import DeviceRequest

        options: dict[str, Any] = {
            "image": self.image,
            "entrypoint": list(self.entrypoint),
            "command": list(self.arguments),
            "user": f"{os.getuid()}:{os.getgid()}",
            "working_dir": str(self.folder),
            "environment": dict(self.environment),
            "volumes": {source: dict(how) for source, how in self.volumes.items()},
            "labels": dict(self.labels),
            "network_mode": self.network,
            "read_only": True,
            "tmpfs": {"/tmp": "exec,mode=1777"},  # noqa: S108 - torch.compile loads what it writes there
            "security_opt": ["no-new-privileges"],
            "pids_limit": 4096,
            **self.limits,
        }
        if self.gpus:
            options["device_requests"] = [DeviceRequest(count=-1, capabilities=[["gpu"]])]
        return options


def main() -> None:
    """``python -m flows.run.container train --settings params.yaml``: the verb of `fuselip` in its container."""
    repository = Path(os.environ.get("FUSELIP_REPOSITORY", Path.cwd()))
    client = connect()
    sweep(client, repository, _write)
    request = request_for(client, sys.argv[1:], repository)
    twice = ContainerError(f"another process waits for this container of {request.labels[f'{LABEL}.stage']} already")
    with sole_process(_lock(repository, request.labels), twice):
        code = run_container(client, request, _write)
    sys.exit(code)


def connect() -> DockerClient:
    """A client of the engine that DOCKER_HOST names, or of the local one; raises ContainerError if none answers."""
    try:
        from docker import from_env
    # Without the library, the repository's own docker/ folder imports as an empty namespace.
    except ImportError as error:
        raise ContainerError("the docker SDK is not installed; `make setup` brings it") from error
    from docker.errors import DockerException

    try:
        client = from_env(timeout=120)
        client.ping()
    except DockerException as error:
        place = os.environ.get("DOCKER_HOST", "its usual socket")
        raise ContainerError(
            f"no Docker Engine answers at {place}; start it and see that you may use it (`docker info`), "
            "or choose --runner process"
        ) from error
    return client


def request_for(client: DockerClient, words: Sequence[str], repository: Path) -> ContainerRequest:
    """The container for ``fuselip <words>`` called in the current folder."""
    stage = words[0] if words else ""
    kind = KINDS.get(stage, "train")
    environment = _passed_on(repository)
    return ContainerRequest(
        image=os.environ.get(f"FUSELIP_{kind.upper()}_IMAGE", IMAGES[kind]),
        arguments=words,
        folder=Path.cwd(),
        environment=environment,
        volumes=volumes_of(repository, _settings_of(words), environment),
        labels={
            f"{LABEL}.repository": str(repository),
            f"{LABEL}.stage": stage,
            f"{LABEL}.lock": f"container-{uuid4().hex}.lock",
            f"{LABEL}.flow-run": os.environ.get("FUSELIP_FLOW_RUN", ""),
        },
        gpus=kind != "download" and wants_gpu(client),
        network=os.environ.get("FUSELIP_NETWORK") or _network_to(environment.get("MLFLOW_TRACKING_URI", "")),
        limits=_limits(),
    )


def run_container(client: DockerClient, request: ContainerRequest, on_line: OnLine) -> int:
    """Runs a container to its end, passes its lines on as they come, removes it, and returns its exit code.

    SIGTERM to this process goes on to the container, which has GRACE_SECONDS to save its state.
    """
    container = _create(client, request)
    stopping = threading.Event()

    def stop(*_: object) -> None:
        stopping.set()
        _stop_beside(container)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        _start(container)
        # A signal before the start found nothing to stop.
        if stopping.is_set():
            _stop_beside(container)
        for line in _lines(container):
            on_line(line)
        code = int(container.wait()["StatusCode"])
        container.reload()
        if container.attrs["State"].get("OOMKilled"):
            on_line("error: the container ran out of memory; raise FUSELIP_MEMORY, or lower the batch size")
        return code
    finally:
        signal.signal(signal.SIGTERM, before)
        container.remove(force=True)


def sweep(client: DockerClient, repository: Path, on_line: OnLine) -> int:
    """Stops and removes what killed runs of this repository left; returns how many that were.

    Containers that a process still waits for stay: a download may run beside a stage.
    """
    from docker.errors import NotFound

    left = client.containers.list(all=True, filters={"label": f"{LABEL}.repository={repository}"})
    stopped = 0
    for container in left:
        # A lock in the checkout, since the number of a process means nothing in another container.
        lock = _lock(repository, container.labels)
        with contextlib.suppress(NotFound, Timeout), FileLock(lock, timeout=0):
            on_line(f"stopping the container that an earlier run left behind ({container.labels[f'{LABEL}.stage']})")
            container.stop(timeout=GRACE_SECONDS)
            container.remove(force=True)
            lock.unlink(missing_ok=True)
            stopped += 1
    return stopped


def _lock(repository: Path, labels: Mapping[str, str]) -> Path:
    """The file that is locked while a process waits for the container with these labels."""
    path = repository / ".dvc" / "tmp" / labels.get(f"{LABEL}.lock", "container.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def volumes_of(
    repository: Path, settings: Settings | None, environment: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Folders that a stage reads and writes, mounted under their own paths."""
    volumes = {str(repository): {"bind": str(repository), "mode": "rw"}}
    if settings:
        for given in (settings.prepare.root, settings.codebook.init, settings.train.init):
            place = Path(given).resolve() if given else repository
            if place.exists() and not place.is_relative_to(repository):
                volumes[str(place)] = {"bind": str(place), "mode": "ro"}
        artifacts = settings.artifacts.resolve()
        if not artifacts.is_relative_to(repository):
            artifacts.mkdir(parents=True, exist_ok=True)
            volumes[str(artifacts)] = {"bind": str(artifacts), "mode": "rw"}
    uri = environment.get("MLFLOW_TRACKING_URI", "")
    store = Path(uri.removeprefix("sqlite:///")).parent
    if uri.startswith("sqlite:////") and not store.is_relative_to(repository):
        store.mkdir(parents=True, exist_ok=True)
        volumes[str(store)] = {"bind": str(store), "mode": "rw"}
    cache = Path.home() / ".cache"
    # A flow that is itself in a container has its home in /tmp, which is not the machine's.
    if cache.is_dir() and os.access(cache, os.W_OK) and not cache.is_relative_to(tempfile.gettempdir()):
        volumes[str(cache)] = {"bind": "/.cache", "mode": "rw"}
    return volumes


def wants_gpu(client: DockerClient) -> bool:
    """FUSELIP_GPUS: `all`, `none`, or `auto` (default): if the machine has a driver or the engine a runtime."""
    choice = os.environ.get("FUSELIP_GPUS", "auto")
    if choice not in ("all", "none", "auto"):
        raise ContainerError(f"FUSELIP_GPUS is '{choice}'; it may be all, none or auto")
    if choice != "auto":
        return choice == "all"
    return "nvidia" in client.info().get("Runtimes", {}) or Path("/proc/driver/nvidia/version").exists()


def _create(client: DockerClient, request: ContainerRequest) -> Container:
    from docker.errors import APIError, ImageNotFound

    try:
        return client.containers.create(**request.options())
    except ImageNotFound as error:
        kind = next((kind for kind, name in IMAGES.items() if name == request.image), None)
        file = f"{'docker/' if kind == 'search' else ''}Dockerfile.{kind}"
        remedy = f"; `docker build -f {file} -t {request.image} .` makes it" if kind else ""
        raise ContainerError(f"there is no image {request.image}{remedy}") from error
    except APIError as error:
        raise ContainerError(f"the engine refuses the container: {error.explanation}") from error


def _start(container: Container) -> None:
    from docker.errors import APIError

    try:
        container.start()
    except APIError as error:
        reason = str(error.explanation)
        raise ContainerError(TOOLKIT if NO_DRIVER in reason or "nvidia" in reason else reason) from error


def _stop_beside(container: Container) -> None:
    """Stops in a thread, so that this one can read the container's last lines."""
    threading.Thread(target=container.stop, kwargs={"timeout": GRACE_SECONDS}, daemon=True).start()


def _lines(container: Container) -> Any:
    """Lines of stdout and stderr as they come, whole."""
    rest = b""
    for block in container.logs(stream=True, follow=True):
        *lines, rest = (rest + block).split(b"\n")
        yield from (line.decode("utf-8", "replace").rstrip("\r") for line in lines)
    if rest:
        yield rest.decode("utf-8", "replace")


def _passed_on(repository: Path) -> dict[str, str]:
    """The variables of this process that a stage may need."""
    passed = {name: value for name, value in os.environ.items() if name.upper().startswith(PASSED_ON)}
    # The image has no git to say which code it runs.
    if commit := commit_of(repository):
        passed["FUSELIP_COMMIT"] = commit
    if changes := changes_of(repository):
        patch = repository / ".dvc" / "tmp" / "changes.patch"
        patch.parent.mkdir(parents=True, exist_ok=True)
        patch.write_bytes(changes)
        passed["FUSELIP_CHANGES"] = str(patch)
    return {**passed, "PYTHONPATH": str(repository)}


def _settings_of(words: Sequence[str]) -> Settings | None:
    if "--settings" not in words[:-1]:
        return None
    return load_settings(Path(words[words.index("--settings") + 1]))


def _limits() -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if memory := os.environ.get("FUSELIP_MEMORY"):
        limits |= {"mem_limit": memory, "memswap_limit": memory}
    if cpus := os.environ.get("FUSELIP_CPUS"):
        limits["nano_cpus"] = int(float(cpus) * 1e9)
    if os.getuid():
        limits["cap_drop"] = ["ALL"]
    return limits


def _network_to(uri: str) -> str:
    """The host's network for a tracking server on this machine, which a container could not reach otherwise."""
    return "host" if urlsplit(uri).hostname in ("localhost", "127.0.0.1", "::1") else "bridge"


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    run_to_exit(main)
