"""The reference values of ../shared/fixtures: weights from their names, and what the published code makes of them."""

from __future__ import annotations

import functools
import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

SHARED = Path(__file__).parents[2] / "shared"
UPSTREAM = SHARED / "fixtures" / "upstream"
TIED = {"mask_prediction_head.decoder.weight": "token_embedding.weight"}


def keys() -> list[str]:
    """Names of the reference values, none where this checkout lacks ../shared."""
    if not UPSTREAM.is_dir():
        return []
    with safe_open(UPSTREAM / "expected.safetensors", framework="pt") as stream:
        return sorted(stream.keys())


def expected(key: str) -> Tensor:
    with safe_open(UPSTREAM / "expected.safetensors", framework="pt") as stream:
        return stream.get_tensor(key)


@functools.cache
def manifest() -> dict[str, Any]:
    return json.loads((UPSTREAM / "manifest.json").read_text(encoding="utf-8"))


def pictures() -> list[Image.Image]:
    """The four input images."""
    return [Image.open(SHARED / "data" / "vqa-rad" / "images" / name) for name in manifest()["images"]]


def weights(model: str) -> dict[str, Tensor]:
    """State dict of one of the manifest's models."""
    shapes = {name: shape for name, shape in manifest()["models"][model]["state_dict"].items() if name not in TIED}
    with ThreadPoolExecutor(2) as pool:  # NumPy draws without Python's lock
        state = dict(zip(shapes, pool.map(_tensor, shapes, shapes.values()), strict=True))
    tied = {name: state[source] for name, source in TIED.items() if source in state}
    return state | {name: value for name, value in tied.items() if name in manifest()["models"][model]["state_dict"]}


def published_folder(model: str, folder: Path) -> Path:
    """Writes a checkpoint as published into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = manifest()["models"][model]
    (folder / "config.json").write_text(json.dumps(content.get("config") or content["open_clip_config"]))
    torch.save(weights(model), folder / "pytorch_model.bin")
    return folder


def _tensor(name: str, shape: list[int]) -> Tensor:
    if not shape:
        return torch.tensor(np.log(10.0) if name.endswith("logit_scale") else -10.0, dtype=torch.float32)
    generator = np.random.RandomState((zlib.crc32(name.encode()) ^ manifest()["seed"]) & 0xFFFFFFFF)
    values = generator.standard_normal(shape)
    if len(shape) == 1:
        values = 1 + 0.1 * values if name.endswith("weight") else 0.1 * values
    else:
        values /= np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(values.astype(np.float32))
