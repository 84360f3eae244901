"""docker/compose.yaml for a real compose: beside others on the same machine, with made-up secrets."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from needs import missing

REPOSITORY = Path(__file__).parents[1]
# Of containers, volumes and the network, which the real file calls fuselip.
PROJECT = f"fuselip-test-{os.getpid()}"


def filled(**given: str) -> dict[str, str]:
    """The variables of docker/.env.example, with what is `given`; what must be filled in and is not given is 1000."""
    lines = (REPOSITORY / "docker" / ".env.example").read_text().splitlines()
    stated = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    return {name: given.get(name, value or "1000") for name, value in stated.items()}


def compose(folder: Path, values: Mapping[str, str], ports: Mapping[int, int] | None = None) -> list[str]:
    """A compose command for a copy of the real file in `folder`, with `ports` of this machine in place of the file's.

    Docker's plugin, or Debian's docker-compose, which is older and knows no name of the whole.
    """
    command = next((each for each in (["docker", "compose"], ["docker-compose"]) if answers(each)), None)
    if command is None:
        missing("needs the compose plugin of docker, or Debian's docker-compose")
    file = folder / "docker" / "compose.yaml"
    file.parent.mkdir(exist_ok=True)
    shutil.copy2(REPOSITORY / "docker" / "create-databases.sh", file.parent)
    text = _moved((REPOSITORY / "docker" / "compose.yaml").read_text(), ports or {})
    text = re.sub(r"^( +(?:FUSELIP_NETWORK|name): )fuselip$", rf"\g<1>{PROJECT}", text, flags=re.MULTILINE)
    file.write_text(re.sub(r"^name: .*\n", "", text, flags=re.MULTILINE) if len(command) == 1 else text)
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return [*command, "--env-file", str(folder / "env"), "-f", str(file), "--project-name", PROJECT]


def _moved(text: str, ports: Mapping[int, int]) -> str:
    """The file with other ports of this machine: where they are published, and in the addresses that a browser gets."""
    place = re.compile(r"((?:- |UI\w*: http://)127\.0\.0\.1:)(\d+)")
    return place.sub(lambda found: f"{found[1]}{ports.get(int(found[2]), found[2])}", text)


def answers(command: list[str]) -> bool:
    """Whether there is such a command."""
    with contextlib.suppress(OSError):
        return subprocess.run([*command, "version"], capture_output=True).returncode == 0
    return False
