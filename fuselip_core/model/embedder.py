"""Embeddings of whatever a user has: pictures, files, texts, or pictures with texts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fuselip_core.errors import FuselipError
from fuselip_core.images import decode
from fuselip_core.model.hub import Model, load_pretrained
from fuselip_core.model.processing import FuseLIPProcessor
from fuselip_core.progress import track

Picture = Image.Image | str | Path | torch.Tensor  # the last: what `pixels` made of one


class Embedder:
    """A model and its processor behind one call, for both families. `name` is what it was loaded by, if it was."""

    name = ""

    def __init__(self, model: Model, processor: FuseLIPProcessor) -> None:
        self.model, self.processor = model.eval(), processor
        self._to_pixels, self._to_ids = processor.image_processor, processor.text_tokenizer

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device | None = None) -> Embedder:
        """Loads a folder, a hub id or models:/NAME@ALIAS; `device` None takes a GPU if there is one."""
        embedder = cls(*load_pretrained(name, device))
        embedder.name = str(name)
        return embedder

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the weights (name, type, shape, values): equal for the same model, wherever it lies."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().numpy())
        return digest.hexdigest()

    def __repr__(self) -> str:
        size, tokens = self.processor.size, self.processor.context_length
        return (
            f"Embedder({self.model.config.model_type}, width {self.width}, images {size} x {size}, "
            f"{tokens} tokens, on {self.model.device})"
        )

    @torch.inference_mode()
    def embed(
        self,
        images: Sequence[Picture | None] | None = None,
        texts: Sequence[str | None] | None = None,
        batch_size: int = 64,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Rows of pictures (Pillow images or paths), texts or both → unit-norm embeddings (N, W) float32.

        A row may lack its image or its text (None), not both; no rows at all give (0, W). Rows of one kind run
        together, `batch_size` at a time. Raises FuselipError that names the row where something is missing or
        unreadable, or where the embedding is not finite.
        """
        if batch_size < 1:
            raise FuselipError(f"batch_size is {batch_size}; it must be at least 1")
        pictures, strings = _aligned(images, texts)
        batches = [
            rows[start : start + batch_size]
            for rows in _rows_by_kind(pictures, strings)
            for start in range(0, len(rows), batch_size)
        ]
        result = np.zeros((len(pictures), self.width), dtype=np.float32)
        for rows in track(batches, "embed") if progress else batches:
            result[rows] = self._embed_kind([pictures[row] for row in rows], [strings[row] for row in rows], rows)
        if len(bad := np.flatnonzero(~np.isfinite(result).all(axis=1))):
            raise FuselipError(f"row {bad[0]}: its embedding is not finite; the weights are damaged, load them again")
        return result

    @property
    def width(self) -> int:
        """W, the width of an embedding."""
        config = self.model.config
        return int(getattr(config, "embed_dim", None) or config.width)

    def _embed_kind(
        self, pictures: list[Picture | None], strings: list[str | None], rows: list[int]
    ) -> NDArray[np.float32]:
        """Rows that all have, or all lack, an image and a text."""
        pixels = ids = None
        device = self.model.device
        if pictures[0] is not None:
            pixels = torch.stack([self._pixels(picture, row) for picture, row in zip(pictures, rows, strict=True)])
            pixels = pixels.to(device)
        if strings[0] is not None:
            ids = self._to_ids([text for text in strings if text is not None]).to(device)
        if pixels is not None and ids is not None:
            embeddings = self.model.encode_multimodal(pixels, ids)
        elif pixels is not None:
            embeddings = self.model.encode_image(pixels)
        else:
            assert ids is not None
            embeddings = self.model.encode_text(ids)
        return embeddings.float().cpu().numpy()

    def pixels(self, picture: Image.Image) -> torch.Tensor:
        """What the model sees of a picture, (3, S, S) float32; `embed` takes it in the picture's place.

        Safe to call from many threads, beside a model at work.
        """
        return self._to_pixels(picture)

    def cuts(self, text: str) -> bool:
        """True for a text with more tokens than the model reads; `embed` cuts it."""
        return len(self._to_ids.encode(text)) > self._to_ids.context_length - 2  # begin and end

    def similarity(self, one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
        """Cosine similarity (N, M) of embeddings (N, W) and (M, W)."""
        return np.atleast_2d(one) @ np.atleast_2d(other).T

    def encode(self, inputs: Sequence[Any], batch_size: int = 64) -> NDArray[np.float32]:
        """As sentence-transformers has it: texts, pictures, or {"text": ..., "image": ...} → (N, W) float32.

        A string is a text; what comes alone, not in a list, gives (W).
        """
        if isinstance(inputs, str | Image.Image | dict):
            return self.encode([inputs], batch_size)[0]
        items = [
            item if isinstance(item, dict) else {"text" if isinstance(item, str) else "image": item} for item in inputs
        ]
        return self.embed([item.get("image") for item in items], [item.get("text") for item in items], batch_size)

    def _pixels(self, picture: Picture | None, row: int) -> torch.Tensor:
        if isinstance(picture, torch.Tensor):
            return picture
        if not isinstance(picture, Image.Image | str | Path):
            raise FuselipError(f"row {row}: an image is a Pillow image or a path, not {type(picture).__name__}")
        name = "image" if isinstance(picture, Image.Image) else f"image {picture}"
        try:
            if isinstance(picture, Image.Image):
                return self._to_pixels(picture)  # which reads it, where nobody has yet
            return self._to_pixels(decode(Path(picture).read_bytes()))
        except (FuselipError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise FuselipError(f"row {row}: {name} cannot be read ({reason})") from error


def _aligned(
    images: Sequence[Picture | None] | None, texts: Sequence[str | None] | None
) -> tuple[list[Picture | None], list[str | None]]:
    for name, value in (("images", images), ("texts", texts)):
        if isinstance(value, str | bytes | Path | Image.Image) or not isinstance(value, Iterable | None):
            raise FuselipError(f"{name} must be a list, with one entry a row; write {name}=[...]")
    given_images, given_texts = (None if each is None else list(each) for each in (images, texts))
    pictures: list[Any] = given_images if given_images is not None else [None] * len(given_texts or ())
    strings: list[Any] = given_texts if given_texts is not None else [None] * len(pictures)
    if len(pictures) != len(strings):
        raise FuselipError(f"{len(pictures)} images but {len(strings)} texts; None stands for a missing one")
    for row, (picture, text) in enumerate(zip(pictures, strings, strict=True)):
        if picture is None and text is None:
            raise FuselipError(f"row {row} has neither image nor text; give one of them")
        if text is not None and not isinstance(text, str):
            raise FuselipError(f"row {row}: a text is a string, not {type(text).__name__}")
    return pictures, strings


def _rows_by_kind(pictures: list[Picture | None], strings: list[str | None]) -> list[list[int]]:
    """Row numbers in three lists, of equal kind each; texts of like length stay together, so little is padded."""
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for row, (picture, text) in enumerate(zip(pictures, strings, strict=True)):
        kinds.setdefault((picture is None, text is None), []).append(row)
    return [sorted(rows, key=lambda row: len(strings[row] or "")) for rows in kinds.values()]
