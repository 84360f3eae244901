"""What a step found, read some steps late, so that a GPU never waits for the CPU that reads it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LATE_ON_GPU = 8  # steps


@dataclass(frozen=True)
class Seen:
    """The numbers of one step, with its pairs (B)."""

    step: int
    rows: np.ndarray
    values: dict[str, float]


class LateLook:
    """Keeps the scalars of the last `late` steps where they are, and hands out those of the steps before.

    `broken` is 1 from the first step with a value that is not finite: given to AdamW as `found_inf`, it keeps every
    later step from changing a weight, long before anybody has read the value.
    """

    def __init__(self, device: torch.device, late: int | None = None) -> None:
        self.late = late if late is not None else LATE_ON_GPU * (device.type == "cuda")
        self.broken = torch.zeros((), device=device)
        self._coming: deque[tuple[int, np.ndarray, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def add(self, step: int, rows: np.ndarray, scalars: Mapping[str, Tensor]) -> None:
        """Notes the scalars of `step`, whose pairs are `rows`."""
        values = torch.stack([value.detach().float() for value in scalars.values()])
        self.broken.clamp_(min=(~values.isfinite().all()).float())
        copied = None
        if values.is_cuda:  # a copy that is asked for later would wait for all that was begun until then
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._coming.append((step, rows, list(scalars), values, copied))

    def due(self, all_steps: bool = False) -> Iterator[Seen]:
        """The steps that are `late` steps back, or all that were not handed out yet, which waits for them."""
        while len(self._coming) > (0 if all_steps else self.late):
            step, rows, names, values, copied = self._coming.popleft()
            if copied is not None:
                copied.synchronize()
            yield Seen(step, rows, dict(zip(names, values.tolist(), strict=True)))
