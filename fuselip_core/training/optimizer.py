"""Optimiser and learning-rate schedule that every training run shares."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

BLOCK = re.compile(r"(?:^|\.)transformer\.resblocks\.(\d+)\.")
# What a tower has below its first block.
BOTTOM = re.compile(r"(?:^|\.)(token_embedding|positional_embedding|class_embedding|conv1|ln_pre)\b")
FUSION = "fusion_module."  # blocks above the towers of a late-fusion model


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
    layer_decay: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW that decays matrices only: no biases, norms, scales or other vectors.

    With a `layer_decay` below 1 the learning rate falls by that factor from each block to the one below it, so that
    what a checkpoint has learned about single tokens moves least (ULMFiT, arXiv 1801.06146; BEiT, arXiv 2106.08254).
    """
    groups = []
    for scale, parameters in _by_depth(modules, layer_decay):
        for matrices in (True, False):
            chosen = [p for p in parameters if (p.ndim >= 2) == matrices]
            if chosen or layer_decay == 1.0:
                decay = weight_decay if matrices else 0.0
                groups.append({"params": chosen, "weight_decay": decay, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=epsilon, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Gives every parameter group the learning rate `value`, times the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = value * group.get("lr_scale", 1.0)


def layers_above(names: Iterable[str]) -> dict[str, int]:
    """Parameter name → how many steps it lies below the top: 0 for heads and final norms, 1 for the last block, ..."""
    names = list(names)
    depth: dict[str, int] = defaultdict(int)  # of each tower
    for name in names:
        if (block := BLOCK.search(name)) and not name.startswith(FUSION):
            depth[name[: block.start()]] = max(depth[name[: block.start()]], int(block.group(1)) + 1)
    below = {}
    for name in names:
        below[name] = 0
        if name.startswith(FUSION):
            continue
        if block := BLOCK.search(name):
            below[name] = depth[name[: block.start()]] - int(block.group(1))
        elif bottom := BOTTOM.search(name):
            below[name] = depth[name[: bottom.start()]] + 1
    return below


def _by_depth(modules: Iterable[nn.Module], layer_decay: float) -> Iterator[tuple[float, list[nn.Parameter]]]:
    """Factor of the learning rate, and the parameters that train with it."""
    modules = list(modules)
    if layer_decay == 1.0:
        yield 1.0, [p for module in modules for p in module.parameters() if p.requires_grad]
        return
    levels: dict[int, list[nn.Parameter]] = defaultdict(list)
    for module in modules:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, level in layers_above(named).items():
            levels[level].append(named[name])
    for level in sorted(levels):
        yield layer_decay**level, levels[level]
