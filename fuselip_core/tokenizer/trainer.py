"""Trains the image tokenizer from scratch, or fine-tunes a published one to radiology.

A codebook collapses when codes and latents move at once from a random start. So the tokenizer starts from patches
where it can (patch_start.py), k-means places the codes where the latents are, and codes that fall out of use are moved
onto current latents (as in Jukebox, arXiv 2005.00341, section 3.1).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.functional import normalize

from fuselip_core.config import CodebookSettings
from fuselip_core.data.shards.in_order import PixelCache
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.model.hub import load_pretrained
from fuselip_core.model.late_fusion import LateFusionModel
from fuselip_core.model.processing import CLIP_MEAN, CLIP_STD, as_pixels
from fuselip_core.model.titok import TiTok, TiTokOutput
from fuselip_core.progress import track
from fuselip_core.tokenizer.patch_start import can_start_from_patches, start_from_patches
from fuselip_core.training.ahead import Ahead
from fuselip_core.training.checkpoint import (
    Checkpoints,
    StopSignal,
    folder_of_run,
    random_state,
    seed_everything,
    set_random_state,
)
from fuselip_core.training.late_look import LateLook
from fuselip_core.training.optimizer import build_adamw, clip_in_step, learning_rate_at, set_learning_rate

logger = logging.getLogger("fuselip")
KMEANS_LATENTS = 40_000
START_IMAGES = 512
CHECKPOINT_SECONDS = 300.0


class Log(Protocol):
    """Receives the metrics of a step."""

    def __call__(self, values: Mapping[str, float], step: int) -> None: ...


class Perception(Protocol):
    """Features of pixels (B, 3, S, S) whose distance says how different two images look."""

    def __call__(self, pixels: Tensor) -> Tensor: ...


def codebook_run_folder(checkpoints: Path, settings: CodebookSettings, tokenizer: TiTok, data_version: str) -> Path:
    """Folder of the checkpoints of this very run: one of other settings, sizes or data does not go on from them."""
    identity = {
        "codebook": settings.model_dump(mode="json"),
        "tokenizer": dataclasses.asdict(tokenizer.config),
        "data_version": data_version,
    }
    return folder_of_run(checkpoints, identity)


def reconstruction_loss(predicted: Tensor, pixels: Tensor, gradient_weight: float) -> Tensor:
    """Mean squared error plus `gradient_weight` times the mean absolute error of neighbouring pixels' differences."""
    loss = F.mse_loss(predicted, pixels)
    if gradient_weight:
        rows = F.l1_loss(predicted.diff(dim=-2), pixels.diff(dim=-2))
        columns = F.l1_loss(predicted.diff(dim=-1), pixels.diff(dim=-1))
        loss = loss + gradient_weight * 0.5 * (rows + columns)
    return loss


class CodebookTrainer:
    """Trains `tokenizer` on `images`; resumes from `checkpoints` after a kill."""

    def __init__(
        self,
        tokenizer: TiTok,
        images: PixelCache,
        settings: CodebookSettings,
        checkpoints: Checkpoints,
        log: Log,
        perception: Perception | None = None,
    ) -> None:
        if settings.perceptual_weight and perception is None:
            raise FuselipError(
                "codebook.perceptual_weight is above 0, but no model of perception was given; set it to 0"
            )
        self.tokenizer, self.images, self.settings = tokenizer, images, settings
        self.checkpoints, self.log, self.perception = checkpoints, log, perception
        self.device = next(tokenizer.parameters()).device
        self.optimizer = build_adamw([tokenizer], settings.learning_rate, settings.weight_decay, (0.9, 0.95))
        self.late_look = LateLook(self.device)
        self.optimizer.found_inf = self.late_look.broken  # type: ignore[attr-defined]  # read by torch's fused step
        self.ahead = Ahead(self._batch, settings.steps, self.device)
        self.used = torch.zeros(tokenizer.config.codebook_size, dtype=torch.bool, device=self.device)
        self.step = 0

    def run(self) -> None:
        """All steps that are still to do."""
        steps = self.settings.steps
        with StopSignal() as stop, self.ahead:
            seed_everything(self.settings.seed)
            self._resume()
            last_save = time.monotonic()
            self.tokenizer.train()
            if self.step == 0 and steps and not self.settings.init:
                self._begin()
            for step in track(range(self.step, steps), "training the image tokenizer", total=steps, start=self.step):
                metrics = self._train_step(step)
                self.step = step + 1
                if self.step % 20 == 0 or self.step == steps:
                    self.log({name: float(value) for name, value in metrics.items()}, self.step)
                stopped = stop.received and self.step < steps
                saves = stopped or time.monotonic() - last_save > CHECKPOINT_SECONDS
                self._look_back(all_steps=saves or self.step == steps)
                if saves:
                    self.checkpoints.save(self.step, self._state())
                    last_save = time.monotonic()
                if stopped:
                    raise Interrupted(f"stopped at step {self.step} and saved; the same command resumes it")
        self.tokenizer.reconstructs |= self.step > 0

    def _begin(self) -> None:
        """Gives a tokenizer that is trained from scratch a start from patches where it can have one, and its codes."""
        if can_start_from_patches(self.tokenizer):
            rows = np.linspace(0, len(self.images) - 1, min(START_IMAGES, len(self.images))).astype(int)
            start_from_patches(self.tokenizer, as_pixels(self.images.rows(rows), self.device))
        self._place_codes()

    def _train_step(self, step: int) -> dict[str, Tensor | float]:
        settings = self.settings
        rate = learning_rate_at(step, settings.steps, settings.learning_rate, settings.warmup_share)
        set_learning_rate(self.optimizer, rate)
        rows, batch = self.ahead.take(step)
        pixels = as_pixels(batch, self.device)
        # On a GPU in bfloat16, but for the choice of codes and the losses.
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            output = self.tokenizer(pixels)
            loss = self._loss(output, pixels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_in_step(self.optimizer, 1.0)
        self.late_look.add(step, rows, {"loss": loss, "gradient": norm})
        self.optimizer.step()
        self._revive(step, output.codes, pixels)
        return {
            "codebook/loss": loss.detach(),
            "codebook/batch_mse": F.mse_loss(output.pixels.detach().float().clamp(0, 1), pixels),
            "codebook/commitment": output.commitment.detach(),
            "codebook/learning_rate": rate,
        }

    def _look_back(self, all_steps: bool) -> None:
        """Ends the run for a step that was not finite; from that step on no weight has changed, see LateLook."""
        for seen in self.late_look.due(all_steps):
            loss, gradient = seen.values["loss"], seen.values["gradient"]
            if not math.isfinite(loss + gradient):
                raise FuselipError(
                    f"the image tokenizer's loss is {loss} and its gradient {gradient} at step {seen.step}; "
                    "lower codebook.learning_rate"
                )

    def _batch(self, step: int) -> tuple[np.ndarray, Tensor]:
        """Rows (B) and pixels uint8 (B, S, S, 3) of the batch of `step`."""
        rows = self._batch_rows(step)
        pixels = torch.from_numpy(self.images.rows(rows))
        return rows, pixels.pin_memory() if self.device.type == "cuda" else pixels

    def _loss(self, output: TiTokOutput, pixels: Tensor) -> Tensor:
        settings = self.settings
        loss = reconstruction_loss(output.pixels, pixels, settings.gradient_weight)
        loss = loss + settings.commitment_weight * output.commitment + settings.codebook_weight * output.codebook
        if self.perception is not None and settings.perceptual_weight:
            difference = F.mse_loss(self.perception(output.pixels), self.perception(pixels))
            loss = loss + settings.perceptual_weight * difference
        return loss

    def _batch_rows(self, step: int) -> np.ndarray:
        """Rows of the batch of `step`: a function of seed and step alone, so resuming needs no sampler state."""
        size, count = min(self.settings.batch_size, len(self.images)), len(self.images)
        epoch, place = divmod(step * size, count - count % size)
        order = np.random.default_rng([self.settings.seed, epoch]).permutation(count)
        return order[place : place + size]

    @torch.no_grad()
    def _place_codes(self) -> None:
        """k-means over the latents of a sample of images gives the codebook its start."""
        from sklearn.cluster import MiniBatchKMeans

        rows = []
        for first in range(0, min(len(self.images), KMEANS_LATENTS // self.tokenizer.config.latent_tokens), 64):
            pixels = as_pixels(self.images.rows(np.arange(first, min(first + 64, len(self.images)))), self.device)
            rows.append(self.tokenizer.quantize.flatten(self.tokenizer.encode(pixels)).flatten(0, 1).cpu())
        latents = torch.cat(rows).numpy()
        clusters = min(self.tokenizer.config.codebook_size, len(latents))
        kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, random_state=self.settings.seed, max_iter=20)
        centres = kmeans.fit(latents).cluster_centers_
        self.tokenizer.quantize.embedding.weight[:clusters] = torch.from_numpy(centres).to(self.device)
        self.optimizer.state.pop(self.tokenizer.quantize.embedding.weight, None)

    @torch.no_grad()
    def _revive(self, step: int, codes: Tensor, pixels: Tensor) -> None:
        """Every `revive_every` steps, codes unused since the last time move onto latents of the current batch."""
        self.used[codes.flatten()] = True
        every = self.settings.revive_every
        # The last tenth is left in peace, so that what is saved has settled.
        if not every or (step + 1) % every or step > 0.9 * self.settings.steps:
            return
        unused = torch.nonzero(~self.used).flatten()
        rows = self.tokenizer.quantize.flatten(self.tokenizer.encode(pixels)).flatten(0, 1)
        chosen = rows[torch.randperm(len(rows), device=rows.device)[: len(unused)]]
        self.tokenizer.quantize.embedding.weight[unused[: len(chosen)]] = chosen
        self.used.zero_()

    def _state(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "used": self.used,
            "random": random_state(),
        }

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            return
        self.step, state = found
        self.tokenizer.load_state_dict(state["tokenizer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.used.copy_(state["used"])
        set_random_state(state["random"])
        logger.info("image tokenizer: resuming from step %d", self.step)


def open_perception(settings: CodebookSettings, device: torch.device) -> Perception | None:
    """Features of pixels (B, 3, S, S) in 0..1 by the model that `perceptual_model` names; None without the term.

    Raises FuselipError where that is no late-fusion baseline.
    """
    if not settings.perceptual_weight or settings.perceptual_model is None:
        return None
    model, _ = load_pretrained(settings.perceptual_model, device)
    if not isinstance(model, LateFusionModel):
        raise FuselipError(
            f"codebook.perceptual_model {settings.perceptual_model} is no SigLIP baseline; name one, or set "
            "codebook.perceptual_weight=0"
        )
    model.requires_grad_(False)
    size = model.config.image_size

    def features(pixels: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        return model.encode_image(normalize(resized, list(CLIP_MEAN), list(CLIP_STD)))

    return features
