"""The train stage: stored tokens become a trained encoder."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fuselip_core.config import Settings
from fuselip_core.data.shards.reader import validation_split
from fuselip_core.data.tokens.store import TokenStore, read_manifest
from fuselip_core.distributed import join_world, local_device
from fuselip_core.encoding.from_codes import StoredEncoder
from fuselip_core.encoding.open import open_measuring, open_training
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.model.fetch import STARTED_FROM
from fuselip_core.model.fuselip import FuseLIPModel
from fuselip_core.model.hub import Model, save_model
from fuselip_core.model.titok import TiTok, codebook_id
from fuselip_core.tracking.run import open_run
from fuselip_core.training.build import build_model, interpolate, trained_weights
from fuselip_core.training.checkpoint import Checkpoints, History, seed_everything
from fuselip_core.training.loop import Trainer, Validate, run_folder
from fuselip_core.training.processes import processes_to_start, train_in_processes

VALIDATION_PAIRS = 512

# What the loop calls a number → the name of its curve.
CURVES = {
    "loss": "loss",
    "contrastive": "loss_contrastive",
    "masked": "loss_masked",
    "lr": "learning_rate",
    "grad_norm": "gradient_norm",
    "pairs_per_second": "pairs_per_second",
}

QuickLook = Callable[[StoredEncoder, TokenStore, int], dict[str, float]]  # encoder, store, pairs → metrics


def train_encoder(settings: Settings, quick_look: QuickLook) -> dict[str, float]:
    """Trains on tokens/ and writes model/ and history.jsonl; resumes from checkpoints/ after an interruption.

    `quick_look` measures the model on the validation split while it trains. Returns the metrics of the training.
    """
    artifacts = settings.artifacts
    _refuse_other_codebook(artifacts)
    _refuse_own_output(settings)
    if (processes := processes_to_start(settings)) > 1:
        return train_in_processes(settings, processes)
    tokenizer = TiTok.load(artifacts / "codebook")
    world, device = join_world(), local_device()
    seed_everything(settings.train.seed)
    model = build_model(settings.model, settings.train, tokenizer)
    before = trained_weights(model) if settings.train.interpolate < 1 else None
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that hides its arguments
    store, encoder = open_training(model, artifacts, settings.train, device, world)
    folder = run_folder(artifacts / "checkpoints", settings.train, store)
    checkpoints = Checkpoints(folder, settings.train.keep_checkpoints)
    if not world.leads:
        return Trainer(encoder, store, settings.train, checkpoints, world=world).run().metrics()
    history = History(folder / "history.jsonl", checkpoints)
    with open_run(settings, "train", resume=history.resumed_step > 0) as run:

        def log(metrics: Mapping[str, float], step: int) -> None:
            history.add(step, metrics)
            if shown := curves(metrics):
                run.metrics(shown, step)

        validate = _validation(artifacts, model, device, quick_look)
        done = Trainer(encoder, store, settings.train, checkpoints, log, validate, world).run()
        if before:
            interpolate(model, before, settings.train.interpolate)
        summary = done.metrics() | {"model/parameters": float(sum(p.numel() for p in model.parameters()))}
        _save(settings, model, tokenizer, summary)
        history.publish(artifacts / "history.jsonl")
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: an interrupted run with other settings can still go on
        folder.parent.rmdir()
    shutil.rmtree(artifacts / "work" / "pixels", ignore_errors=True)
    return summary


def curves(metrics: Mapping[str, float]) -> dict[str, float]:
    """The few that a tracking service shows, in one section train/; history.jsonl has all."""
    found = {f"train/{shown}": metrics[name] for name, shown in CURVES.items() if name in metrics}
    looks = {name for name in metrics if name.startswith("valid/")}
    found |= {f"train/{name.replace('/', '_')}": metrics[name] for name in looks}
    return found | {name: value for name, value in metrics.items() if name.startswith("system/")}


def _validation(artifacts: Path, model: Model, device: torch.device, quick_look: QuickLook) -> Validate:
    split = validation_split(read_manifest(artifacts / "tokens")["splits"])
    store, encoder = open_measuring(model, artifacts, split, device)
    return lambda: quick_look(encoder, store, VALIDATION_PAIRS)


def _save(settings: Settings, model: Model, tokenizer: TiTok, summary: dict[str, float]) -> None:
    """model/ with its image tokenizer, the metrics of its training, and the checkpoint that it started from.

    The model of an earlier training stays until this one is complete.
    """
    if isinstance(model, FuseLIPModel):
        model.attach_image_tokenizer(tokenizer)
    with atomic_folder(settings.artifacts / "model") as folder:
        save_model(model, folder)
        write_json(folder / "training.json", summary)
        if settings.train.init is not None:
            write_json(folder / STARTED_FROM, {"init": settings.train.init, "interpolate": settings.train.interpolate})


def _refuse_other_codebook(artifacts: Path) -> None:
    """Codes of another tokenizer mean other things: a model trained on them could not read images."""
    tokens, codebook = artifacts / "tokens", artifacts / "codebook"
    if read_manifest(tokens).get("codebook") != codebook_id(codebook):
        raise FuselipError(f"{tokens} was made with another tokenizer than {codebook}; run the tokenize stage again")


def _refuse_own_output(settings: Settings) -> None:
    """A checkpoint that this run would overwrite is gone when before and after are compared."""
    if settings.train.init and Path(settings.train.init).resolve() == (settings.artifacts / "model").resolve():
        raise FuselipError(
            f"train.init {settings.train.init} is where this run saves its own model; copy that folder elsewhere first"
        )
