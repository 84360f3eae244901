"""An encoder of the smallest size with random weights, where a test needs a model and not a good one."""

from __future__ import annotations

from pathlib import Path

import torch

from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.hub import save_model
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.titok import TiTok


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Saves the model of a seed; models of different seeds have different digests."""
    torch.manual_seed(seed)
    tokenizer = TiTok(tokenizer_config("tiny"))
    model = FuseLIPModel(FuseLIPConfig.of_size("tiny", tokenizer.config))
    model.attach_image_tokenizer(tokenizer)
    save_model(model, folder)
    return folder
