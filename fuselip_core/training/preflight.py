"""What is looked at before the first step, because it shows then and would cost the run later.

The sigmoid loss has a value in theory for a model that knows nothing: if all similarities are the same number c, a
batch of B pairs gives softplus(-(s c + b)) + (B - 1) softplus(s c + b). A random model lies at it, a trained one below.
The masked loss of a random model is the logarithm of the vocabulary's size.
Legend: B pairs, W width.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from fuselip_core.errors import FuselipError
from fuselip_core.training.checkpoint import random_state, set_random_state
from fuselip_core.training.late_look import Seen

if TYPE_CHECKING:
    from fuselip_core.training.loop import Trainer

logger = logging.getLogger("fuselip")
FAR_FROM_THEORY = 0.25  # share of the theoretical value


def look_before_the_first_step(trainer: Trainer) -> dict[str, float]:
    """Loss and gradients of the first batch, which the run then begins with as if nothing had been; see the module.

    Returns the numbers for the log. Raises FuselipError for a value that is not finite and for parameters that no
    gradient reaches; warns of a loss far from theory.
    """
    random_before, mixture_before = random_state(), trainer.batches.mixture.state_dict()
    rows = trainer.batches.next_rows()
    losses = trainer.compute_gradients(trainer.batches.make(rows, step=0))
    trainer.check_finite(Seen(0, rows, {"loss": losses.total.item(), "grad_norm": 0.0}))
    _refuse_unreached(trainer.model, losses.masked.item() > 0)
    trainer.optimizer.zero_grad(set_to_none=True)
    found = _compare(trainer, rows, losses.contrastive.item(), losses.masked.item())
    trainer.batches.mixture.load_state_dict(mixture_before)
    set_random_state(random_before)
    return found


def chance_loss(similarity: float, scale: float, bias: float, pairs: int) -> float:
    """The sigmoid loss of `pairs` pairs a batch if every similarity is the same."""
    logit = torch.tensor(scale * similarity + bias, dtype=torch.float64)
    return float(F.softplus(-logit) + (pairs - 1) * F.softplus(logit))


def _compare(trainer: Trainer, rows: np.ndarray, contrastive: float, masked: float) -> dict[str, float]:
    """The first losses beside what theory says of them."""
    model, starts_anew = trainer.model, trainer.settings.init is None
    # As much as fits into memory; one pair less where code is compiled, which it is for whole batches only.
    part = rows[: max(2, len(rows) // trainer.batches.parts - trainer.settings.compile)]
    with torch.no_grad():
        query, target, _ = trainer.encoder.encode(trainer.encoder.inputs(part, np.random.default_rng(0)))
    similarity = float((query.float() @ target.float().T).mean())
    scale, bias = model.logit_scale.exp().item(), model.logit_bias.item()
    pairs = len(rows) * trainer.world.size
    found = {
        "preflight/contrastive": contrastive,
        "preflight/contrastive_at_chance": chance_loss(similarity, scale, bias, pairs),
    }
    if masked:
        found |= {"preflight/masked": masked, "preflight/masked_at_chance": math.log(model.config.vocab_size)}
    plain = not trainer.settings.all_combinations
    for name in ("contrastive", "masked") if plain else ("masked",):
        value, chance = found.get(f"preflight/{name}"), found.get(f"preflight/{name}_at_chance", math.nan)
        if value is None:
            continue
        if starts_anew and abs(value - chance) > FAR_FROM_THEORY * chance:
            logger.warning("the %s loss starts at %.3g, where a random model has %.3g", name, value, chance)
        if not starts_anew and value > chance:
            logger.warning(
                "the %s loss starts at %.3g, no better than knowing nothing (%.3g): does train.init fit these data?",
                *(name, value, chance),
            )
    return found


def _refuse_unreached(model: nn.Module, masked: bool) -> None:
    """Raises FuselipError naming parameters that should train and got no gradient."""
    unreached = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad
        and (p.grad is None or not bool(p.grad.any()))
        # Nothing hidden, nothing to predict.
        and (masked or not name.startswith("mask_prediction_head"))
    ]
    if unreached:
        more = f" and {len(unreached) - 3} more" if len(unreached) > 3 else ""
        raise FuselipError(
            f"no gradient reaches {', '.join(unreached[:3])}{more}, so they would never train; look at train.mixture, "
            "which must give the model every kind of input, or set train.preflight=false"
        )
