"""What the next step needs is made in a thread while this one computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

import torch

Item = TypeVar("Item")


class Ahead(Generic[Item]):
    """Calls `make` for each of `steps` steps, one step ahead; used with `with`, which ends its thread."""

    def __init__(self, make: Callable[[int], Item], steps: int, device: torch.device) -> None:
        self._make, self._steps = make, steps
        # A thread of its own has a GPU of its own, the first, until it is told another.
        use_gpu: dict[str, Any] = (
            {"initializer": torch.cuda.set_device, "initargs": (device,)} if device.type == "cuda" else {}
        )
        self._thread = ThreadPoolExecutor(1, "ahead", **use_gpu)
        self._coming: Future[Item] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> Item:
        """What was made for `step`; the thread then begins with the next. Steps are asked for in order, each once."""
        item = self._coming.result() if self._coming else self._make(step)
        self._coming = self._thread.submit(self._make, step + 1) if step + 1 < self._steps else None
        return item
