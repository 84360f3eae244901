"""What each of locust's clients asks of the server, as soon as it has the answer to the request before."""

from __future__ import annotations

import base64
import io
import itertools
import json
from typing import Any

import numpy as np
from locust import FastHttpUser, events, task
from PIL import Image

KINDS = ("text", "image", "both")


@events.init_command_line_parser.add_listener
def add_kind(parser: Any) -> None:
    """What a row holds: a text, an image, or both."""
    parser.add_argument("--kind", choices=KINDS, default="both")


def bodies(kind: str, side: int = 256) -> list[bytes]:
    """Requests of one row each, as they are sent: clients share the machine with the server."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(16):
        stream = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (16, 16), np.uint8)).resize((side, side)).save(stream, "JPEG")
        row = {
            "image": f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}",
            "text": f"chest radiograph number {number} with a nodule in the left lung",
        }
        asked = row["text"] if kind == "text" else row if kind == "both" else {"image": row["image"]}
        found.append(json.dumps({"input": [asked], "encoding_format": "base64"}).encode())
    return found


class Client(FastHttpUser):
    """Asks for an embedding, without a pause."""

    def on_start(self) -> None:
        """Takes the requests of its kind."""
        self.bodies = itertools.cycle(bodies(self.environment.parsed_options.kind))

    @task
    def embed(self) -> None:
        """One request; a status of 400 or more counts as a failure."""
        self.client.post("/v1/embeddings", data=next(self.bodies), headers={"Content-Type": "application/json"})
