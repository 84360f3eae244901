"""From what a user holds to what a model takes: pictures to pixels, strings to ids.

Legend: B rows, S pixels a side, L tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, BatchFeature, ProcessorMixin

from fuselip_core.errors import FuselipError
from fuselip_core.images import checked, squashed, to_pixels
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.late_fusion import LateFusionConfig

# Mean and standard deviation of CLIP's training images, by which the late-fusion baselines normalise.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MOST_KNOWN_WORDS = 100_000


class ImageProcessor:
    """A Pillow image → pixels (3, S, S) float32: squashed to a square, bicubic with antialiasing.

    FuseLIP converts to RGB first and leaves pixels in 0..1. The late-fusion baselines resize first, which for palette
    images means nearest-neighbour, and then normalise; published weights were trained so.
    """

    def __init__(self, size: int, normalise: bool = False) -> None:
        self.size, self.normalise = size, normalise

    def __call__(self, image: Image.Image) -> Tensor:
        """One Pillow image → pixels (3, S, S) float32; raises FuselipError for what fuselip_core.images refuses."""
        if not isinstance(image, Image.Image):
            raise FuselipError(f"the image processor takes a Pillow image, not {type(image).__name__}; use Image.open")
        small = (squashed if self.normalise else to_pixels)(checked(image), self.size)
        # A copy, since torch wants it writable.
        pixels = torch.from_numpy(small.copy()).permute(2, 0, 1).to(torch.float32).div(255.0)
        if self.normalise:
            mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
            pixels = (pixels - mean) / std
        return pixels.contiguous()


class TextTokenizer:
    """CLIP's byte-pair encoding, from open_clip: lower case, whitespace and entities cleaned.

    As published, `<start_of_text>` and `<end_of_text>` written in a text become those tokens, and a text is pooled at
    its first end-of-text. Take them out of texts that may hold them by accident.
    """

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Texts → ids (B, L) int64: begin, text, end, zeros; a text that is too long is cut and closed with end."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise FuselipError(f"text {row} is no string but {type(text).__name__}; give strings")
        length = context_length or self.context_length
        if not texts:
            return torch.zeros(0, length, dtype=torch.int64)
        return _byte_pair_encoding()(texts, context_length=length)

    def encode(self, text: str) -> list[int]:
        """One text → its ids, without begin, end and padding, not cut."""
        return _byte_pair_encoding().encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text ids → lower-case text; ids of images and of the mask are skipped."""
        encoding = _byte_pair_encoding()
        return encoding.decode([int(token) for token in ids if int(token) in encoding.decoder]).strip()


class FuseLIPProcessor(ProcessorMixin):
    """Processor of both families: Pillow images and strings to a batch, saved and loaded beside a model."""

    model_input_names: ClassVar[list[str]] = ["pixel_values", "input_ids"]

    def __init__(self, size: int = 256, context_length: int = 180, normalise: bool = False) -> None:
        super().__init__()
        self.size, self.context_length, self.normalise = size, context_length, normalise

    @classmethod
    def of_config(cls, config: FuseLIPConfig | LateFusionConfig) -> FuseLIPProcessor:
        """The processor that goes with a model."""
        return cls(config.image_size, config.context_length, normalise=isinstance(config, LateFusionConfig))

    @property
    def image_processor(self) -> ImageProcessor:
        """Pillow image → pixels (3, S, S)."""
        return ImageProcessor(self.size, self.normalise)

    @property
    def text_tokenizer(self) -> TextTokenizer:
        """Strings → ids (B, L)."""
        return TextTokenizer(self.context_length)

    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image] | None = None,
        text: str | Sequence[str] | None = None,
        **_: Any,
    ) -> BatchFeature:
        """→ `pixel_values` (B, 3, S, S) float32 and `input_ids` (B, L) int64, of whichever was given."""
        if images is None and text is None:
            raise FuselipError("the processor got neither images nor text; give at least one of them")
        batch = {}
        if images is not None:
            pictures = [images] if isinstance(images, Image.Image) else list(images)
            batch["pixel_values"] = torch.stack([self.image_processor(picture) for picture in pictures])
        if text is not None:
            batch["input_ids"] = self.text_tokenizer(text)
        return BatchFeature(batch)


@functools.cache
def _byte_pair_encoding() -> Any:
    from open_clip.tokenizer import SimpleTokenizer  # type: ignore[import-untyped]

    encoding = SimpleTokenizer()
    encoding.cache = _KnownWords(encoding.cache)
    return encoding


class _KnownWords(dict[str, str]):
    """The tokenizer's memory of words, which would otherwise grow for as long as a server runs."""

    def __setitem__(self, word: str, tokens: str) -> None:
        if len(self) < MOST_KNOWN_WORDS:
            super().__setitem__(word, tokens)


AutoProcessor.register(FuseLIPConfig, FuseLIPProcessor)
AutoProcessor.register(LateFusionConfig, FuseLIPProcessor)


def as_pixels(batch: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """uint8 (N, S, S, 3) → float32 (N, 3, S, S) in 0..1 on `device`."""
    given = batch if isinstance(batch, Tensor) else torch.from_numpy(np.ascontiguousarray(batch))
    return given.to(device, non_blocking=True).contiguous().permute(0, 3, 1, 2).float().div_(255.0)
