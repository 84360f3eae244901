"""The server under load: dynamic batching against one request at a time, by the same clients in turn.

Each server is a process of its own, and so are the clients; all share this machine's cores. A client sends its next
request when it has the answer to the one before: a row with a text, an image, or both.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import asyncio
import base64
import io
import statistics
import subprocess
import time
from typing import Any

import httpx
import numpy as np
from measure import finish, machine, parser_of, spread
from PIL import Image

VARIANTS = {"batched": {}, "one at a time": {"batch_rows": 1, "batch_wait_ms": 0.0}}
HOST = "127.0.0.1"


def serve(model: str, port: int, variant: str) -> None:
    """A server with the limits of a variant, until it is ended."""
    import uvicorn

    from fuselip_core.serving.api import create_app
    from fuselip_core.serving.engine import open_engine
    from fuselip_core.serving.limits import Limits

    engine = open_engine(model, None, Limits(**VARIANTS[variant]))  # type: ignore[arg-type]
    uvicorn.run(create_app(engine), host=HOST, port=port, log_level="error", access_log=False)


def bodies(kind: str, side: int = 256) -> list[dict[str, Any]]:
    """Requests of one row each."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(16):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (side, side), np.uint8)).resize((side, side)).save(stream, "JPEG")
        image = base64.b64encode(stream.getvalue()).decode()
        text = f"chest radiograph number {number} with a nodule in the left lung"
        rows = {"text": [text], "image": [{"image": image}], "both": [{"image": image, "text": text}]}
        found.append({"input": rows[kind], "encoding_format": "base64"})
    return found


async def load(address: str, clients: int, seconds: float, kind: str) -> list[float]:
    """Seconds that each request of all clients took."""
    sent, took, late = bodies(kind), [], time.perf_counter() + seconds

    async def client(number: int) -> None:
        async with httpx.AsyncClient(base_url=address, timeout=120) as session:
            while time.perf_counter() < late:
                start = time.perf_counter()
                answer = await session.post("/v1/embeddings", json=sent[number % len(sent)])
                assert answer.status_code == 200, answer.text
                took.append(time.perf_counter() - start)

    await asyncio.gather(*(client(number) for number in range(clients)))
    return took


def measure(address: str, options: argparse.Namespace) -> dict[str, float]:
    """Requests a second and latencies of one round."""
    start = time.perf_counter()
    took = asyncio.run(load(address, options.clients, options.seconds, options.kind))
    elapsed = time.perf_counter() - start
    p50, p95 = np.percentile(took, [50, 95]) * 1000
    return {"requests_per_second": len(took) / elapsed, "p50_ms": float(p50), "p95_ms": float(p95)}


def wait_until_ready(address: str, server: subprocess.Popen[bytes]) -> None:
    """Returns when the model is loaded."""
    while server.poll() is None:
        try:
            if httpx.get(f"{address}/ready").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.5)
    raise SystemExit("the server ended before it was ready")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", required=True, help="folder, hub id or models:/ address")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a round of a variant")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=["text", "image", "both"], default="both")
    parser.add_argument("--port", type=int, default=8790)
    parser.add_argument("--serve", choices=list(VARIANTS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.model, options.port, options.serve)
        return
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for number in range(options.rounds):
        for place, name in enumerate(sorted(VARIANTS, reverse=bool(number % 2))):
            port = options.port + place
            command = [sys.executable, __file__, "--model", options.model, "--port", str(port), "--serve", name]
            server = subprocess.Popen(command)
            try:
                wait_until_ready(f"http://{HOST}:{port}", server)
                asyncio.run(load(f"http://{HOST}:{port}", 4, 1.0, options.kind))
                rounds[name].append(measure(f"http://{HOST}:{port}", options))
            finally:
                server.terminate()
                server.wait()
            print(name, {key: round(value, 1) for key, value in rounds[name][-1].items()}, file=sys.stderr, flush=True)
    result: dict[str, Any] = {"machine": machine(), "kind": options.kind, "clients": options.clients}
    for name, each in rounds.items():
        result[name] = {key: round(statistics.median(one[key] for one in each), 2) for key in each[0]}
        result[name]["spread"] = round(spread([one["requests_per_second"] for one in each]), 2)
    result["ratio"] = round(
        result["batched"]["requests_per_second"] / result["one at a time"]["requests_per_second"], 2
    )
    finish(result, options.out)


if __name__ == "__main__":
    main()
