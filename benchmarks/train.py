"""Measures a training step: as published, as this project does it, and the least that its matrix products can take.

    python benchmarks/train.py [--size small] [--batch 32] [--rounds 7] [--steps 4] [--threads 2] [--out FILE]
                               [--also compiled recomputed]

published   decode a JPEG, crop at random, run the frozen image tokenizer, encode the caption, pad it to the longest of
            the batch, and step; a plain reference on this project's own model, without its padding-free path
ours        the project's Trainer, whole, on a token store
floor       every matrix product of one of our steps, at its own shape, forward and backward, and nothing else; what
            attention multiplies is counted at the same rate
compiled    ours with train.compile
replayed    ours with train.compile and train.cuda_graphs
recomputed  ours with train.gradient_checkpointing; these three where --also names them

All see captions of the same lengths, take turns (measure.py), and count medians. `fraction_of_floor` is the
floor's time over ours: 1 would be a step without anything but matrix products. `fraction_of_peak` counts the same
work at the machine's best rate, that of large square products. On a GPU the precision is bfloat16 and `mfu` is the
work of a step over its time and the GPU's own published rate, where that is known. Memory: each variant in a process
of its own. The last line is one JSON object. --profile shows instead what two of our steps spend their time on.
"""

from __future__ import annotations

import sys

sys.path.append(sys.path.pop(0))  # behind Python's own modules, one of which is called tokenize

import argparse
import copy
import functools
import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import (
    finish,
    in_own_process,
    in_rounds,
    machine,
    medians,
    parser_of,
    peak_memory_mb,
    spread,
    table,
    timed,
    wait_for_gpu,
)
from PIL import Image
from torch import Tensor, nn
from workload import captions, pictures, write_caption_store

from fuselip_core.config import TrainSettings
from fuselip_core.data.tokens.store import TokenStore, gather
from fuselip_core.encoding.from_codes import TokenPairs, mask_tokens, pack_sides
from fuselip_core.images import random_crop
from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.processing import TextTokenizer, as_pixels
from fuselip_core.model.titok import TiTok
from fuselip_core.model.vocabulary import PAD, join
from fuselip_core.training.checkpoint import Checkpoints
from fuselip_core.training.loop import Trainer
from fuselip_core.training.losses import sigmoid_contrastive
from fuselip_core.training.mixture import Mixture
from fuselip_core.training.optimizer import build_adamw

BATCHES = {"tiny": 64, "small": 32, "base": 16, "large": 8}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "compiled": {"compile": True},
    "replayed": {"compile": True, "cuda_graphs": True},
    "recomputed": {"gradient_checkpointing": True},
}
CROP_SCALE = (0.8, 1.0)
PAIRS, PICTURES = 2048, 256
SQUARE = {"cpu": 2048, "cuda": 8192}
# Dense bfloat16 rates from the data sheets, products and sums a second.
PUBLISHED_RATES = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12}


class Bench:
    """One model, its data, and its three variants."""

    def __init__(self, size: str, batch: int, folder: Path) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.precision = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        codebook = tokenizer_config(size)
        self.tokenizer = TiTok(codebook).to(self.device).eval().requires_grad_(False)
        self.model = FuseLIPModel(FuseLIPConfig.of_size(size, codebook)).to(self.device)
        self.models = {"ours": self.model}
        self.settings = TrainSettings(batch_size=batch, mask_probability=0.1, mask_weight=0.25, learning_rate=1e-5)
        self.texts = captions(PAIRS)
        encode = TextTokenizer(context_length=77).encode
        self.folder = folder
        write_caption_store(
            folder / "tokens", [encode(text) for text in self.texts], codebook.latent_tokens, codebook.codebook_size
        )
        self.store = TokenStore(folder / "tokens", "train")

    def mixture(self) -> Mixture:
        """The order of pairs that every variant follows."""
        return Mixture(self.store, self.settings.mixture, self.settings.batch_size, self.settings.seed)

    # ---- ours ----------------------------------------------------------------------------------------------------

    def ours(self, steps: int, variant: str = "ours") -> float:
        """Seconds of `steps` steps of the project's own loop, behind one that warms it up."""
        fixed: dict[str, Any] = {
            "steps": steps + 1,
            "checkpoint_every": 10**9,
            "checkpoint_minutes": 1e9,
            "preflight": False,
            "accumulation": 1,
        }
        settings = self.settings.model_copy(update=fixed | OURS[variant])
        at: dict[int, float] = {}

        def log(metrics: dict[str, float], step: int) -> None:
            wait_for_gpu()
            at.setdefault(step, time.perf_counter())

        encoder = TokenPairs(self.model_of(variant), self.store, settings.mask_probability, settings.cuda_graphs)
        Trainer(encoder, self.store, settings, Checkpoints(self.folder / "checkpoints"), log).run()
        return at[steps + 1] - at[1]

    def model_of(self, variant: str) -> FuseLIPModel:
        """The model, or a copy that stays changed as the variant has it."""
        if variant not in self.models:
            self.models[variant] = copy.deepcopy(self.model)
        return self.models[variant]

    # ---- published -----------------------------------------------------------------------------------------------

    def published(self, steps: int) -> float:
        """Seconds of `steps` steps from JPEG files and strings, behind one that warms them up."""
        settings = self.settings
        optimizer = build_adamw([self.model], settings.learning_rate, settings.weight_decay, settings.betas)
        rng = np.random.default_rng(0)
        files = pictures(PICTURES)
        self.model.train()
        start = 0.0
        for step, rows in zip(range(steps + 1), self.mixture(), strict=False):
            if step == 1:
                wait_for_gpu()
                start = time.perf_counter()
            images = [files[row % PICTURES] for row in rows]
            self._published_step(images, [self.texts[row] for row in rows], rng, optimizer)
        wait_for_gpu()
        return time.perf_counter() - start

    def _published_step(
        self, files: list[bytes], texts: list[str], rng: np.random.Generator, optimizer: torch.optim.Optimizer
    ) -> None:
        model, settings = self.model, self.settings
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            query, query_masked = self._embed_padded(self._image_ids(files, rng))
            target, target_masked = self._embed_padded(self._text_ids(texts))
        contrastive = sigmoid_contrastive(
            query.float(), target.float(), model.logit_scale.exp(), model.logit_bias, ignored=None
        )
        loss = contrastive + settings.mask_weight * 0.5 * (query_masked + target_masked)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
        optimizer.step()

    def _image_ids(self, files: list[bytes], rng: np.random.Generator) -> Tensor:
        """JPEG files → joint ids (B, K + 2): what an image alone is to the model."""
        size = self.tokenizer.config.image_size
        crops = [random_crop(Image.open(io.BytesIO(data)), size, CROP_SCALE, rng) for data in files]
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            codes = self.tokenizer.codes(as_pixels(np.stack(crops), self.device))
        return join(self.model.vocabulary.joint_ids(codes), None, self.model.config.context_length)

    def _text_ids(self, texts: list[str]) -> Tensor:
        """Strings → ids (B, L), L the longest of the batch."""
        ids = TextTokenizer(self.model.config.context_length)(texts)
        return ids[:, : int((ids != PAD).sum(dim=1).max())].to(self.device)

    def _embed_padded(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ids, labels = mask_tokens(ids, self.model.vocabulary.mask_id, self.settings.mask_probability)
        output = self.model(hidden_ids, labels=labels)
        return output.embeddings, output.loss

    # ---- floor ---------------------------------------------------------------------------------------------------

    def step_shapes(self, steps: int) -> list[Shapes]:
        """What is multiplied in each of our steps."""
        found = []
        for _, rows in zip(range(steps + 1), self.mixture(), strict=False):
            ids, layout, _ = pack_sides([gather(self.store, rows, side) for side in ("query", "target")], self.model)
            predicted = round(self.settings.mask_probability * (len(ids) - 2 * 2 * len(rows)))
            found.append(Shapes(len(ids), predicted, layout.runs, self.model.config))
        return found[1:]  # the first warms up, in every variant

    def floor(self, shapes: list[Shapes]) -> tuple[Callable[[], Any], float]:
        """All matrix products of the steps but attention's, to be run, and their operations."""
        plan = [product for step in shapes for product in step.linear()]
        operands: dict[tuple[int, ...], Tensor] = {}

        def operand(*shape: int) -> Tensor:
            if shape not in operands:
                operands[shape] = torch.randn(*shape, device=self.device, dtype=self.precision)
            return operands[shape]

        jobs = [(operand(t, a), operand(b, a), operand(t, b)) for t, a, b in plan]
        results = {tensor.shape: torch.empty_like(tensor) for job in jobs for tensor in job}

        def multiply() -> None:
            for x, weight, gradient in jobs:
                torch.mm(x, weight.T, out=results[gradient.shape])  # forward, as nn.Linear
                torch.mm(gradient, weight, out=results[x.shape])  # gradient of the input
                torch.mm(gradient.T, x, out=results[weight.shape])  # gradient of the weight

        return multiply, sum(6.0 * t * a * b for t, a, b in plan)

    def square(self) -> tuple[Callable[[], Any], float]:
        """One large square product, and its operations."""
        side = SQUARE[self.device.type]
        left, right = (torch.randn(side, side, device=self.device, dtype=self.precision) for _ in range(2))
        return lambda: left @ right, 2.0 * side**3


class Shapes:
    """The matrix products of one step: T packed tokens, M predicted ones, runs of (sequences, their length)."""

    def __init__(self, tokens: int, predicted: int, runs: tuple[tuple[int, int], ...], config: FuseLIPConfig) -> None:
        self.tokens, self.predicted, self.runs, self.config = tokens, predicted, runs, config

    def linear(self) -> Iterator[tuple[int, int, int]]:
        """(rows, inputs, outputs) of every linear layer; each is three products of this size."""
        width = self.config.width
        hidden = int(width * self.config.mlp_ratio)
        read = self.predicted + sum(count for count, _ in self.runs)  # of the last block's output, see Transformer
        for left in reversed(range(self.config.layers)):
            rows = self.tokens if left else read
            yield self.tokens, width, 3 * width
            yield rows, width, width
            yield rows, width, hidden
            yield rows, hidden, width
        yield self.predicted, width, width
        yield self.predicted, width, self.config.vocab_size

    def attention(self) -> float:
        """Operations of attention: two products forward, four backward."""
        squares = sum(count * length**2 for count, length in self.runs)
        return 6.0 * 2.0 * squares * self.config.width * self.config.layers


def measure(size: str, batch: int, rounds: int, steps: int, also: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(size, batch, Path(name))
        shapes = bench.step_shapes(steps)
        multiply, linear = bench.floor(shapes)
        square, square_operations = bench.square()
        square()
        seconds = in_rounds(
            {
                "published": lambda: bench.published(steps),
                "ours": lambda: bench.ours(steps),
                "floor": timed(multiply),
                "square": timed(square),
                **{name: functools.partial(bench.ours, steps, name) for name in also},
            },
            rounds,
        )
    middle = medians(seconds)
    work = linear + sum(step.attention() for step in shapes)
    return figures(middle, work, linear, square_operations, batch * steps) | {
        "spread": {name: round(spread(values), 2) for name, values in seconds.items()},
        "tokens_per_pair": round(sum(step.tokens for step in shapes) / (batch * steps), 1),
        "parameters": sum(p.numel() for p in bench.model.parameters()),
        "peak_memory_mb": {variant: _memory_of(variant, size, batch) for variant in ("published", "ours", *also)},
        "ratio_to_ours": {name: round(middle["ours"] / middle[name], 3) for name in also},
    }


def figures(middle: dict[str, float], work: float, linear: float, square: float, pairs: int) -> dict[str, Any]:
    """Ratios and rates from the median seconds of all variants."""
    floor = middle["floor"] * work / linear
    peak_rate = square / middle["square"]
    result: dict[str, Any] = {
        "pairs_per_second": {
            "published": round(pairs / middle["published"], 3),
            "floor": round(pairs / floor, 3),
            **{name: round(pairs / middle[name], 3) for name in OURS if name in middle},
        },
        "ratio_to_published": round(middle["published"] / middle["ours"], 3),
        "fraction_of_floor": round(floor / middle["ours"], 3),
        "fraction_of_peak": round(work / peak_rate / middle["ours"], 3),
        "gflop_per_pair": round(work / pairs / 1e9, 2),
        "matmul_gflops": {"own_shapes": round(linear / middle["floor"] / 1e9, 1), "square": round(peak_rate / 1e9, 1)},
    }
    rate = published_rate()
    return result | ({"mfu": round(work / middle["ours"] / rate, 3)} if rate else {})


def published_rate() -> float | None:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((rate for part, rate in PUBLISHED_RATES.items() if part in name), None)


def _memory_of(variant: str, size: str, batch: int) -> float:
    options = ["--child", variant, "--size", size, "--batch", str(batch), "--threads", str(torch.get_num_threads())]
    return float(in_own_process(__file__, *options)["peak_memory_mb"])


def memory(variant: str, size: str, batch: int) -> dict[str, Any]:
    """Peak memory of three steps of one variant, in this process; on a GPU that of the GPU."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(size, batch, Path(name))
        if variant == "published":
            bench.published(2)
        else:
            del bench.tokenizer
            bench.models = {variant: bench.model}
            bench.ours(2, variant)
    if torch.cuda.is_available():
        return {"peak_memory_mb": round(torch.cuda.max_memory_allocated() / 1e6, 1)}
    return {"peak_memory_mb": peak_memory_mb()}


def profile(size: str, batch: int) -> str:
    """Operations of two of our steps by the time spent in each of them, behind steps that warm up."""
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(size, batch, Path(name))
        bench.ours(1)
        with torch.profiler.profile() as profiled:
            bench.ours(1)
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return str(profiled.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


def arguments() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--size", choices=BATCHES, default="small")
    parser.add_argument("--batch", type=int, help="Pairs a step; 32 for small, 16 for base.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="Steps of each variant in a round.")
    parser.add_argument("--threads", type=int, help="Threads of torch; all cores if not given.")
    parser.add_argument("--profile", action="store_true", help="Show where the time of our step goes.")
    parser.add_argument(
        "--also", nargs="+", choices=[name for name in OURS if name != "ours"], default=[], help="Further variants."
    )
    parser.add_argument("--child", choices=("published", *OURS), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = arguments()
    logging.getLogger("fuselip").setLevel(logging.WARNING)
    if given.threads:
        torch.set_num_threads(given.threads)
    batch = given.batch or BATCHES[given.size]
    if given.child:
        finish(memory(given.child, given.size, batch))
        return
    if given.profile:
        print(profile(given.size, batch))
        return
    result = {
        "size": given.size,
        "batch": batch,
        **machine(),
        **measure(given.size, batch, given.rounds, given.steps, given.also),
    }
    rows = [[name, rate, result["peak_memory_mb"].get(name, "-")] for name, rate in result["pairs_per_second"].items()]
    print(table(["variant", "pairs/s", "peak memory, MB"], rows))
    ratio, fraction = result["ratio_to_published"], 100 * result["fraction_of_floor"]
    print(f"\nours: {ratio:.2f} x published, {fraction:.0f} % of the floor")
    finish(result, given.out)


if __name__ == "__main__":
    main()
