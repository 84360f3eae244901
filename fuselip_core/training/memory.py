"""What a training step takes of memory, from the model's dimensions, before the first one is made.

Counted are weights with their gradients and AdamW's moments, what the forward pass keeps for the backward pass, and the
largest of what comes and goes. Tensor by tensor it is what eager PyTorch saves of fuselip.py and blocks.py; the tests
compare it with what `torch.autograd.graph.saved_tensors_hooks` sees.
Legend: B pairs, T tokens, R of them that are read behind the last block, M hidden ones, W width, V vocabulary.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import psutil
import torch

from fuselip_core.config import TrainSettings
from fuselip_core.model.fuselip import FuseLIPModel, Kept
from fuselip_core.model.fuselip_config import FuseLIPConfig
from fuselip_core.model.hub import Model
from fuselip_core.model.linear_cross_entropy import ROWS_AT_ONCE

logger = logging.getLogger("fuselip")
STATE_BYTES = 16  # a weight, its gradient and AdamW's two moments, float32
TEXT_TOKENS = 36  # of a caption on average, begin and end included, as in docs/scaling.md
MOST_OF_FREE = 0.9  # the rest is for what libraries and the allocator take
GIGABYTE = 1e9


@dataclass(frozen=True)
class StepMemory:
    """Bytes of the parts of a step: what stays, what the forward pass keeps, and the largest that comes and goes."""

    state: float
    kept: float
    passing: float

    @property
    def total(self) -> float:
        """All at once, which is the peak."""
        return self.state + self.kept + self.passing


def parameter_count(config: FuseLIPConfig) -> int:
    """Weights of a joint encoder without its image tokenizer."""
    width, hidden = config.width, int(config.width * config.mlp_ratio)
    block = 4 * width**2 + 2 * width * hidden + 9 * width + hidden
    table = (config.vocab_size + config.context_length) * width
    head = (width**2 + 3 * width + config.vocab_size) * config.mask_token
    return config.layers * block + table + head + 2 * width + 2


def usually_kept(settings: TrainSettings) -> Kept:
    """What a step keeps for the backward pass where memory is no question."""
    if settings.gradient_checkpointing:
        return "inputs"
    return "products" if settings.compile else "all"


def step_memory(
    config: FuseLIPConfig,
    settings: TrainSettings,
    pairs: int,
    parts: int,
    device: str,
    tokens: float | None = None,
    kept: Kept | None = None,
) -> StepMemory:
    """Memory of a step of `pairs` pairs in `parts` parts on a device of that type; `tokens` are a part's, if known."""
    half = settings.precision == "bfloat16" or (settings.precision == "auto" and device == "cuda")
    number, width, kept = 2 if half else 4, config.width, kept or usually_kept(settings)
    part = pairs / parts
    if tokens is None:
        tokens = part * (config.codes_per_image + TEXT_TOKENS + 4)
    hidden = tokens * settings.mask_probability * bool(settings.mask_weight)
    read = 2 * part + hidden
    into, behind = _kept_of_block(config, number, device, kept)
    if kept == "inputs":
        blocks = 4 * width * tokens * config.layers + tokens * (into + behind)
    else:
        blocks = (config.layers - 1) * tokens * (into + behind) + tokens * into + read * (behind + number * width)
    matrices = config.layers * (4 + 2 * config.mlp_ratio) * width**2 + width**2
    cast = number * matrices if half else 0  # what autocast multiplies with, kept until the backward pass
    head = hidden * (8 * number + 4) * width + 4 * (config.vocab_size + 1) * width * bool(hidden)
    contrast = 20 * pairs * min(pairs, settings.contrast_rows or pairs)
    chunk = 10 * ROWS_AT_ONCE[device] * config.vocab_size * bool(hidden)
    passing = max(chunk, tokens * width * (2 * config.mlp_ratio * number + 8))
    return StepMemory(STATE_BYTES * parameter_count(config), blocks + cast + head + contrast, passing)


def _kept_of_block(config: FuseLIPConfig, number: int, device: str, kept: Kept) -> tuple[float, float]:
    """Bytes a token that a block keeps: up to the attended values, and behind them. The residual path is float32."""
    width, heads = config.width, 4 * config.heads
    if kept in ("products", "but projections"):
        products = 2 + 3 * (kept == "products")
        return number * width * products + heads, number * width * (config.mlp_ratio + 1)
    joined = number * width * (device == "cpu")  # runs of equal lengths are attended apart, and then joined
    into = 4 * width + 8 + number * width + 3 * number * width + number * width + joined + heads
    behind = 4 * width + 8 + number * width + 2 * number * width * config.mlp_ratio
    return into, behind


def fit_memory(model: Model, settings: TrainSettings, pairs: int) -> tuple[int, Kept]:
    """Parts of a step of `pairs` pairs, and what it keeps for the backward pass; says what it costs to make it fit.

    If `train.accumulation` is auto: one part, if need be without the projections to queries, keys and values, which
    only compiled code can compute again; else the fewest parts that fit. Late-fusion models have no estimate.
    """
    wanted, kept = settings.accumulation, usually_kept(settings)
    if not isinstance(model, FuseLIPModel):
        return 1 if wanted == "auto" else wanted, kept
    free = free_memory(model.device)

    def needed(parts: int, kept: Kept = kept) -> float:
        return step_memory(model.config, settings, pairs, parts, model.device.type, kept=kept).total

    if wanted != "auto":
        if needed(wanted) > free:
            logger.warning(
                "a step of %d pairs in %d parts needs about %.1f GB and %.1f GB are free; set train.accumulation=auto",
                *(pairs, wanted, needed(wanted) / GIGABYTE, free / GIGABYTE),
            )
        return wanted, kept
    fits = [parts for parts in range(1, pairs // 2 + 1) if pairs % parts == 0 and needed(parts) <= MOST_OF_FREE * free]
    fewest, how = fits[0] if fits else pairs // 2, ""
    if fewest > 1 and kept == "products" and needed(1, "but projections") <= MOST_OF_FREE * free:
        fewest, kept = 1, "but projections"
        how = "queries, keys and values twice, a twelfth more work"
    elif fewest > 1:
        how = f"it in {fewest} parts, a third more work"
    if how:
        logger.warning(
            "a step of %d pairs needs about %.1f GB and %.1f GB are free: train.accumulation=auto computes %s",
            *(pairs, needed(1, usually_kept(settings)) / GIGABYTE, free / GIGABYTE, how),
        )
    return fewest, kept


def free_memory(device: torch.device) -> float:
    """Bytes that a process may still take of the GPU, or of the machine."""
    return float(torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available)
