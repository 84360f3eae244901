"""The server under load: dynamic batching against one at a time, by the same clients in turn.

    python benchmarks/serve.py --model artifacts/model [--kind both] [--clients 32] [--seconds 10] [--rounds 3]
    python benchmarks/serve.py --model artifacts/model --soak 10

batched               the server as it is
one row at a time     requests side by side, each row alone through the model
one request at a time the next request is looked at when the one before is answered

Each server is a process of its own, and so are the clients (locust, benchmarks/locustfile.py); all share this machine's
cores. --soak asks for so many minutes instead, good requests by locust and whatever the OpenAPI document allows or
forbids by schemathesis: no answer may be a 500, no good request may be lost, and memory may grow by 5 % at most.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
from measure import finish, machine, parser_of, spread

SINGLE = {"batch_rows": 1, "batch_wait_ms": 0.0}
VARIANTS = {"batched": {}, "one row at a time": SINGLE, "one request at a time": SINGLE}
HOST = "127.0.0.1"
BENCH = Path(__file__).parent
MOST_GROWTH = 0.05


def serve(model: str, port: int, variant: str) -> None:
    """A server with the limits of a variant, until it is ended."""
    import uvicorn

    from fuselip_core.serving.api import create_app
    from fuselip_core.serving.engine import open_engine
    from fuselip_core.serving.limits import Limits

    app = create_app(open_engine(model, None, Limits(**VARIANTS[variant])))  # type: ignore[arg-type]
    turn = asyncio.Lock()

    async def in_turn(scope: Any, receive: Any, send: Any) -> None:
        async with turn if scope["type"] == "http" else contextlib.nullcontext():
            await app(scope, receive, send)

    served_app = in_turn if variant == "one request at a time" else app
    uvicorn.run(served_app, host=HOST, port=port, log_level="error", access_log=False)


@contextlib.contextmanager
def served(options: argparse.Namespace, variant: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a server whose model is loaded, and its process."""
    address = f"http://{HOST}:{options.port}"
    command = [sys.executable, __file__, "--model", options.model, "--port", str(options.port), "--serve", variant]
    server = subprocess.Popen(command)
    try:
        while not _ready(address):
            if server.poll() is not None:
                raise SystemExit("the server ended before it was ready")
            time.sleep(0.5)
        yield address, server
    finally:
        server.terminate()
        server.wait()


def _ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def locust(address: str, clients: int, seconds: float, kind: str) -> subprocess.Popen[str]:
    """Clients that ask for so long, and print their figures."""
    command = [str(Path(sys.executable).with_name("locust")), "-f", str(BENCH / "locustfile.py"), "--headless"]
    command += ["--host", address, "--users", str(clients), "--spawn-rate", str(clients), "--run-time", f"{seconds:g}s"]
    command += ["--stop-timeout", "60", "--kind", kind, "--json", "--skip-log"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def figures(clients: subprocess.Popen[str]) -> dict[str, float]:
    """Requests a second and latencies of clients that have ended."""
    told, _ = clients.communicate()
    (found,) = json.loads(told)
    took = sorted((float(ms), count) for ms, count in found["response_times"].items())
    times = [ms for ms, count in took for _ in range(count)]
    elapsed = found["last_request_timestamp"] - found["start_time"]
    return {
        "requests_per_second": found["num_requests"] / elapsed,
        "p50_ms": statistics.median(times),
        "p95_ms": times[int(0.95 * (len(times) - 1))],
        "requests": found["num_requests"],
        "failures": found["num_failures"],
    }


def _processor_seconds(server: subprocess.Popen[bytes]) -> float:
    used = psutil.Process(server.pid).cpu_times()
    return float(used.user + used.system)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both variants in turn."""
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        for name in sorted(VARIANTS, reverse=bool(number % 2)):
            with served(options, name) as (address, server):
                figures(locust(address, 4, 2, options.kind))  # warm
                before = _processor_seconds(server)
                found = figures(locust(address, options.clients, options.seconds, options.kind))
                found["processor_ms_per_request"] = (_processor_seconds(server) - before) / found["requests"] * 1000
                rounds[name].append(found)
            print(name, {key: round(value, 1) for key, value in rounds[name][-1].items()}, file=sys.stderr, flush=True)
    result: dict[str, Any] = {}
    for name, each in rounds.items():
        result[name] = {key: round(statistics.median(one[key] for one in each), 2) for key in each[0]}
        result[name]["spread"] = round(spread([one["requests_per_second"] for one in each]), 2)
    rates = {name: result[name]["requests_per_second"] for name in VARIANTS}
    ratios = {name: round(rates["batched"] / rate, 2) for name, rate in rates.items() if name != "batched"}
    return {"kind": options.kind, "clients": options.clients, **result, "ratio_to": ratios}


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Good and bad requests side by side, and what the server's memory does meanwhile."""
    seconds, memory, rounds, bad = options.soak * 60, [], 0, 0
    with served(options, "batched") as (address, server), tempfile.TemporaryDirectory() as folder:
        process, clients = psutil.Process(server.pid), locust(address, 4, seconds, options.kind)
        while clients.poll() is None and server.poll() is None:
            with (Path(folder) / "said").open("w+") as said:
                asked = subprocess.Popen(_schemathesis(address, rounds), cwd=folder, stdout=said, stderr=said)
                while asked.poll() is None and clients.poll() is None:
                    memory.append(process.memory_info().rss / 1e6)
                    time.sleep(1)
                if asked.poll() == 1:  # a check failed
                    bad += 1
                    print((Path(folder) / "said").read_text(), file=sys.stderr, flush=True)
                asked.terminate()
                asked.wait()
            rounds += 1
        good = figures(clients)
    fifth = len(memory) // 5
    before, after = statistics.median(memory[fifth : 2 * fifth]), statistics.median(memory[-fifth:])
    growth = round(after / before - 1, 4)
    return {
        "minutes": options.soak,
        "good": good,
        "schemathesis": {"rounds": rounds, "with_errors": bad},
        "memory_mb": {
            "second_fifth": round(before),
            "last_fifth": round(after),
            "growth": round(after / before - 1, 4),
        },
        "holds": not bad and not good["failures"] and growth <= MOST_GROWTH,
    }


def _schemathesis(address: str, seed: int) -> list[str]:
    program = str(Path(sys.executable).with_name("schemathesis"))
    return [program, "run", f"{address}/openapi.json", "--checks", "not_a_server_error", "--seed", str(seed),
            "--max-examples", "50", "--phases", "examples,coverage,fuzzing", "--no-color"]  # fmt: skip


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder, hub id or models:/ address")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round of a variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=["text", "image", "both"], default="both")
    parser.add_argument("--soak", type=float, help="minutes")
    parser.add_argument("--port", type=int, default=8790)
    parser.add_argument("--serve", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.port, options.serve)
        return
    found = soak(options) if options.soak else compare(options)
    finish({"machine": machine(), **found}, options.out)


if __name__ == "__main__":
    main()
