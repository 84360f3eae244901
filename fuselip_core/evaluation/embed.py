"""Embeds stored images and texts, in batches of similar length and each distinct input only once.

Legend: N sides, D width.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fuselip_core.data.tokens.store import SideTokens, TokenStore, gather_codes, gather_texts
from fuselip_core.evaluation.metrics import Array


class SideEncoder(Protocol):
    """A model's interface for evaluation, which both families implement (encoding/)."""

    @property
    def text_length(self) -> int | None:
        """Tokens of a text without image that the model reads, not counting start and end; None: all stored ones."""

    def encode(self, side: SideTokens) -> Array:
        """One side of B pairs → embeddings (B, D) float32 of unit norm."""


def embed(
    encoder: SideEncoder, store: TokenStore, images: Array, texts: Array, batch_size: int, *, blank: bool = False
) -> Array:
    """Image rows (N) with text rows (N), ABSENT allowed in either → embeddings (N, D) float32.

    With `blank` every image is replaced by a black one. Equal inputs are embedded once, so their embeddings are equal.
    """
    if blank:
        images = np.minimum(images, 0)  # all images become the same row, so that it is embedded once
    inputs, place = np.unique(np.stack([images, texts], axis=1).astype(np.int64), axis=0, return_inverse=True)
    lengths = np.where(inputs[:, 1] >= 0, np.diff(store.text_offsets)[inputs[:, 1]], 0)
    order = np.lexsort((lengths, inputs[:, 0] >= 0))
    parts = []
    for start in range(0, len(order), batch_size):
        chosen = inputs[order[start : start + batch_size]]
        side = SideTokens(*gather_codes(store, chosen[:, 0]), *gather_texts(store, chosen[:, 1]))
        parts.append(encoder.encode(side.with_codes(store.blank) if blank else side))
    embeddings = np.empty((len(order), parts[0].shape[1]), np.float32)
    embeddings[order] = np.concatenate(parts)
    return embeddings[place.ravel()]
