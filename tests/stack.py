"""The servers of docker/compose.yaml, started from their packages: PostgreSQL, an S3 store, MLflow and Prefect.

Commands and settings are read from compose.yaml itself and turned to free ports of this machine, so that what a test
sees working is what the file says. Only the store is another one: moto's server in place of the image.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from needs import missing

REPOSITORY = Path(__file__).parents[1]
TOOLS = Path(sys.executable).parent
COMPOSE = REPOSITORY / "docker" / "compose.yaml"
START_SECONDS = 400.0
# What a test's own surroundings must not decide.
FOREIGN = ("PREFECT_", "MLFLOW_", "AWS_", "FUSELIP_", "PG")


@dataclass
class Stack:
    """Addresses of the running servers, and how to run a process among them."""

    folder: Path
    ports: Mapping[str, int]
    values: Mapping[str, str]  # of the variables that docker/.env sets
    children: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def api(self) -> str:
        return f"http://127.0.0.1:{self.ports['prefect']}/api"

    @property
    def tracking(self) -> str:
        return f"http://127.0.0.1:{self.ports['mlflow']}"

    @property
    def store(self) -> str:
        return f"http://127.0.0.1:{self.ports['store']}"

    def environment(self, service: str) -> dict[str, str]:
        """What `service` finds in its environment by compose.yaml, among this process's other variables."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        stated = {name: self.here(value) for name, value in _service(service).get("environment", {}).items()}
        stated |= {
            "PATH": f"{TOOLS}{os.pathsep}{mine['PATH']}",
            "PREFECT_HOME": str(self.folder / f"prefect-{service}"),
        }
        # Unlike an image's packages, those of .venv may not be compiled yet.
        return {**mine, **_image_environment(), **stated, "PYTHONDONTWRITEBYTECODE": ""}

    def command(self, service: str) -> list[str]:
        """The command of `service` by compose.yaml."""
        words = [self.here(word) for word in _service(service)["command"]]
        return [shutil.which(words[0], path=TOOLS) or words[0], *words[1:]]

    def start(self, name: str, command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        """A process of its own group that ends with the stack; its output goes to <folder>/<name>.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command, cwd=self.folder, env=dict(environment), stdout=log, stderr=log, start_new_session=True
            )
        self.children.append(child)
        return child

    def said(self, name: str) -> str:
        """The last words of a process."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def here(self, text: str) -> str:
        """Text of compose.yaml with this machine's addresses and secrets in place of the containers'."""
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: self.values.get(found[1], ""), str(text))
        for host, port in (("store", 7070), ("mlflow", 5000), ("prefect", 4200)):
            text = text.replace(f"//{host}:{port}", f"//127.0.0.1:{self.ports[host]}")
            text = re.sub(rf"^(--port=)?{port}$", rf"\g<1>{self.ports[host]}", text)
        text = text.replace("@database/", f"@127.0.0.1:{self.ports['database']}/")
        return text.replace("0.0.0.0", "127.0.0.1")

    def stop(self) -> None:
        """Ends every process, the last first."""
        for child in reversed(self.children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM)
        for child in reversed(self.children):
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)


@contextlib.contextmanager
def s3_store(folder: Path) -> Iterator[Stack]:
    """An S3-compatible server with the buckets that compose.yaml makes, and nothing else."""
    stack = Stack(folder, _free_ports("store", "mlflow", "prefect", "database"), _made_up_values())
    try:
        _start_store(stack)
        yield stack
    finally:
        stack.stop()


@contextlib.contextmanager
def database(folder: Path) -> Iterator[str]:
    """The address of an empty PostgreSQL database."""
    stack = Stack(folder, _free_ports("database"), _made_up_values())
    with _database(stack):
        password, port = stack.values["POSTGRES_PASSWORD"], stack.ports["database"]
        yield f"postgresql+psycopg2://fuselip:{password}@127.0.0.1:{port}/mlflow"


@contextlib.contextmanager
def whole_stack(folder: Path) -> Iterator[Stack]:
    """PostgreSQL, the store, MLflow's server and Prefect's server, all answering."""
    with s3_store(folder) as stack, _database(stack):
        stack.start("mlflow", stack.command("mlflow"), stack.environment("mlflow"))
        stack.start("prefect", stack.command("prefect"), stack.environment("prefect"))
        _wait_for(stack, "mlflow", f"{stack.tracking}/health")
        _wait_for(stack, "prefect", f"{stack.api}/health")
        yield stack


def _start_store(stack: Stack) -> None:
    command = [str(TOOLS / "moto_server"), "-H", "127.0.0.1", "-p", str(stack.ports["store"])]
    stack.start("store", command, {**os.environ, "MOTO_S3_CUSTOM_ENDPOINTS": stack.store})
    _wait_for(stack, "store", f"{stack.store}/moto-api/")
    made = subprocess.run(stack.command("buckets"), env=stack.environment("buckets"), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@contextlib.contextmanager
def _database(stack: Stack) -> Iterator[None]:
    """PostgreSQL with the databases that docker/create-databases.sh makes; root gives its rights up for it."""
    programs = _postgresql()
    owner: dict[str, Any] = {}
    # Not pytest's folder, which only its owner may enter.
    with tempfile.TemporaryDirectory(prefix="fuselip-postgres-") as place:
        folder = Path(place)
        if os.getuid() == 0:
            user = _unprivileged()
            os.chown(folder, user.pw_uid, user.pw_gid)
            owner = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        (folder / "password").write_text(stack.values["POSTGRES_PASSWORD"])
        (folder / "password").chmod(0o644)
        command = ["-D", folder / "data", "-U", "fuselip", "--pwfile", folder / "password", *INITDB]
        made = subprocess.run(
            [programs / "initdb", *map(str, command)], cwd=folder, capture_output=True, text=True, **owner
        )
        assert made.returncode == 0, made.stderr
        options = ["-clisten_addresses=127.0.0.1", f"-cport={stack.ports['database']}", "-cunix_socket_directories="]
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", *options],
            cwd=folder,
            stderr=(stack.folder / "database.log").open("wb"),
            start_new_session=True,
            **owner,
        )
        try:
            _make_databases(stack, programs)
            yield
        finally:
            server.send_signal(signal.SIGINT)  # PostgreSQL's fast shutdown: clients are let go
            server.wait(60)


INITDB = ("--auth=scram-sha-256", "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync")


def _make_databases(stack: Stack, programs: Path) -> None:
    reach = {
        "PGHOST": "127.0.0.1",
        "PGPORT": str(stack.ports["database"]),
        "PGPASSWORD": stack.values["POSTGRES_PASSWORD"],
        "POSTGRES_USER": "fuselip",
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
    }
    _until(lambda: subprocess.run([programs / "pg_isready", "-q"], env=reach).returncode == 0, stack, "database")
    script = REPOSITORY / "docker" / "create-databases.sh"
    made = subprocess.run(["sh", script], env=reach, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def _postgresql() -> Path:
    """Folder of PostgreSQL's programs."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parts[-2]))
    on_path = shutil.which("pg_isready")
    places = [*reversed(debian), *([Path(on_path).parent] if on_path else [])]
    found = [folder for folder in places if (folder / "initdb").exists()]
    if not found:
        missing("needs PostgreSQL's server (Debian's package postgresql)")
    return found[0]


def _unprivileged() -> pwd.struct_passwd:
    """PostgreSQL refuses to run as root."""
    try:
        return pwd.getpwnam("postgres")
    except KeyError:
        return pwd.getpwnam("nobody")


def _service(name: str) -> dict[str, Any]:
    return dict(yaml.safe_load(COMPOSE.read_text())["services"][name])


def _image_environment() -> dict[str, str]:
    """What docker/Dockerfile.server sets for all that runs from its image."""
    text = (REPOSITORY / "docker" / "Dockerfile.server").read_text().replace("\\\n", " ")
    lines = [line.removeprefix("ENV ") for line in text.splitlines() if line.startswith("ENV ")]
    return dict(pair for line in lines for pair in re.findall(r"(\w+)=(\S+)", line))


def _made_up_values() -> dict[str, str]:
    names = ("POSTGRES_PASSWORD", "STORE_ACCESS_KEY", "STORE_SECRET_KEY")
    return {name: secrets.token_hex(16) for name in names} | {"FUSELIP_REPOSITORY": str(REPOSITORY)}


def _free_ports(*names: str) -> dict[str, int]:
    sockets = [socket.socket() for _ in names]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = {name: each.getsockname()[1] for name, each in zip(names, sockets, strict=True)}
    for each in sockets:
        each.close()
    return ports


def _wait_for(stack: Stack, name: str, address: str) -> None:
    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    _until(answers, stack, name)


def _until(ready: Any, stack: Stack, name: str) -> None:
    late = time.monotonic() + START_SECONDS
    while not ready():
        assert time.monotonic() < late, f"{name} did not come up: {stack.said(name)}"
        assert all(child.poll() is None for child in stack.children), f"ended early: {stack.said(name)}"
        time.sleep(0.2)
