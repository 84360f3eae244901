"""An embedder without a model, for tests of what stands around it; as a program, one that can be killed.

python tests/stand_in_embedder.py build|add|embed SOURCE TARGET SECONDS_A_BATCH
"""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH = 16


class StandIn:
    """Pictures become their 4 x 4 grey values, texts a vector drawn from their hash, both the sum of the two."""

    width, name = WIDTH, "stand-in"

    def __init__(self, digest: str = "a" * 64, pause: float = 0.0) -> None:
        self.digest, self.pause = digest, pause

    def pixels(self, picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.convert("L").resize((4, 4), Image.Resampling.BOX), dtype=np.float32).ravel() / 255

    def cuts(self, text: str) -> bool:
        return len(text) > 1000

    def embed(self, images: Sequence[Any], texts: Sequence[str | None], batch_size: int = 64) -> np.ndarray:
        time.sleep(self.pause)
        rows = [self._row(image, text) for image, text in zip(images, texts, strict=True)]
        return np.array(rows, dtype=np.float32).reshape(-1, WIDTH)

    def _row(self, image: Any, text: str | None) -> np.ndarray:
        vector = np.full(WIDTH, 1e-3, dtype=np.float32)
        if image is not None:
            vector += image if isinstance(image, np.ndarray) else self.pixels(image)
        if text is not None:
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            vector += np.random.default_rng(seed).random(WIDTH, dtype=np.float32)
        return vector / np.linalg.norm(vector)


if __name__ == "__main__":
    from fuselip_core.search import build, embed

    what, source, target, pause = sys.argv[1:]
    embed.PART_SECONDS = 0.0
    embedder: Any = StandIn(pause=float(pause))
    if what == "embed":
        embed.embed_archive(Path(source), Path(target), embedder, batch_size=4)
    else:
        getattr(build, what)(Path(source), target, embedder, batch_size=4)
