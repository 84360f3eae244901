"""Loss and gradients of one batch: in one piece, in parts that fit into memory, and over several processes.

A contrastive loss needs all embeddings at once, a transformer's activations only fit for some. So in parts each is
first encoded without keeping anything, the loss gives the gradient of every embedding, and then each is encoded again
and takes its embeddings' gradient back into the model: the gradient of the whole batch (GradCache, arXiv 2101.06983).
Legend: B pairs of this process, W width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fuselip_core.distributed import World
from fuselip_core.encoding.from_codes import PairEncoder

Contrast = Callable[[Tensor, Tensor], Tensor]  # queries and targets (B, W) → the contrastive loss


@dataclass(frozen=True)
class Losses:
    """The parts of a loss, without gradient."""

    contrastive: Tensor
    masked: Tensor
    mask_weight: float

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.contrastive + self.mask_weight * self.masked


def backward(
    encoder: PairEncoder, parts: Sequence[Any], contrast: Contrast, mask_weight: float, world: World, bfloat16: bool
) -> Losses:
    """Adds the gradients of this process's loss to the parameters; their mean over the processes is the batch's.

    `parts` are inputs of the encoder, in order the rows that `contrast` compares. Hidden tokens count alike wherever
    they are: each part's mean weighs as much as it has of all processes' tokens.
    """
    shares = _shares([part.hidden for part in parts], world)
    precision = _Precision(next(encoder.model.parameters()).device.type, bfloat16)
    if len(parts) == 1:
        with precision():
            query, target, masked = encoder.encode(parts[0])
        contrastive, masked = contrast(query.float(), target.float()), masked * shares[0]
        (contrastive + mask_weight * masked).backward()
        return Losses(contrastive.detach(), masked.detach(), mask_weight)
    with torch.no_grad(), precision():
        first = [encoder.encode(part)[:2] for part in parts]
    query, target = (torch.cat(each).float().requires_grad_() for each in zip(*first, strict=True))
    contrastive = contrast(query, target)
    contrastive.backward()
    assert query.grad is not None and target.grad is not None
    masked, start = torch.zeros_like(contrastive), 0
    for part, share in zip(parts, shares, strict=True):
        with precision():
            part_query, part_target, part_masked = encoder.encode(part)
        rows = slice(start, start := start + len(part_query))
        carried = (part_query.float() * query.grad[rows]).sum() + (part_target.float() * target.grad[rows]).sum()
        (carried + mask_weight * share * part_masked).backward()
        masked = masked + share * part_masked.detach()
    return Losses(contrastive.detach(), masked.detach(), mask_weight)


def _shares(hidden: Sequence[int], world: World) -> list[float]:
    """What the mean loss of each part weighs: its share of the hidden tokens, so that processes' means add up."""
    total = sum(hidden)
    if not world.alone:
        total = int(world.total(torch.tensor(total)))
    return [world.size * count / total if total else 0.0 for count in hidden]


@dataclass(frozen=True)
class _Precision:
    """Lower precision for what the encoder computes, as a context that can be entered again and again."""

    device_type: str
    bfloat16: bool

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.bfloat16)
