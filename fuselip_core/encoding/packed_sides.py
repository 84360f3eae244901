"""Sides of pairs as one packed sequence, and padded to few lengths, so that a compiled model meets few shapes.

Legend: B pairs, T tokens of all sequences, M hidden ones, L tokens of the longest sequence there can be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.model.packed import Layout
from fuselip_core.model.vocabulary import IGNORED, PAD

MOST_BUDGETS = 4
SPREAD = 1 / 6  # standard deviation of a sequence's length, as a share of L, in ROCOv2's captions and questions


@dataclass(frozen=True)
class PackedSides:
    """Sides of pairs as packed ids (T) with their layout, and the place in it of each row of all sides.

    Where tokens are hidden, `hidden_places` (M) int64 says where, and `labels` (M) int64 what they were. `hidden` is
    their number. If `padded`, ids are followed by padding, and labels by IGNORED, up to a budget. `copied` is the event
    behind a copy to a GPU that may still be under way.
    """

    ids: Tensor
    layout: Layout
    places: Tensor
    sizes: tuple[int, ...]
    hidden_places: Tensor | None = None
    labels: Tensor | None = None
    hidden: int = 0
    padded: bool = False
    copied: torch.cuda.Event | None = None

    def each(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same with `move` applied to every tensor."""
        names = ("ids", "places", "hidden_places", "labels")
        values = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {name: None if value is None else move(value) for name, value in values.items()}
        return replace(self, layout=self.layout.each(move), **moved)


class TokenBudgets:
    """Pads batches of `pairs` pairs to numbers of tokens that are multiples of `grain`, at most MOST_BUDGETS of them.

    Sums of many lengths lie close together, so that the distance of two budgets is four of their standard deviations:
    for 1,024 pairs of 180 tokens 4,096, of which half is padding, 1 % of the tokens of a batch.
    """

    def __init__(self, pairs: int, longest: int, mask_probability: float) -> None:
        self.pairs, self.longest, self.mask_probability = pairs, longest, mask_probability
        self.grain = 1 << int(math.log2(max(longest, 4 * SPREAD * longest * math.sqrt(2 * pairs))))
        self.used: set[int] = set()

    def pad(self, inputs: PackedSides) -> PackedSides:
        """`inputs` at a budget, with `padded` set; as they are where they fit into none."""
        tokens = len(inputs.ids)
        budget = self._budget(tokens)
        if inputs.sizes != (self.pairs, self.pairs) or budget is None or inputs.hidden > self._hidden(budget):
            return inputs
        self.used.add(budget)
        layout = replace(
            inputs.layout,
            positions=F.pad(inputs.layout.positions, (0, budget - tokens)),
            boundaries=torch.cat([inputs.layout.boundaries, self._ends(tokens, budget)]),
            longest=self.longest,
        )
        padded = replace(inputs, ids=F.pad(inputs.ids, (0, budget - tokens), value=PAD), layout=layout, padded=True)
        if inputs.labels is None or inputs.hidden_places is None:
            return padded
        missing = (0, self._hidden(budget) - inputs.hidden)
        labels = F.pad(inputs.labels, missing, value=IGNORED)
        return replace(padded, hidden_places=F.pad(inputs.hidden_places, missing), labels=labels)

    def _budget(self, tokens: int) -> int | None:
        wanted = -(-tokens // self.grain) * self.grain
        if wanted in self.used or len(self.used) < MOST_BUDGETS:
            return wanted
        most = tokens + self._sequences() * self.longest
        return min((budget for budget in self.used if tokens <= budget <= most), default=None)

    def _hidden(self, budget: int) -> int:
        """Room for the hidden tokens of a budget: their mean and six standard deviations."""
        mean = budget * self.mask_probability
        return min(budget, math.ceil(mean + 6 * math.sqrt(mean * (1 - self.mask_probability))))

    def _sequences(self) -> int:
        """Sequences of padding in each batch, so many that none is longer than L."""
        return -(-self.grain // self.longest)

    def _ends(self, tokens: int, budget: int) -> Tensor:
        """Where the sequences of padding end, int32."""
        count = self._sequences()
        return (tokens + torch.arange(1, count + 1) * (budget - tokens) // count).to(torch.int32)
