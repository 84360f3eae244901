"""Losses of the joint encoder. Legend: B pairs, W width, L tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, IGNORED, PAD


def sigmoid_contrastive(
    query: Tensor, target: Tensor, scale: Tensor, bias: Tensor, ignored: Tensor | None = None
) -> Tensor:
    """Sigmoid loss of all B x B pairs, summed over the targets and averaged over the queries.

    `query` and `target` are unit-norm (B, W); `scale` (already exponentiated) and `bias` are scalars. Pairs that are
    true in `ignored` (B, B) count neither as right nor as wrong. SigLIP (arXiv 2303.15343), equation 1 and algorithm 1.
    """
    logits = scale * query @ target.T + bias
    signs = 2.0 * torch.eye(len(query), device=query.device, dtype=logits.dtype) - 1.0
    terms = F.logsigmoid(signs * logits)
    if ignored is not None:
        terms = terms.masked_fill(ignored, 0.0)
    return -terms.sum() / len(query)


def equal_targets(text_rows: Tensor, image_rows: Tensor) -> Tensor:
    """Off-diagonal pairs (B, B) whose targets are the same: such a target is no wrong answer, so it is no negative.

    `text_rows` and `image_rows` (B) int64 name each pair's target text and image; -1 means that there is none.
    """
    same = (text_rows[:, None] == text_rows[None, :]) & (image_rows[:, None] == image_rows[None, :])
    return same & ~torch.eye(len(text_rows), dtype=torch.bool, device=text_rows.device)


def mask_tokens(ids: Tensor, mask_id: int, probability: float) -> tuple[Tensor, Tensor]:
    """Hides a share of the tokens of `ids` (B, L): → ids with `mask_id` in place, labels with IGNORED elsewhere.

    Begin, end and padding are never hidden. FuseLIP (arXiv 2506.03096), section 3.2.
    """
    special = (ids == PAD) | (ids == BEGIN_OF_TEXT) | (ids == END_OF_TEXT)
    hidden = (torch.rand(ids.shape, device=ids.device) < probability) & ~special
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, IGNORED)
