"""`make serve-flows` leaves nothing running, however it is asked to end."""

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


@pytest.mark.parametrize("numbers", [(signal.SIGHUP,), (signal.SIGINT, signal.SIGINT)])
def test_a_signal_ends_every_server(repository: Path, tmp_path: Path, numbers: tuple[signal.Signals, ...]) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PREFECT_HOME": str(tmp_path), "HOME": str(tmp_path)}
    command = [sys.executable, "-c", CODE]
    process = subprocess.Popen(command, cwd=repository, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "up\n"
    servers = psutil.Process(process.pid).children(recursive=True)
    assert len(servers) >= 4
    for number in numbers:
        process.send_signal(number)
    assert process.wait(120) == 0
    assert not [server for server in servers if server.is_running() and server.status() != psutil.STATUS_ZOMBIE]
