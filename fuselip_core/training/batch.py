"""Where stored tokens meet the joint encoder: sides of pairs become sequences, sequences become embeddings.

Legend: B pairs, K codes an image, L tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fuselip_core.data.token_store import SideTokens
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.vocabulary import IGNORED, join, text_sequence
from fuselip_core.training.losses import mask_tokens

BUCKET_TOKENS = 16  # texts whose lengths fall into the same multiple share a padded matrix
MANY_BUCKETS = 1 << 20


@dataclass
class EncodedSide:
    """Embeddings (B, W) of one side; the masked-token loss summed over `masked` hidden tokens."""

    embeddings: Tensor
    masked_loss_sum: Tensor
    masked: int


def side_sequences(side: SideTokens, model: FuseLIPModel, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """One side of B pairs as [(rows (N) int64, ids (N, L) int64)]: with and without image, and by length of text.

    Apart, because padding costs as much arithmetic as text: a short answer beside image codes or a long caption would
    cost several times its own.
    """
    buckets = np.asarray(side.has_image) * MANY_BUCKETS + -(-side.text_lengths.astype(np.int64) // BUCKET_TOKENS)
    parts = []
    for bucket in np.unique(buckets):
        rows = np.flatnonzero(buckets == bucket)
        part = side.part(rows)
        text = text_sequence(_to_tensor(part.text_ids, device), _to_tensor(part.text_lengths, device))
        images = model.vocabulary.joint_ids(_to_tensor(part.codes, device)) if bucket >= MANY_BUCKETS else None
        parts.append((_to_tensor(rows, device), join(images, text, model.config.context_length)))
    return parts


def _to_tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values.astype(np.int64)).to(device)


def encode_side(model: FuseLIPModel, side: SideTokens, mask_probability: float, device: torch.device) -> EncodedSide:
    """Embeds one side; with a `mask_probability` the same pass also predicts the hidden tokens."""
    pieces, places = [], []
    loss_sum, masked = torch.zeros((), device=device), 0
    for rows, ids in side_sequences(side, model, device):
        labels = None
        if mask_probability:
            ids, labels = mask_tokens(ids, model.vocabulary.mask_id, mask_probability)
        output = model(ids, labels=labels)
        if labels is not None:
            count = int((labels != IGNORED).sum())
            loss_sum, masked = loss_sum + output.loss * count, masked + count
        pieces.append(output.embeddings)
        places.append(rows)
    order = torch.argsort(torch.cat(places))
    return EncodedSide(torch.cat(pieces)[order], loss_sum, masked)


class TokenEncoder:
    """Embeds stored sides without gradient; what evaluation and validation see of the model."""

    def __init__(self, model: FuseLIPModel, device: torch.device) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def encode(self, side: SideTokens) -> np.ndarray:
        """One side of B pairs → unit-norm embeddings (B, W) float32."""
        training = self.model.training
        self.model.eval()
        embeddings = encode_side(self.model, side, 0.0, self.device).embeddings
        self.model.train(training)
        return embeddings.float().cpu().numpy()
