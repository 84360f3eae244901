"""Going on from a checkpoint: a longer context, weights between before and after, and what an adaptation changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import FuseLIPModel


@torch.no_grad()
def extend_context(model: FuseLIPModel, context_length: int) -> None:
    """Gives `model` places for `context_length` tokens; those it has stay, new ones begin as copies of its last.

    So no sequence that fitted before is embedded differently, and what lies beyond is at first read as if it stood at
    the old end. Raises FuselipError for a length below the model's own.
    """
    own = model.config.context_length
    if context_length < own:
        raise FuselipError(
            f"model.context_length {context_length} is below the {own} places of train.init; leave it empty or raise it"
        )
    table = model.positional_embedding
    longer = torch.cat([table, table[-1:].expand(context_length - own, -1)])
    model.positional_embedding = nn.Parameter(longer.clone())
    model.config.context_length = context_length


@torch.no_grad()
def interpolate(model: nn.Module, before: Mapping[str, Tensor], share: float) -> None:
    """Leaves in `model` the weights that lie `share` of the way from `before` to its own.

    Robust fine-tuning (WiSE-FT, arXiv 2109.01903): on that line both what was learned and what was known stay high.
    """
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(torch.lerp(before[name].to(p), p, share))


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter that trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
