"""Optimiser and learning-rate schedule that every training run shares."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fuselip_core.config import TrainSettings
from fuselip_core.model.blocks import ResidualBlock


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
    without: Collection[Tensor] = (),
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no biases, norms, scales or other vectors. Parameters `without` are left out."""
    others = {id(p) for p in without}
    trained = [p for module in modules for p in module.parameters() if p.requires_grad and id(p) not in others]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def clip_in_step(optimizer: torch.optim.Optimizer | MuonAdamW, largest: float) -> Tensor:
    """Norm of all gradients, float32; AdamW's next step divides them so that it is at most `largest`.

    The fused kernel reads the factor, as it reads `found_inf`, so that clipping, the guard against values that are not
    finite and AdamW are one pass over the weights, and nothing waits for the norm.
    """
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    optimizer.grad_scale = (norm / largest).clamp(min=1.0)  # type: ignore[union-attr]  # read by torch's fused step
    return norm


class MuonAdamW:
    """Muon for the matrices of the transformer's blocks, AdamW for all else (embeddings, norms, biases, heads).

    Muon (arXiv 2502.16982) makes the update of a matrix orthogonal, so that rare directions are learned as fast as
    frequent ones, and a small model needs fewer steps. Its updates have the size of AdamW's, and both
    take one learning rate. `grad_scale` and `found_inf` mean what they mean to fused AdamW, but are waited for: the
    first, a scalar, divides the gradients, and where the second is not 0 a step changes nothing.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
    ) -> None:
        modules = list(modules)
        blocks = [part for module in modules for part in module.modules() if isinstance(part, ResidualBlock)]
        matrices = [p for block in blocks for p in block.parameters() if p.ndim == 2 and p.requires_grad]
        self.muon = torch.optim.Muon(
            matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = build_adamw(modules, learning_rate, weight_decay, betas, epsilon, matrices)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Of both, to set the learning rate in."""
        return [*self.muon.param_groups, *self.adamw.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer."""
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def step(self) -> None:
        """One step of both, or none where `found_inf`."""
        if self.found_inf is not None and self.found_inf:
            return
        if self.grad_scale is not None:
            grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(grads, self.grad_scale)
        self.muon.step()
        self.adamw.step()

    def state_dict(self) -> dict[str, Any]:
        """Of both."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` gave."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW | MuonAdamW:
    """The optimiser of `train.optimizer`."""
    if settings.optimizer == "muon":
        return MuonAdamW([model], settings.learning_rate, settings.weight_decay, settings.betas, settings.epsilon)
    return build_adamw([model], settings.learning_rate, settings.weight_decay, settings.betas, settings.epsilon)


def set_learning_rate(optimizer: torch.optim.Optimizer | MuonAdamW, value: float) -> None:
    """Gives every parameter group the learning rate `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
