"""The encoders as an input module of sentence-transformers (extra `mteb` brings it), for its tools and trainers.

SentenceTransformer(modules=[SentenceModule(Embedder.from_pretrained(...))]) takes texts, pictures, or
{"image": ..., "text": ...} for one fused vector each; one kind in a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.modules.input_module import InputModule
from torch import Tensor

from fuselip_core.model.embedder import Embedder
from fuselip_core.model.hub import save_model


class SentenceModule(InputModule):
    """`forward` adds sentence_embedding (B, W) float32 of unit norm, with gradients where those are on."""

    def __init__(self, embedder: Embedder) -> None:
        super().__init__()
        self.embedder, self.model = embedder, embedder.model
        self.tokenizer = embedder.processor.text_tokenizer  # type: ignore[assignment]

    @property
    def modalities(self) -> list[Any]:
        return ["text", "image", ("image", "text")]

    def preprocess(self, inputs: Sequence[Any], prompt: str | None = None, **_: Any) -> dict[str, Tensor]:
        """Pixels (B, 3, S, S) float32, token ids (B, L) int64, or both."""
        rows = [row if isinstance(row, dict) else {"text" if isinstance(row, str) else "image": row} for row in inputs]
        features = {}
        if "image" in rows[0]:
            features["pixel_values"] = torch.stack([self.embedder.pixels(row["image"]) for row in rows])
        if "text" in rows[0]:
            features["input_ids"] = self.embedder.processor.text_tokenizer(
                [(prompt or "") + row["text"] for row in rows]
            )
        return features

    def forward(self, features: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
        pixels, ids = features.get("pixel_values"), features.get("input_ids")
        if pixels is not None and ids is not None:
            found = self.model.encode_multimodal(pixels, ids)
        else:
            found = self.model.encode_text(ids) if pixels is None else self.model.encode_image(pixels)
        return features | {"sentence_embedding": found.float()}

    def get_embedding_dimension(self) -> int:
        return self.embedder.width

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        save_model(self.model, Path(output_path) / "encoder")

    @classmethod
    def load(  # type: ignore[override]
        cls, model_name_or_path: str, subfolder: str = "", **_: Any
    ) -> SentenceModule:
        return cls(Embedder.from_pretrained(Path(model_name_or_path) / subfolder / "encoder"))
