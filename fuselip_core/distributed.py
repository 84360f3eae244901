"""Distributed training with torchrun, on one machine or several; gloo on CPUs, nccl on GPUs.

Every process computes its share of a batch. Targets travel around the ring of processes, each of which compares them
with its own queries, and gradients return the same way. No process ever holds all similarities of a batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """Rank of this process and number of processes; 0 of 1 unless torchrun started several."""

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process writes files and logs to trackers for all."""
        return self.rank == 0

    def share(self, rows: Any) -> Any:
        """Every `size`-th row of a batch (B); a remainder is dropped, so that all processes get the same number."""
        return rows[: len(rows) // self.size * self.size][self.rank :: self.size]

    def ring(self, tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """Yields the tensors of each other process, in the same shapes, with gradient."""
        if self.alone:
            return
        # Imported here, because it takes seconds.
        from open_clip.loss import neighbour_exchange_with_grad  # type: ignore[import-untyped]

        before, behind = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        carried = list(tensors)
        for _ in range(self.size - 1):
            carried = [neighbour_exchange_with_grad(before, behind, tensor.contiguous()) for tensor in carried]
            yield carried

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, without gradient."""
        return values if self.alone else self.total(values) / self.size

    def total(self, values: Tensor) -> Tensor:
        """Sum over the processes, without gradient."""
        if self.alone:
            return values
        summed = values.detach().clone()
        dist.all_reduce(summed)
        return summed

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set in any process."""
        if self.alone:
            return list(flags)
        return self.total(torch.tensor(flags, dtype=torch.int32)).bool().tolist()

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages gradients over the processes; a missing gradient counts as zero."""
        if self.alone:
            return
        trained = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained])
        dist.all_reduce(flat)
        flat /= self.size
        for p, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
            p.grad = part.view_as(p)

    def broadcast(self, model: nn.Module) -> None:
        """Copies the first process's weights to all others."""
        if not self.alone:
            for value in model.state_dict().values():
                dist.broadcast(value, src=0)

    def collect(self, value: Any) -> list[Any]:
        """`value` of every process, by rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Waits until all processes get here."""
        if not self.alone:
            dist.barrier()


def join_world() -> World:
    """The processes that torchrun started, or this one alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(local_device())
        # gloo too, so that flags and counts can stay on the CPU and need not synchronise the GPU.
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return World(dist.get_rank(), size)


def local_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    # Against fragmentation, since batches vary in size.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
