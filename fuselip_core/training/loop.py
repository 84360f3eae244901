"""The training loop: a short list of verbs over stored tokens.

Restart order: model and optimiser, then the sampler's place in its epoch, then the random states last, because
building everything else draws from them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fuselip_core.config import TrainSettings
from fuselip_core.data.tokens.joined import Store
from fuselip_core.distributed import World
from fuselip_core.encoding.from_codes import PairEncoder
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.model.compiled import graphs_compiled
from fuselip_core.progress import track
from fuselip_core.training.ahead import Ahead
from fuselip_core.training.batches import Batch, Batches
from fuselip_core.training.build import keep
from fuselip_core.training.checkpoint import (
    Checkpoints,
    StopSignal,
    folder_of_run,
    random_state,
    seed_everything,
    set_random_state,
)
from fuselip_core.training.ema import AveragedWeights
from fuselip_core.training.gradients import Losses, backward
from fuselip_core.training.late_look import LateLook, Seen
from fuselip_core.training.losses import Contrast
from fuselip_core.training.memory import fit_memory
from fuselip_core.training.optimizer import build_optimizer, clip_in_step, set_learning_rate
from fuselip_core.training.plan import plan_schedule, refuse_empty_parts, sample_ids
from fuselip_core.training.preflight import look_before_the_first_step
from fuselip_core.training.system_metrics import machine_metrics

logger = logging.getLogger("fuselip")
LOG_EVERY = 10
SHOWN_PAIRS = 8
MAX_LOGIT_SCALE = math.log(100.0)
# What changes time and memory but not what is computed, so that a run may go on with another choice.
SAME_VALUES = ("contrast_rows", "gradient_checkpointing", "compile", "cuda_graphs", "processes")
OF_EACH_PROCESS = ("loss", "contrastive")  # averaged for the log; masked losses are parts of one sum

Log = Callable[[Mapping[str, float], int], None]  # metrics, step
Validate = Callable[[], dict[str, float]]


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


def _quietly(metrics: Mapping[str, float], step: int) -> None:
    """The log of processes beside the first, which speaks for all."""


def run_folder(checkpoints: Path, settings: TrainSettings, store: Store) -> Path:
    """Folder of this run's checkpoints; how often it looks and saves may change while it goes on."""
    free = {"validate_every", "checkpoint_every", "checkpoint_minutes", "keep_checkpoints", *SAME_VALUES}
    return folder_of_run(
        checkpoints, {"train": settings.model_dump(mode="json", exclude=free), "tokens": store.manifest}
    )


class Trainer:
    """Trains the encoder's model on the pairs of `store`, as one of the processes of `world`."""

    def __init__(
        self,
        encoder: PairEncoder,
        store: Store,
        settings: TrainSettings,
        checkpoints: Checkpoints,
        log: Log = _quietly,
        validate: Validate | None = None,
        world: World = World(),  # noqa: B008 - frozen
    ) -> None:
        refuse_empty_parts(settings, world.size)
        self.encoder, self.model, self.store = encoder, encoder.model, store
        self.checkpoints, self.world = checkpoints, world
        self.log, self.validate = (log, validate) if world.leads else (_quietly, None)
        self.device = next(self.model.parameters()).device
        self.settings = settings
        parts, kept = fit_memory(self.model, settings, settings.batch_size // world.size)
        keep(self.model, kept)
        once = settings.equal_targets == "once"
        apart = settings.all_combinations, settings.targets_apart
        self._contrast = Contrast(settings.contrast_rows, once, *apart, world)
        self._contrast_compiled: Callable[..., Tensor] = self._contrast
        if settings.compile:
            if world.alone:
                self._contrast_compiled = torch.compile(self._contrast.__call__, dynamic=False)
            # A replayed graph overwrites what it returned before, which the first pass over parts still needs.
            encoder.compile(settings.batch_size // world.size // parts, settings.cuda_graphs and parts == 1)
        self.schedule = plan_schedule(store, settings)
        self.batches = Batches(encoder, store, settings, world, parts)
        self.ahead = Ahead(self.batches.next, self.schedule.steps, self.device)
        self.late_look = LateLook(self.device)
        self.optimizer = build_optimizer(self.model, settings)
        self.optimizer.found_inf = self.late_look.broken  # type: ignore[union-attr]  # read by torch's fused step
        self.average = AveragedWeights(self.model, settings.ema) if settings.ema else None
        self.step, self.pairs, self.seconds = 0, 0, 0.0
        self._order_behind: Mapping[str, Any] = {}  # state of the order of pairs behind the last step

    def run(self) -> TrainingSummary:
        """All steps that are still to do; raises Interrupted after saving when SIGTERM arrives."""
        with StopSignal() as stop, self.ahead, self._memory_named():
            seed_everything(self.settings.seed + self.world.rank)
            self.world.broadcast(self.model)
            self._resume()
            self.model.train()
            self._started = self._saved = time.monotonic()
            if self.step == 0 and self.settings.preflight:
                self.log(look_before_the_first_step(self), 0)
            remaining = range(self.step, self.schedule.steps)
            for step in track(remaining, "training", total=self.schedule.steps, start=self.step):
                self._train_step(step)
                self.step = step + 1
                self._look_back(all_steps=self.step == self.schedule.steps)
                self._look_at_validation()
                stopped, due = self.world.any([stop.received, self._checkpoint_is_due()])
                if due or stopped:
                    self._save()
                if stopped and self.step < self.schedule.steps:
                    raise Interrupted(f"stopped at step {self.step} and saved; the same command resumes it")
        if self.average:
            self.average.keep()
        return TrainingSummary(self.step, self.pairs, self._seconds())

    def compute_gradients(self, batch: Batch) -> Losses:
        """Gradients of the whole step, of which `batch` is this process's part, into the model's parameters."""
        settings, model = self.settings, self.model
        keys = batch.keys.to(self.device, non_blocking=True)
        loss_of = self._contrast_compiled if len(batch.rows) == settings.batch_size else self._contrast

        def contrast(query: Tensor, target: Tensor) -> Tensor:
            return loss_of(query, target, keys, model.logit_scale, model.logit_bias)

        losses = backward(self.encoder, batch.parts, contrast, settings.mask_weight, self.world, self._uses_bfloat16())
        self.world.average_gradients(self.model.parameters())
        return losses

    @contextlib.contextmanager
    def _memory_named(self) -> Iterator[None]:
        """Turns a GPU's memory running out into a sentence with the settings that decide how much a step needs."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
            parts = self.batches.parts
            raise FuselipError(
                f"the GPU's memory does not hold a step of train.batch_size {self.settings.batch_size} in {parts} "
                f"part{'s' * (parts > 1)} (train.accumulation; {peak / 2**30:.1f} GB were in use): set "
                f"train.accumulation={2 * parts}, or train.gradient_checkpointing=true"
            ) from error

    def _train_step(self, step: int) -> dict[str, Tensor]:
        """One step, in which nothing waits for a GPU → what it found, scalars; see LateLook for those not finite."""
        batch = self.ahead.take(step)
        set_learning_rate(self.optimizer, self.schedule.rate(step))
        self.optimizer.zero_grad(set_to_none=True)
        losses = self.compute_gradients(batch)
        norm = clip_in_step(self.optimizer, self.settings.clip_norm)
        found = {"loss": losses.total, "grad_norm": norm, "contrastive": losses.contrastive, "masked": losses.masked}
        self.late_look.add(step, batch.rows, found | {"logit_scale": self.model.logit_scale.exp()})
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)
        if self.average:
            self.average.update()
        self.pairs += len(batch.rows) * self.world.size
        self._order_behind = batch.mixture
        return found

    def _uses_bfloat16(self) -> bool:
        precision = self.settings.precision
        return precision == "bfloat16" or (precision == "auto" and self.device.type == "cuda")

    def _look_back(self, all_steps: bool = False) -> None:
        """Logs the steps that can be read without waiting; `all_steps` waits, before weights are measured or saved."""
        for seen in self.late_look.due(all_steps):
            self.check_finite(seen)
            self._log_step(seen)

    def check_finite(self, seen: Seen) -> None:
        """Ends the run for a value that is not finite; from that step on no weight has changed."""
        for name, label in (("loss", "loss"), ("grad_norm", "gradient norm")):
            if not math.isfinite(value := seen.values[name]):
                shown = ", ".join(sample_ids(self.store, seen.rows[:SHOWN_PAIRS]))
                raise FuselipError(
                    f"the {label} is {value} at step {seen.step} (pairs {shown}"
                    f"{', ...' * (len(seen.rows) > SHOWN_PAIRS)}); lower train.learning_rate or look at these pairs"
                )

    def _log_step(self, seen: Seen) -> None:
        step = seen.step + 1
        if step % LOG_EVERY and step != self.schedule.steps and step != 1:
            return
        values = dict(seen.values)
        if not self.world.alone:
            own = torch.tensor([values[name] for name in OF_EACH_PROCESS])
            values |= dict(zip(OF_EACH_PROCESS, self.world.mean(own).tolist(), strict=True))
        values["lr"] = self.schedule.rate(seen.step)
        values["pairs_per_second"] = self.pairs / max(self._seconds(), 1e-9)
        values["masked_share"] = self.settings.mask_weight * values["masked"] / max(values["loss"], 1e-9)
        if self.settings.compile:
            values["compiled_graphs"] = graphs_compiled()
        self.log(values | machine_metrics(), step)

    def _look_at_validation(self) -> None:
        if self.validate is None or (self.step % self.settings.validate_every and self.step != self.schedule.steps):
            return
        self._look_back(all_steps=True)
        with self.average.applied() if self.average else contextlib.nullcontext():
            found = self.validate()
        self.log({f"valid/{name}": value for name, value in found.items()}, self.step)

    def _seconds(self) -> float:
        return self.seconds + time.monotonic() - self._started

    def _checkpoint_is_due(self) -> bool:
        if self.step == self.schedule.steps:
            return False  # the stage saves the finished model itself
        late = time.monotonic() - self._saved > 60.0 * self.settings.checkpoint_minutes
        return late or self.step % self.settings.checkpoint_every == 0

    def _save(self) -> None:
        self._look_back(all_steps=True)
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average else {},
            "mixture": self._order_behind,
            "random": self.world.collect(random_state()),
            "processes": self.world.size,
            "parts": self.batches.parts,
            "pairs": self.pairs,
            "seconds": self._seconds(),
        }
        if self.world.leads:
            self.checkpoints.save(self.step, state)
        self._saved = time.monotonic()

    def _resume(self) -> None:
        found = self.checkpoints.latest()
        seen = self.world.collect(found[0] if found else 0)
        if len(set(seen)) > 1:  # they would train different models, or wait for each other for ever
            raise FuselipError(
                f"the processes found checkpoints of different steps ({', '.join(map(str, seen))}) in "
                f"{self.checkpoints.folder}; give all machines the same folder, whole, and start again"
            )
        if found is None:
            return
        self.step, state = found
        if state["processes"] != self.world.size:
            raise FuselipError(
                f"{self.checkpoints.folder} is a run of {state['processes']} processes and cannot go on with "
                f"{self.world.size}; start as many as before, or delete that folder to begin anew"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.batches.mixture.load_state_dict(state["mixture"])
        self.pairs, self.seconds = state["pairs"], state["seconds"]
        if self.settings.accumulation == "auto":  # as at the start, whatever is free now: other parts hide other tokens
            self.batches.parts = state["parts"]
        set_random_state(state["random"][self.world.rank])
        logger.info("training: resuming from step %d", self.step)
