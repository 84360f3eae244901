"""Averaged weights: the mean of the last steps' weights, older ones fading. Often better than the last, and calmer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class AveragedWeights:
    """Exponential moving average of a model's trained parameters, float32 beside it.

    The first steps count for more than `decay` says, or the random start would stay in the mean for long.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.weights = {name: p.detach().clone() for name, p in self._trained.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes the model's present weights into the mean."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(list(self.weights.values()), list(self._trained.values()), 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averaged weights, and then with its own again."""
        own = {name: p.detach().clone() for name, p in self._trained.items()}
        self._give(self.weights)
        try:
            yield
        finally:
            self._give(own)

    def keep(self) -> None:
        """Leaves the averaged weights in the model."""
        self._give(self.weights)

    def state_dict(self) -> dict[str, Tensor | int]:
        """Weights and how many steps they are of."""
        return {"updates": self.updates, **{f"weights.{name}": value for name, value in self.weights.items()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Puts back what `state_dict` returned."""
        self.updates = int(state["updates"])
        for name, value in self.weights.items():
            stored = state[f"weights.{name}"]
            assert isinstance(stored, Tensor)
            value.copy_(stored)

    @torch.no_grad()
    def _give(self, weights: dict[str, Tensor]) -> None:
        for name, p in self._trained.items():
            p.copy_(weights[name])
