"""One short function a stage: the table of contents of the project.

prepare → codebook → tokenize → train → evaluate → register. Each reads what the stage before it wrote below
`settings.artifacts`, writes its own folder there, and returns a summary of plain values.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError
from fuselip_core.files import read_numbers, write_json

if TYPE_CHECKING:
    import torch


def prepare(settings: Settings) -> dict[str, Any]:
    """Raw data set → Parquet shards and manifest in prepared/."""
    from fuselip_core.data.prepare.prepare import prepare_data

    manifest = prepare_data(settings.prepare, settings.artifacts / "prepared", settings.artifacts / "work" / "prepared")
    return {"counts": manifest["counts"], "quarantine": manifest["quarantine"]}


def codebook(settings: Settings) -> dict[str, Any]:
    """Prepared images → an image tokenizer in codebook/, with its reconstruction error and use of codes."""
    from fuselip_core.tokenizer.codebook import train_codebook

    return train_codebook(settings)


def tokenize(settings: Settings) -> dict[str, Any]:
    """Prepared images and texts → codes and ids in tokens/."""
    from fuselip_core.tokenizer.tokenize import tokenize_data

    return tokenize_data(settings)


def train(settings: Settings) -> dict[str, Any]:
    """Stored tokens → a trained encoder in model/ and its curves in history.jsonl; resumes from checkpoints/."""
    from fuselip_core.evaluation.tasks import quick_look
    from fuselip_core.training.train import train_encoder

    return train_encoder(settings, quick_look)


def evaluate(settings: Settings) -> dict[str, Any]:
    """Trained encoder → measures beside chance and controls in metrics.json, and a page to read in report/."""
    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.encoding.open import open_measuring
    from fuselip_core.evaluation.before_after import measure_adaptation
    from fuselip_core.evaluation.candidates import measure_candidates
    from fuselip_core.evaluation.report.page import write_report
    from fuselip_core.evaluation.tasks import evaluate as measure
    from fuselip_core.evaluation.transformations import measure_transformations
    from fuselip_core.model.embedder import Embedder
    from fuselip_core.model.hub import load_pretrained
    from fuselip_core.tracking.run import open_run

    artifacts = settings.artifacts
    made = read_numbers(_trained_model(settings) / "training.json")
    made |= read_numbers(artifacts / "codebook" / "codebook.json")
    model, processor = load_pretrained(_trained_model(settings), _device())
    store, encoder = open_measuring(model, artifacts, settings.evaluate.split, _device())
    prepared = PreparedData(artifacts / "prepared")
    # Opened first: a wrong folder is told before anything is measured.
    with_candidates = [prepared, *map(PreparedData, settings.evaluate.candidates)]
    result = measure(encoder, store, prepared, settings.evaluate)
    embedder = Embedder(model, processor)
    for data in with_candidates:
        measure_candidates(embedder, data, settings.evaluate, result)
    measure_transformations(embedder, prepared, settings.evaluate, result)
    result.metrics.update(measure_adaptation(model, artifacts, settings.evaluate, result.metrics, _device()))
    metrics = {**result.metrics, **made}
    with open_run(settings, "evaluate") as run:
        write_report(artifacts, result, metrics, settings)
        write_json(artifacts / "metrics.json", dict(sorted(metrics.items())))
        run.metrics(metrics, int(metrics["train/steps"]))
        run.artifact(artifacts / "report", "report")
    shutil.rmtree(artifacts / "work" / "pixels", ignore_errors=True)
    return metrics


def register(settings: Settings) -> dict[str, Any]:
    """Trained and measured encoder → a version in MLflow's registry; the alias moves only if every gate passes."""
    from fuselip_core.registry.register import register_run

    return register_run(settings)


def _device() -> torch.device:
    from fuselip_core.distributed import local_device

    return local_device()


def _trained_model(settings: Settings) -> Path:
    folder = settings.artifacts / "model"
    if not (folder / "config.json").is_file():
        raise FuselipError(f"{folder} holds no trained model; run the train stage first")
    return folder
