"""Losses of the joint encoder. Legend: B pairs, W width, L tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fuselip_core.distributed import World


def sigmoid_contrastive(
    query: Tensor, target: Tensor, scale: Tensor, bias: Tensor, ignored: Tensor | None = None
) -> Tensor:
    """Sigmoid loss of all B x B pairs, summed over the targets and averaged over the queries.

    `query` and `target` are unit-norm (B, W); `scale` (already exponentiated) and `bias` are scalars. Pairs that are
    true in `ignored` (B, B) count neither as right nor as wrong. SigLIP (arXiv 2303.15343), equation 1 and algorithm 1.
    """
    itself = torch.eye(len(query), dtype=torch.bool, device=query.device)
    return _sigmoid_sum(query, target, scale, bias, itself, ignored) / len(query)


def _sigmoid_sum(
    left: Tensor, right: Tensor, scale: Tensor, bias: Tensor, belong: Tensor | None, ignored: Tensor | None
) -> Tensor:
    """Sum of the sigmoid losses of `left` (B, W) with `right` (C, W).

    Pairs that are true in `belong` (B, C) are the right ones, none without it; those in `ignored` (B, C) don't count.
    """
    logits = scale * left @ right.T + bias
    terms = F.logsigmoid(-logits if belong is None else torch.where(belong, logits, -logits))
    if ignored is not None:
        terms = terms.masked_fill(ignored, 0.0)
    return -terms.sum()


@dataclass(frozen=True)
class SigmoidLoss:
    """The sigmoid loss of embeddings (B, W) with others (C, W); their keys tell which are no negatives, see `akin`.

    `scale` (already exponentiated) and `bias` are scalars. With `rows`, only so many embeddings are compared at a time,
    and again in the backward pass: a large batch then takes B x W of memory and not B x B. With `once`, a target that
    others of the same process repeat is a negative once: otherwise an answer to a third of all questions is pushed away
    a third of a batch times, and the model ranks by likelihood over frequency where likelihood alone is wanted.
    """

    scale: Tensor
    bias: Tensor
    rows: int | None = None
    once: bool = False

    def __call__(self, left: Tensor, right: Tensor, keys: Tensor, others: Tensor, belong: bool = False) -> Tensor:
        """Summed over `right`, averaged over `left`; left i and right i are a right pair if `belong`, else none is."""
        if self.rows is None or self.rows >= len(left):
            return self._of_rows(left, right, keys, others, 0 if belong else None) / len(left)
        total = left.new_zeros(())
        for start in range(0, len(left), self.rows):
            part = slice(start, start + self.rows)
            total = total + checkpoint(
                self._of_rows,
                *(left[part], right, keys[part], others, start if belong else None),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total / len(left)

    def _of_rows(self, left: Tensor, right: Tensor, keys: Tensor, others: Tensor, first: int | None) -> Tensor:
        """Sum over some rows of `left`, the first of which belongs to row `first` of `right`."""
        ignored, belong = akin(keys, others), None
        if self.once:
            ignored = ignored | repeated(others)
        if first is not None:
            places = torch.arange(len(others), device=left.device)
            belong = places == places[first : first + len(left), None]
            ignored = ignored & ~belong
        return _sigmoid_sum(left, right, self.scale, self.bias, belong, ignored)


@dataclass(frozen=True)
class Contrast:
    """How a run compares embeddings; `rows` and `once` as in SigmoidLoss, the others as below."""

    rows: int | None
    once: bool
    all_combinations: bool
    targets_apart: bool
    world: World

    def __call__(self, query: Tensor, target: Tensor, keys: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        """Embeddings (B, W), their keys (B, 3), and the model's `log_scale` and `bias` → what is minimised."""
        loss_of = SigmoidLoss(log_scale.exp(), bias, self.rows, self.once)
        return contrastive_over_all(query, target, keys, loss_of, self.world, self.all_combinations, self.targets_apart)


def contrastive_over_all(
    query: Tensor,
    target: Tensor,
    keys: Tensor,
    loss_of: SigmoidLoss,
    world: World,
    all_combinations: bool,
    targets_apart: bool = False,
) -> Tensor:
    """The sigmoid loss of this process's queries with the targets of all processes; its mean is the joint batch's.

    `query`, `target` (B, W) unit-norm; `keys` (B, 3) int64 tell which pairs are no negatives of each other, see `akin`.
    With `all_combinations` queries are also told from queries and targets from targets, as an option of the published
    code does (but for its constant for each pair with itself). `targets_apart` only tells targets from targets.
    """
    loss = loss_of(query, target, keys, keys, belong=True)
    if all_combinations:
        loss = loss + loss_of(query, query, keys, keys)
    if all_combinations or targets_apart:
        loss = loss + loss_of(target, target, keys, keys)
    # One tensor goes round, so that gradients come back in one order in every process.
    carried = torch.cat([target, query], dim=1) if all_combinations else target
    for far_keys, far in world.ring([keys, carried]):
        loss = loss + loss_of(query, far[:, : query.shape[1]], keys, far_keys)
        if all_combinations or targets_apart:
            loss = loss + loss_of(target, far[:, : query.shape[1]], keys, far_keys)
        if all_combinations:
            loss = loss + loss_of(query, far[:, query.shape[1] :], keys, far_keys)
    return loss


def akin(keys: Tensor, others: Tensor) -> Tensor:
    """Which pairs are no negatives of each other, (B, C) bool, for keys (B, 3) and (C, 3) int64.

    A key is the target's text and image row, -1 for none, and the number of a set of pairs that say the same, -1 for
    none. An equal target is no wrong answer, and neither is another caption of the same finding.
    """
    same_target = (keys[:, None, :2] == others[None, :, :2]).all(dim=-1)
    same_set = (keys[:, None, 2] == others[None, :, 2]) & (keys[:, None, 2] >= 0)
    return same_target | same_set


def repeated(keys: Tensor) -> Tensor:
    """Whether an earlier one of the keys (C, 3) int64 has the same target, (C) bool."""
    targets = (keys[:, 0] << 32) + keys[:, 1]  # sorted, since `unique` would make a GPU wait for its size
    in_order, order = targets.sort(stable=True)
    again = F.pad(in_order[1:] == in_order[:-1], (1, 0))
    return torch.empty_like(again).scatter_(0, order, again)
