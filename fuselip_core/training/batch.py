"""Where stored tokens meet the joint encoder: sides of pairs become packed sequences, sequences become embeddings.

Legend: B pairs, K codes an image, L tokens, T tokens of all sequences, W width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fuselip_core.data.token_store import SideTokens
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.packed import Layout, pack
from fuselip_core.model.vocabulary import join, text_sequence
from fuselip_core.training.losses import mask_tokens


def pack_sides(sides: Sequence[SideTokens], model: FuseLIPModel) -> tuple[Tensor, Layout, Tensor]:
    """Sides of pairs → packed ids (T) int64 and their layout, on the CPU, and the place in it of each row of all sides.

    All sides go through the encoder at once: one look-up, one product a layer, one gradient of the embedding table.
    """
    groups, places, before = [], [], 0
    for side in sides:
        has_image = np.asarray(side.has_image)
        for images in (True, False):
            rows = np.flatnonzero(has_image == images)
            if len(rows):
                groups.append(_sequences(side.part(rows), images, model))
                places.append(rows + before)
        before += len(side)
    ids, layout, order = pack(groups)
    return ids, layout, order[torch.from_numpy(np.argsort(np.concatenate(places)))]


def _sequences(side: SideTokens, has_images: bool, model: FuseLIPModel) -> Tensor:
    """Rows that all have an image, or none, as padded joint ids (N, L) int64."""
    text = text_sequence(_to_tensor(side.text_ids), _to_tensor(side.text_lengths))
    images = model.vocabulary.joint_ids(_to_tensor(side.codes)) if has_images else None
    return join(images, text, model.config.context_length)


def _to_tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(values.astype(np.int64))


def encode_sides(
    model: FuseLIPModel, sides: Sequence[SideTokens], mask_probability: float, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Embeds sides of pairs → unit-norm embeddings (B, W) a side, and the masked-token loss.

    With a `mask_probability` the same pass also predicts the tokens it hides; the loss is their mean, else 0.
    """
    ids, layout, places = pack_sides(sides, model)
    labels = None
    if mask_probability:
        ids, labels = mask_tokens(ids, model.vocabulary.mask_id, mask_probability)
        labels = labels.to(device, non_blocking=True)
    output = model(ids.to(device, non_blocking=True), labels=labels, layout=layout.to(device))
    embeddings = output.embeddings[places.to(device)].split([len(side) for side in sides])
    loss = torch.zeros((), device=device) if labels is None else output.loss
    return list(embeddings), loss


class TokenEncoder:
    """Embeds stored sides without gradient; what evaluation and validation see of the model."""

    def __init__(self, model: FuseLIPModel, device: torch.device) -> None:
        self.model, self.device = model, device

    @torch.no_grad()
    def encode(self, side: SideTokens) -> np.ndarray:
        """One side of B pairs → unit-norm embeddings (B, W) float32."""
        training = self.model.training
        self.model.eval()
        embeddings, _ = encode_sides(self.model, [side], 0.0, self.device)
        self.model.train(training)
        return embeddings[0].float().cpu().numpy()
