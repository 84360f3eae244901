"""The stages, one short function each: the table of contents of the project.

prepare → codebook → tokenize → train → evaluate → register. Each reads the output of earlier stages below
`settings.artifacts`, writes its own folder there, and returns a summary as plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fuselip_core.config import Settings
from fuselip_core.files import write_json


def prepare(settings: Settings) -> dict[str, Any]:
    """Raw data set → Parquet shards and manifest in prepared/."""
    from fuselip_core.data.prepare.prepare import prepare_data

    manifest = prepare_data(settings.prepare, settings.artifacts / "prepared", settings.artifacts / "work" / "prepared")
    return {"counts": manifest["counts"], "quarantine": manifest["quarantine"]}


def codebook(settings: Settings) -> dict[str, Any]:
    """Prepared images → an image tokenizer in codebook/, with its reconstruction error and codebook usage."""
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
    """Trained encoder → metrics with chance and controls in metrics.json, and a page in report/."""
    from fuselip_core.evaluation.comparisons import headlines
    from fuselip_core.evaluation.report.page import write_report
    from fuselip_core.evaluation.run import measure_run
    from fuselip_core.tracking.run import open_run

    result = measure_run(settings)
    with open_run(settings, "evaluate") as run:
        write_report(settings, result)
        write_json(settings.artifacts / "metrics.json", result.numbers())
        run.metrics(headlines(result.metrics), int(result.metrics["train/steps"]))
        run.results(result.numbers())
        run.artifact(settings.artifacts / "metrics.json")
        run.artifact(settings.artifacts / "report", "report")
    return result.metrics


def compare(settings: Settings, models: Sequence[str], beside_published: bool = False) -> str:
    """Any models, without training → one table in comparison/; prepares the data first if necessary."""
    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.encoding.open import TEXTS
    from fuselip_core.evaluation.report.comparison import as_text, write_comparison
    from fuselip_core.evaluation.run import measure_models
    from fuselip_core.tokenizer.tokenize import tokenize_texts

    artifacts = settings.artifacts
    if not (artifacts / "prepared").is_dir():
        prepare(settings)
    if not (artifacts / "tokens").is_dir():
        tokenize_texts(PreparedData(artifacts / "prepared"), artifacts / TEXTS)
    table = write_comparison(artifacts, measure_models(settings, models), beside_published)
    return f"{as_text(table['head'], table['rows'])}\n{table['page']}"


def register(settings: Settings) -> dict[str, Any]:
    """Evaluated encoder → a version in MLflow's registry; the alias moves only if every gate passes."""
    from fuselip_core.registry.register import register_run

    return register_run(settings)
