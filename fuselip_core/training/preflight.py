"""What is looked at before the first step, because it shows then and would cost the run later.

The sigmoid loss has a value in theory for a model that knows nothing: if all similarities are the same number c, a
batch of B pairs gives softplus(-(s c + b)) + (B - 1) softplus(s c + b). A random model lies at it, a trained one below.
The masked loss of a random model is the logarithm of the vocabulary's size.
Legend: B pairs, W width.
"""

from __future__ import annotations

import copy
import logging
import math
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuselip_core.errors import FuselipError
from fuselip_core.training.checkpoint import random_state, set_random_state
from fuselip_core.training.losses import sigmoid_contrastive

if TYPE_CHECKING:
    from fuselip_core.training.loop import Trainer

logger = logging.getLogger("fuselip")
FAR_FROM_THEORY = 0.25  # share of the theoretical value
OVERFIT_PAIRS, OVERFIT_STEPS, OVERFIT_EVERY, LEARNED = 128, 400, 20, 0.95


def look_before_the_first_step(trainer: Trainer) -> dict[str, float]:
    """Loss and gradients of the first batch, which the run then begins with as if nothing had been; see the module.

    Returns the numbers for the log. Raises FuselipError for a value that is not finite and for parameters that no
    gradient reaches; warns of a loss far from theory.
    """
    random_before, mixture_before = random_state(), trainer.mixture.state_dict()
    rows = trainer.next_rows()
    losses = trainer.compute_gradients(rows, step=0)
    trainer.check_finite({"loss": losses.total}, 0, rows)
    _refuse_unreached(trainer.model, losses.masked.item() > 0)
    trainer.optimizer.zero_grad(set_to_none=True)
    found = _compare(trainer, rows, losses.contrastive.item(), losses.masked.item())
    if trainer.settings.overfit_check:
        found["preflight/overfit_accuracy"] = overfit(trainer)
    trainer.mixture.load_state_dict(mixture_before)
    set_random_state(random_before)
    return found


def chance_loss(similarity: float, scale: float, bias: float, pairs: int) -> float:
    """The sigmoid loss of `pairs` pairs a batch if every similarity is the same."""
    logit = torch.tensor(scale * similarity + bias, dtype=torch.float64)
    return float(F.softplus(-logit) + (pairs - 1) * F.softplus(logit))


def _compare(trainer: Trainer, rows: np.ndarray, contrastive: float, masked: float) -> dict[str, float]:
    """The first losses beside what theory says of them."""
    model, starts_anew = trainer.model, trainer.settings.init is None
    part = rows[: max(2, len(rows) // trainer.settings.accumulation)]  # as much as fits into memory
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


def overfit(trainer: Trainer) -> float:
    """Learns 128 pairs by heart with a copy of the model; returns the share of queries that find their target.

    Raises FuselipError where that is not nearly all: then something is broken that no run mends.
    """
    encoder = copy.copy(trainer.encoder)
    encoder.model = copy.deepcopy(trainer.model)
    rows = _distinct(trainer)
    inputs = encoder.inputs(rows, np.random.default_rng(0))
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=max(trainer.settings.learning_rate, 1e-4))
    right = 0.0
    for step in range(OVERFIT_STEPS):
        query, target = (each.float() for each in encoder.encode(inputs)[:2])
        optimizer.zero_grad(set_to_none=True)
        sigmoid_contrastive(query, target, encoder.model.logit_scale.exp(), encoder.model.logit_bias).backward()
        optimizer.step()
        if (step + 1) % OVERFIT_EVERY == 0 and (right := _accuracy(query.detach() @ target.detach().T)) >= LEARNED:
            return right
    raise FuselipError(
        f"{len(rows)} pairs could not be learned by heart in {OVERFIT_STEPS} steps ({right:.0%} find their target); "
        "look at the pairs' images and texts, or raise train.learning_rate"
    )


def _distinct(trainer: Trainer) -> np.ndarray:
    """Pairs no two of which have the same query or the same target."""
    pairs, rows = trainer.store.pairs, trainer.next_rows()
    while len(rows) < 4 * OVERFIT_PAIRS and len(rows) < len(trainer.store):
        rows = np.concatenate([rows, trainer.next_rows()])
    rows = np.unique(rows)
    for side in ("query", "target"):
        parts = [getattr(pairs, f"{side}_{part}")[rows] for part in ("image", "text")]
        _, first = np.unique(np.stack(parts, axis=1), axis=0, return_index=True)
        rows = rows[np.sort(first)]
    return rows[:OVERFIT_PAIRS]


def _accuracy(scores: Tensor) -> float:
    """Share of rows of `scores` (B, B) whose own target scores above every other; a tie is wrong."""
    own = scores.diagonal()[:, None]
    others = scores.masked_fill(torch.eye(len(scores), dtype=torch.bool, device=scores.device), -math.inf)
    return float((own > others).all(dim=1).float().mean())
