"""The batches of a run.

All that is random in a batch is drawn from the seed, its step and its process, so that neither a thread that makes it
ahead nor a resumed run changes what is in it. Legend: B pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fuselip_core.config import TrainSettings
from fuselip_core.data.tokens.joined import Store
from fuselip_core.distributed import World
from fuselip_core.encoding.from_codes import PairEncoder, pair_keys
from fuselip_core.training.mixture import Mixture
from fuselip_core.training.plan import kind_shares


@dataclass(frozen=True)
class Batch:
    """One process's part of a step: pair rows (B), the encoder's inputs in parts, and keys (B, 3), see losses.akin.

    `mixture` is the state of the order of pairs behind this batch, from where a resumed run goes on.
    """

    rows: np.ndarray
    parts: list[Any]
    keys: Tensor
    mixture: Mapping[str, Any]


class Batches:
    """Makes the batches of a run, each in `parts` parts."""

    def __init__(self, encoder: PairEncoder, store: Store, settings: TrainSettings, world: World, parts: int) -> None:
        self.encoder, self.store, self.settings, self.world, self.parts = encoder, store, settings, world, parts
        shares = kind_shares(store, settings)
        self.mixture = Mixture(store, shares, settings.batch_size, settings.seed, grouped=settings.grouped)

    def next(self, step: int) -> Batch:
        """The batch of `step`; steps are asked for in order, each once."""
        return self.make(self.next_rows(), step)

    def next_rows(self) -> np.ndarray:
        """This process's pairs (B) of the next batch."""
        rows: np.ndarray = self.world.share(next(self.mixture))
        return rows

    def make(self, rows: np.ndarray, step: int) -> Batch:
        """The batch of `step` with the pairs `rows` (B)."""
        settings = self.settings
        if self.encoder.looks_ahead:
            self.encoder.expect(rows, self._view_rng(step), self.parts)
        view_rng = self._view_rng(step)
        parts = [self.encoder.inputs(part, view_rng) for part in np.array_split(rows, self.parts)]
        keys = torch.from_numpy(pair_keys(self.store, rows, settings.alike_pairs == "ignored"))
        return Batch(rows, parts, keys.pin_memory() if torch.cuda.is_available() else keys, self.mixture.state_dict())

    def _view_rng(self, step: int) -> np.random.Generator:
        return np.random.default_rng([self.settings.seed, step, *([self.world.rank] if self.world.rank else [])])
