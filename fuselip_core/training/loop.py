"""The training loop: a short list of verbs over stored tokens.

Restart order: model and optimiser, then the sampler's place in its epoch, then the random states last, because
building everything else draws from them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fuselip_core.config import TrainSettings
from fuselip_core.data.mixture import Mixture
from fuselip_core.data.token_store import TokenStore, gather
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.progress import track
from fuselip_core.training.batch import encode_sides
from fuselip_core.training.checkpoint import Checkpoints, random_state, seed_everything, set_random_state
from fuselip_core.training.losses import equal_targets, sigmoid_contrastive
from fuselip_core.training.optimizer import build_adamw, learning_rate_at, set_learning_rate

logger = logging.getLogger("fuselip")
LOG_EVERY = 10
MAX_LOGIT_SCALE = math.log(100.0)

Log = Callable[[int, dict[str, float]], None]
Validate = Callable[[FuseLIPModel], dict[str, float]]


class StopSignal:
    """Notes SIGTERM, so that the loop can end between two steps instead of inside one."""

    def __init__(self) -> None:
        self.received = False
        self._before: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = True


@dataclass
class TrainingSummary:
    """What a finished training has to say for itself; the time counts every session of a resumed run."""

    steps: int
    pairs: int
    seconds: float

    def metrics(self) -> dict[str, float]:
        """Names as in metrics.json."""
        return {
            "train/steps": float(self.steps),
            "train/seconds": self.seconds,
            "train/pairs_per_second": self.pairs / max(self.seconds, 1e-9),
        }


def run_folder(checkpoints: Path, settings: TrainSettings, store: TokenStore) -> Path:
    """Folder of this run's checkpoints: named by what must be equal for a run to go on, so others start anew."""
    free = {"validate_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints"}
    identity = {"train": settings.model_dump(mode="json", exclude=free), "tokens": store.manifest}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()
    return checkpoints / digest[:12]


class Trainer:
    """Trains `model` on the pairs of `store`."""

    def __init__(
        self,
        model: FuseLIPModel,
        store: TokenStore,
        settings: TrainSettings,
        checkpoints: Checkpoints,
        log: Log,
        validate: Validate | None = None,
    ) -> None:
        self.model, self.store, self.settings = model, store, settings
        self.checkpoints, self.log, self.validate = checkpoints, log, validate
        self.device = next(model.parameters()).device
        self.mixture = Mixture(store, settings.mixture, settings.batch_size, settings.seed)
        self.optimizer = build_adamw([model], settings.learning_rate, settings.weight_decay, settings.betas)
        self.mask_probability = settings.mask_probability if settings.mask_weight else 0.0
        self.step, self.pairs, self.seconds = 0, 0, 0.0

    def run(self) -> TrainingSummary:
        """All steps that are still to do; raises Interrupted after saving when SIGTERM arrives."""
        with StopSignal() as stop:
            seed_everything(self.settings.seed)
            self._resume()
            self.model.train()
            self._started = self._saved = time.monotonic()
            remaining = range(self.step, self.settings.steps)
            for step in track(remaining, "training", total=self.settings.steps, start=self.step):
                metrics = self._train_step(step)
                self.step = step + 1
                self._log_step(metrics)
                self._look_at_validation()
                if self._checkpoint_is_due() or stop.received:
                    self._save()
                if stop.received and self.step < self.settings.steps:
                    raise Interrupted(f"stopped at step {self.step} and saved; the same command goes on from there")
        return TrainingSummary(self.step, self.pairs, self._seconds())

    def _train_step(self, step: int) -> dict[str, Tensor | float]:
        settings = self.settings
        rate = learning_rate_at(step, settings.steps, settings.learning_rate, settings.warmup_share)
        set_learning_rate(self.optimizer, rate)
        rows = next(self.mixture)
        contrastive, masked = self._losses(rows, step)
        loss = contrastive + settings.mask_weight * masked
        self._check_finite(loss, "loss", step, rows)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self._check_finite(norm, "gradient norm", step, rows)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        self.pairs += len(rows)
        return {
            "loss": loss.detach(),
            "contrastive": contrastive.detach(),
            "masked": masked.detach(),
            "grad_norm": norm.detach(),
            "lr": rate,
        }

    def _losses(self, rows: np.ndarray, step: int) -> tuple[Tensor, Tensor]:
        """Contrastive and masked-token loss of the pairs `rows`."""
        view_rng = np.random.default_rng([self.settings.seed, step])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self._uses_bfloat16()):
            sides = [gather(self.store, rows, side, view_rng) for side in ("query", "target")]
            (query, target), masked = encode_sides(self.model, sides, self.mask_probability, self.device)
        targets = (self.store.pairs.target_text[rows], self.store.pairs.target_image[rows])
        ignored = equal_targets(*(torch.from_numpy(np.asarray(t, dtype=np.int64)).to(self.device) for t in targets))
        contrastive = sigmoid_contrastive(
            query.float(),
            target.float(),
            self.model.logit_scale.exp(),
            self.model.logit_bias,
            ignored,
        )
        return contrastive, masked

    def _uses_bfloat16(self) -> bool:
        precision = self.settings.precision
        return precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")

    def _check_finite(self, value: Tensor, name: str, step: int, rows: np.ndarray) -> None:
        """A step on a non-finite value would ruin every weight, so the run ends before it."""
        if torch.isfinite(value):
            return
        shown = ", ".join(map(str, rows[:8].tolist()))
        raise FuselipError(
            f"the {name} is {value.item()} at step {step} (pairs {shown}, ... of the token store); "
            "lower train.learning_rate or look at these pairs"
        )

    def _log_step(self, metrics: dict[str, Tensor | float]) -> None:
        if self.step % LOG_EVERY and self.step != self.settings.steps and self.step != 1:
            return
        values = {name: float(value) for name, value in metrics.items()}
        values["pairs_per_second"] = self.pairs / max(self._seconds(), 1e-9)
        values["logit_scale"] = self.model.logit_scale.exp().item()
        self.log(self.step, values)

    def _look_at_validation(self) -> None:
        if self.validate is None or (self.step % self.settings.validate_every and self.step != self.settings.steps):
            return
        self.log(self.step, {f"valid/{name}": value for name, value in self.validate(self.model).items()})

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _checkpoint_is_due(self) -> bool:
        if self.step == self.settings.steps:
            return False  # the stage saves the finished model itself
        late = time.monotonic() - self._saved > 60.0 * self.settings.checkpoint_minutes
        return late or self.step % self.settings.checkpoint_every == 0

    def _save(self) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "mixture": self.mixture.state_dict(),
            "random": random_state(),
            "pairs": self.pairs,
            "seconds": self._seconds(),
        }
        self.checkpoints.save(self.step, state)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        if found is None:
            return
        self.step, state = found
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mixture.load_state_dict(state["mixture"])
        self.pairs, self.seconds = state["pairs"], state["seconds"]
        set_random_state(state["random"])
        logger.info("training: going on from step %d", self.step)
