"""Losses of the joint encoder. Legend: B pairs, W width, L tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, IGNORED, PAD
from fuselip_core.training.distributed import World


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


def sigmoid_negatives(left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, ignored: Tensor) -> Tensor:
    """The sigmoid loss of pairs none of which belong together, summed over `right` and averaged over `left`.

    `left` (B, W) and `right` (C, W) are unit-norm; pairs that are true in `ignored` (B, C) do not count.
    """
    terms = F.logsigmoid(-(scale * left @ right.T + bias))
    return -terms.masked_fill(ignored, 0.0).sum() / len(left)


def contrastive_over_all(
    query: Tensor, target: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, world: World, all_combinations: bool
) -> Tensor:
    """The sigmoid loss of this process's queries with the targets of all processes; its mean is the joint batch's.

    `query`, `target` (B, W) unit-norm; `keys` (B, 3) int64 tell which pairs are no negatives of each other, see `akin`.
    With `all_combinations` queries are also told from queries and targets from targets, as an option of the published
    code does (but for its constant for each pair with itself).
    """
    own = akin(keys, keys)
    itself = torch.eye(len(keys), dtype=torch.bool, device=keys.device)
    loss = sigmoid_contrastive(query, target, scale, bias, own & ~itself)
    if all_combinations:
        for side in (query, target):
            loss = loss + sigmoid_negatives(side, side, scale, bias, own)
    # One tensor goes round, so that gradients come back in one order in every process.
    carried = torch.cat([target, query], dim=1) if all_combinations else target
    for far_keys, far in world.ring([keys, carried]):
        equal = akin(keys, far_keys)
        loss = loss + sigmoid_negatives(query, far[:, : query.shape[1]], scale, bias, equal)
        if all_combinations:
            loss = loss + sigmoid_negatives(target, far[:, : query.shape[1]], scale, bias, equal)
            loss = loss + sigmoid_negatives(query, far[:, query.shape[1] :], scale, bias, equal)
    return loss


def akin(keys: Tensor, others: Tensor) -> Tensor:
    """Which pairs are no negatives of each other, (B, C) bool, for keys (B, 3) and (C, 3) int64.

    A key is the target's text and image row, -1 for none, and the number of a set of pairs that say the same, -1 for
    none. An equal target is no wrong answer, and neither is another caption of the same finding.
    """
    same_target = (keys[:, None, :2] == others[None, :, :2]).all(dim=-1)
    same_set = (keys[:, None, 2] == others[None, :, 2]) & (keys[:, None, 2] >= 0)
    return same_target | same_set


def mask_tokens(ids: Tensor, mask_id: int, probability: float) -> tuple[Tensor, Tensor]:
    """Hides a share of the tokens of `ids` (B, L): → ids with `mask_id` in place, labels with IGNORED elsewhere.

    Begin, end and padding are never hidden. FuseLIP (arXiv 2506.03096), section 3.2.
    """
    special = (ids == PAD) | (ids == BEGIN_OF_TEXT) | (ids == END_OF_TEXT)
    hidden = (torch.rand(ids.shape, device=ids.device) < probability) & ~special
    return ids.masked_fill(hidden, mask_id), ids.masked_fill(~hidden, IGNORED)
