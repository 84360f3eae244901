"""Optimiser and learning-rate schedule that every training run shares."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a half cosine to zero."""

    steps: int
    warmup: int
    peak: float

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def learning_rate_at(step: int, steps: int, peak: float, warmup_share: float) -> float:
    """Linear warm-up over a share of the run, then a half cosine to zero. `step` counts from 0."""
    return Schedule(steps, round(steps * warmup_share), peak).rate(step)


def build_adamw(
    modules: Iterable[nn.Module],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.98),
    epsilon: float = 1e-8,
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no biases, norms, scales or other vectors."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def clip_in_step(optimizer: torch.optim.Optimizer, largest: float) -> Tensor:
    """Norm of all gradients, float32; AdamW's next step divides them so that it is at most `largest`.

    The fused kernel reads the factor, as it reads `found_inf`, so that clipping, the guard against values that are not
    finite and AdamW are one pass over the weights, and nothing waits for the norm.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    optimizer.grad_scale = (norm / largest).clamp(min=1.0)  # type: ignore[attr-defined]  # read by torch's fused step
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every parameter group the learning rate `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
