"""Models of other projects to compare with: two towers from open_clip, or CLIP and SigLIP from transformers.

An image with a text is the sum of their two unit-norm embeddings, as in the published score fusion (SF).
Legend: B rows, S pixels a side, L tokens, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fuselip_core.errors import FuselipError, one_line
from fuselip_core.images import checked
from fuselip_core.model.hub import fetch, quiet
from fuselip_core.model.weights import CheckpointError, refuse_non_finite

OPEN_CLIP, TRANSFORMERS = "open_clip:", "transformers:"


class TwoTowers:
    """An image tower and a text tower behind the calls that evaluation needs.

    to_pixels: RGB picture → (3, S, S) float32; to_ids: texts → (B, L) int64, cut and padded to the model's own length;
    image_features, text_features: those in batches → (B, W).
    """

    def __init__(
        self,
        name: str,
        model: torch.nn.Module,
        to_pixels: Callable[[Image.Image], Tensor],
        to_ids: Callable[[list[str]], Tensor],
        towers: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]],
        device: torch.device,
    ) -> None:
        refuse_non_finite(model.state_dict(), name, "fetch it again")
        self.name, self.model, self.device = name, model.to(device).eval(), device
        self._to_pixels, self.to_ids = to_pixels, to_ids
        self._image_features, self._text_features = towers

    @torch.inference_mode()
    def encode_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Pictures → unit-norm embeddings (B, W) float32."""
        pixels = torch.stack([self._to_pixels(checked(picture).convert("RGB")) for picture in pictures])
        return F.normalize(self._image_features(pixels.to(self.device)).float(), dim=-1)

    @torch.inference_mode()
    def encode_ids(self, ids: Tensor) -> Tensor:
        """Ids (B, L) int64 → unit-norm embeddings (B, W) float32."""
        return F.normalize(self._text_features(ids.to(self.device)).float(), dim=-1)

    def embed(
        self, images: Sequence[Image.Image | None], texts: Sequence[str | None], batch_size: int = 64
    ) -> NDArray[np.float32]:
        """Rows of pictures, texts or both → unit-norm embeddings (N, W) float32, as Embedder.embed."""
        parts = []
        for start in range(0, len(images), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(self._embed_batch(images[rows], texts[rows]))
        return torch.cat(parts).cpu().numpy()

    def _embed_batch(self, images: Sequence[Image.Image | None], texts: Sequence[str | None]) -> Tensor:
        pictures = {row: image for row, image in enumerate(images) if image is not None}
        strings = {row: text for row, text in enumerate(texts) if text is not None}
        found = [(list(pictures), self.encode_images(list(pictures.values())))] if pictures else []
        found += [(list(strings), self.encode_ids(self.to_ids(list(strings.values()))))] if strings else []
        sums = torch.zeros(len(images), found[0][1].shape[1], device=self.device)
        for rows, features in found:
            sums[rows] += features
        return F.normalize(sums, dim=-1)


def is_comparison(name: str | Path) -> bool:
    """Whether an address names a model of another project."""
    return str(name).startswith((OPEN_CLIP, TRANSFORMERS))


def load_comparison(name: str, device: torch.device) -> TwoTowers:
    """The model behind ``open_clip:NAME`` or ``transformers:NAME``.

    open_clip takes hf-hub:OWNER/NAME, a folder, or ARCHITECTURE/WEIGHTS of its own list; transformers a hub id or a
    folder of a CLIP or SigLIP. Raises FuselipError where it is missing, unreachable, or of another kind.
    """
    load = _open_clip if name.startswith(OPEN_CLIP) else _transformers
    try:
        return load(name, name.partition(":")[2], device)
    except FuselipError:
        raise
    # Both libraries fetch, read and build what the address says, and fail in as many ways.
    except Exception as error:
        reason = one_line(error)[:200] or type(error).__name__
        raise CheckpointError(
            f"{name} cannot be opened ({reason}); check the name, the connection and HF_HUB_OFFLINE, or give a folder"
        ) from error


def _open_clip(name: str, place: str, device: torch.device) -> TwoTowers:
    import open_clip  # type: ignore[import-untyped]

    if Path(place).is_dir():
        place = f"local-dir:{place}"
    architecture, weights = (place, None) if ":" in place else (place.partition("/")[::2])
    if weights == "":
        raise FuselipError(f"{name} names no weights; write open_clip:{place}/WEIGHTS, hf-hub:OWNER/NAME or a folder")
    model, preprocess = open_clip.create_model_from_pretrained(architecture, weights)
    tokenizer = open_clip.get_tokenizer(architecture)
    return TwoTowers(name, model, preprocess, tokenizer, (model.encode_image, model.encode_text), device)


def _transformers(name: str, place: str, device: torch.device) -> TwoTowers:
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    folder = fetch(place)
    with quiet():
        model, loading = AutoModel.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    if not (hasattr(model, "get_image_features") and hasattr(model, "get_text_features")):
        raise FuselipError(f"{name} is a {type(model).__name__}, which has no two towers; give a CLIP or a SigLIP")
    if missing := sorted(loading["missing_keys"]):
        raise CheckpointError(f"{name} lacks {len(missing)} weights, {missing[0]} first; fetch it again")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = int(model.config.text_config.max_position_embeddings)

    def to_pixels(picture: Image.Image) -> Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    def to_ids(texts: list[str]) -> Tensor:
        return tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids

    towers = (
        lambda pixels: _pooled(model.get_image_features(pixel_values=pixels)),
        lambda ids: _pooled(model.get_text_features(input_ids=ids)),
    )
    return TwoTowers(name, model, to_pixels, to_ids, towers, device)


def _pooled(output: Any) -> Tensor:
    """transformers returns features as a tensor in some releases, and as the pooled part of an output in others."""
    return output if isinstance(output, Tensor) else output.pooler_output
