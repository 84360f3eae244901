"""How the blocks of a model run, whatever its family: compiled, or again in the backward pass."""

from __future__ import annotations

import os
import shutil

from torch import nn

from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import Transformer


def recompute_blocks(model: nn.Module) -> None:
    """Lets every block keep only its input for the backward pass and compute the rest again.

    Gradient checkpointing (arXiv 1604.06174): activations of one block instead of all, for a third more work.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            module.recompute = True


def compile_blocks(model: nn.Module) -> None:
    """Compiles every block when it first runs, for any number of tokens; names of parameters stay as they are.

    Blocks and not the whole model: they are all alike, so that one is compiled and the others find it. Raises
    FuselipError where there is no C++ compiler, which torch would only miss in the first step.
    """
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise FuselipError(f"train.compile needs a C++ compiler, here {compiler}; install g++, or turn it off")
    for module in model.modules():
        for block in getattr(module, "resblocks", ()):
            block.compile(dynamic=True)
