"""Models from a folder or the Hugging Face hub, in this project's format or as published, and back to a folder."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.files import atomic_folder
from fuselip_core.model.fetch import fetch
from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel
from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
from fuselip_core.model.processing import FuseLIPProcessor, ImageProcessor, TextTokenizer
from fuselip_core.model.titok import TiTok, TiTokConfig
from fuselip_core.model.weights import CheckpointError, load_strictly, read_weights, refuse_misfits, shapes

Model = FuseLIPModel | LateFusionModel


def load_model(
    name: str | Path, device: str | torch.device | None = None
) -> tuple[Model, ImageProcessor, TextTokenizer]:
    """Model for inference, image processor and text tokenizer of a folder or a hub id; the published call.

    `image_processor(picture)` → (3, S, S) float32, `text_tokenizer(strings)` → (B, L) int64. `device` None takes a GPU
    if there is one. Raises FuselipError where the checkpoint is missing, unreachable or does not fit.
    """
    model, processor = load_pretrained(name, device)
    return model, processor.image_processor, processor.text_tokenizer


def load_pretrained(name: str | Path, device: str | torch.device | None = None) -> tuple[Model, FuseLIPProcessor]:
    """Model for inference and its processor, of a folder or a hub id."""
    chosen = _device(device)
    folder = fetch(name)
    state = read_weights(folder)
    model = _build(folder, set(state))
    load_strictly(model, state, folder)
    model.to(chosen)  # type: ignore[arg-type]  # transformers wraps `to` in a way that hides its arguments
    return model.eval(), FuseLIPProcessor.of_config(model.config)


def _device(wanted: str | torch.device | None) -> torch.device:
    """The device that is asked for; None takes a GPU if there is one. Raises FuselipError where it is not there."""
    try:
        device = torch.device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise FuselipError(f"'{wanted}' is no device; give cpu, cuda or cuda:1") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise FuselipError(f"this machine has no GPU '{wanted}' that torch can use; give device='cpu', or leave it out")
    return device


def save_model(model: Model, folder: Path) -> None:
    """Writes configuration, weights (safetensors) and processor to `folder`, which appears whole or not at all."""
    with atomic_folder(folder) as partial, quiet():
        model.save_pretrained(partial)
        FuseLIPProcessor.of_config(model.config).save_pretrained(partial)
        for path in partial.iterdir():
            path.chmod(0o644)  # safetensors lets only the owner read, and a container may run as somebody else


def load_tokenizer(name: str | Path, decoder: bool = False) -> TiTok:
    """Image tokenizer, on the CPU, of a folder or hub id: this project's, a published TiTok, or a FuseLIP checkpoint's.

    With `decoder`, a published tokenizer gets its decoder's weights where that predicts pixels, else random ones.
    """
    folder = fetch(name)
    content = _read_json(folder, ("config.json",))
    if "latent_tokens" in content:
        return TiTok.load(folder, decoder=decoder)
    state = read_weights(folder)
    if "vq_model" in content.get("model", {}):
        config = _published_tokenizer(content, folder)
    else:
        model = _build(folder, set(state))
        if model.config.model_type != FuseLIPConfig.model_type or not model.config.image_tokenizer:
            raise CheckpointError(f"{folder} contains no image tokenizer; give a TiTok folder or a FuseLIP checkpoint")
        config = TiTokConfig(**model.config.image_tokenizer)
        prefix = "image_tokenizer.model."
        state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return _with_weights(TiTok(config, decoder=decoder), state, folder)


def _published_tokenizer(content: dict[str, Any], folder: Path) -> TiTokConfig:
    try:
        return TiTokConfig.from_published(content)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the configuration in {folder} describes no TiTok ({type(error).__name__}: {error}); take it as published"
        ) from error


def _with_weights(tokenizer: TiTok, state: dict[str, Tensor], folder: Path) -> TiTok:
    """Encoder and codebook strictly; the decoder if the published one is of the same kind."""
    expected = shapes(tokenizer.state_dict())
    is_decoder = re.compile(r"decoder\.|pixel_").match  # pixel_*: the second half of the first generation's decoder
    decoder = {key: shape for key, shape in expected.items() if is_decoder(key)}
    stored = {key: value for key, value in state.items() if not is_decoder(key)}
    refuse_misfits({key: shape for key, shape in expected.items() if key not in decoder}, shapes(stored), folder)
    published = {key: value for key, value in state.items() if is_decoder(key)}
    if shapes(published) == decoder:
        stored |= published
    else:
        tokenizer.reconstructs = False
    tokenizer.load_state_dict({key: value.to(torch.float32) for key, value in stored.items()}, strict=False)
    return tokenizer


def _build(folder: Path, names: set[str]) -> Model:
    """The folder's model on the meta device, where no time is spent on random weights."""
    try:
        config = _read_config(folder, names)
        with torch.device("meta"):
            return FuseLIPModel(config) if isinstance(config, FuseLIPConfig) else LateFusionModel(config)
    except FuselipError:
        raise
    # A configuration can be wrong in as many ways as torch, transformers and open_clip can say no.
    except Exception as error:
        reason = one_line(error)[:200] or type(error).__name__
        raise CheckpointError(f"the configuration in {folder} describes no model ({reason}); mend it") from error


def _read_config(folder: Path, names: set[str]) -> FuseLIPConfig | LateFusionConfig:
    """The configuration of a folder in this project's format or as published, given the names of its weights."""
    content = _read_json(folder, ("config.json", "open_clip_config.json"))
    kind = content.get("model_type")
    if kind == FuseLIPConfig.model_type:
        return FuseLIPConfig.from_dict(content)
    if kind == LateFusionConfig.model_type:
        return LateFusionConfig.from_dict(content)
    if "vision_cfg" in content or "model_cfg" in content:
        return LateFusionConfig.from_published(content, names)
    if "text_config" in content:
        return FuseLIPConfig.from_published(content)
    raise CheckpointError(f"the configuration in {folder} is of no model of this project; give another folder")


def _read_json(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    for name in names:
        path = folder / name
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path} is no valid JSON ({error}); save or fetch it again") from error
        if not isinstance(content, dict):
            raise CheckpointError(f"{path} must hold a JSON object; save or fetch it again")
        return content
    raise CheckpointError(f"{folder} holds no {' or '.join(names)}, so it is no checkpoint; give another folder")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own progress bars, which it also draws where nobody looks."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
