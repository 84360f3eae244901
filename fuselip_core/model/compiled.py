"""What torch.compile needs and does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from fuselip_core.errors import FuselipError

P = ParamSpec("P")
Result = TypeVar("Result")


def require_compiler() -> None:
    """Raises FuselipError where there is no C++ compiler, which torch would only miss in the first step."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise FuselipError(f"train.compile needs a C++ compiler, here {compiler}; install g++, or turn it off")


def compiled(function: Callable[P, Result], graphs: bool) -> Callable[P, Result]:
    """`function` compiled as one graph for each set of shapes, replayed as CUDA graphs if `graphs`."""
    mode = "reduce-overhead" if graphs else None
    found: Callable[P, Result] = torch.compile(function, dynamic=False, fullgraph=True, mode=mode)
    return found


def compile_blocks(model: nn.Module) -> None:
    """Compiles every block when it first runs, for any number of tokens; names of parameters stay as they are.

    Blocks and not the whole model: they are all alike, so that one is compiled and the others find it.
    """
    require_compiler()
    for module in model.modules():
        for block in getattr(module, "resblocks", ()):
            block.compile(dynamic=True)


def graphs_compiled() -> int:
    """Graphs that this process has compiled so far, each once for every shape that it met."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
