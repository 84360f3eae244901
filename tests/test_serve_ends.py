"""`make serve-flows` and the worker of the stack leave nothing running, however they are asked to end."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

# The real main with stand-ins for the servers, which take half a minute to start.
CODE = """
import os, sys
from pathlib import Path
from flows.server import serve
start = serve.Stack.start
serve.Stack.start = lambda self, name, *_, **__: start(self, name, "http.server", "0")
serve.Stack.run = serve.Stack.wait_for = lambda *_: None
serve.prepare_server = serve.prepare_store = serve.require_free = lambda *_: None
serve._say_where = lambda *_: print("up", flush=True)
serve.main()
"""


# As a container's main process: a worker and recovery, and nothing else.
WORKER = """
from flows.server import worker
start, both = worker.Stack.start, worker.start_worker
worker.Stack.start = lambda self, name, *_, **__: start(self, name, "http.server", "0")
worker.start_worker = lambda stack, words: (both(stack, words), print("up", flush=True))
worker.main()
"""


@pytest.mark.parametrize(
    ("code", "parts", "numbers"),
    [
        (CODE, 4, (signal.SIGHUP,)),
        (CODE, 4, (signal.SIGINT, signal.SIGINT)),
        (WORKER, 2, (signal.SIGTERM, signal.SIGTERM)),
    ],
)
def test_a_signal_ends_everything(
    repository: Path, tmp_path: Path, code: str, parts: int, numbers: tuple[signal.Signals, ...]
) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PREFECT_HOME": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "up\n"
    servers = psutil.Process(process.pid).children(recursive=True)
    assert len(servers) == parts
    for number in numbers:
        process.send_signal(number)
    assert process.wait(120) == 0
    assert not [server for server in servers if server.is_running() and server.status() != psutil.STATUS_ZOMBIE]
