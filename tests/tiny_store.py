"""A random token store and a joint encoder small enough that a training step takes milliseconds."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fuselip_core.config import TrainSettings
from fuselip_core.data.tokens.store import PairColumns, TokenStore
from fuselip_core.data.tokens.writer import TokenStoreWriter, write_manifest
from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel
from fuselip_core.training.loop import Trainer

CODES, CODEBOOK, KINDS = 4, 20, ("caption", "vqa")
WIDTHS = {"width": 16, "heads": 2, "layers": 2, "codebook_size": CODEBOOK, "codes_per_image": CODES}


def random_store(folder: Path, pairs: int = 24, seed: int = 0, codebook: str = "c", views: int = 2) -> TokenStore:
    """Half the pairs lead from an image to a text, half from an image with a text to a text; all texts differ."""
    rng = np.random.default_rng(seed)
    images, half = pairs // 2, pairs // 2
    identity = {"codebook": codebook, "codes_per_image": CODES, "data_version": "d", "views": views}
    writer = TokenStoreWriter(folder, "train", images, views, CODES, identity)
    writer.write_codes(0, rng.integers(0, CODEBOOK, (images, views, CODES)).astype(np.uint16))
    rows = np.arange(pairs)
    columns = PairColumns(
        query_image=rows % images,
        query_text=np.where(rows < half, -1, pairs + rows - half),
        target_image=np.full(pairs, -1),
        target_text=rows,
        kind=(rows >= half).astype(int),
        group=rows % images,
        answer_type=np.zeros(pairs, int),
    )
    lengths = rng.integers(1, 7, pairs + half)
    offsets = np.cumsum([0, *lengths])
    texts = [f"text {number}" for number in range(pairs + half)]
    writer.finish(columns, rng.integers(1, 400, offsets[-1]), offsets, texts, np.zeros(CODES))
    write_manifest(folder, identity, KINDS)
    return TokenStore(folder, "train")


def tiny_model(seed: int = 0, **options: object) -> FuseLIPModel:
    """A joint encoder for these stores, 800,000 parameters, nearly all of them words'."""
    torch.manual_seed(seed)
    return FuseLIPModel(FuseLIPConfig(**{"context_length": 16, **WIDTHS, **options}))


def settings_of(**fields: object) -> TrainSettings:
    """Settings of a run of a few steps on half captions, half questions."""
    return TrainSettings.model_validate(
        {"steps": 4, "batch_size": 8, "mixture": {"caption": 1, "vqa": 1}, "checkpoint_every": 100, **fields}
    )


def cut_at(trainer: Trainer, step: int) -> None:
    """Runs `trainer` until `step`, which never begins."""
    original = trainer._train_step

    def train_step(number: int) -> Any:
        if number == step:
            raise KeyboardInterrupt
        return original(number)

    trainer._train_step = train_step  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()
    assert trainer.step == step
