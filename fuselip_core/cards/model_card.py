"""The model card, in the Hub's format: use, limits, results with controls, and how the model was made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselip_core.cards.data_card import cell, data_card, licence_of, origin_of
from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.comparisons import findings
from fuselip_core.evaluation.report import sections
from fuselip_core.evaluation.report.page import FAMILIES
from fuselip_core.files import atomic_folder, find_json, read_json, read_numbers
from fuselip_core.model.fetch import HUB_ID, STARTED_FROM
from fuselip_core.tracking.run import run_of

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

TEMPLATE = Path(__file__).with_name("model_card.md.j2")
FOLDER, MODEL_CARD, DATA_CARD = "cards", "README.md", "DATA_CARD.md"
# Metric in metrics.json → its name in the metadata block, which the Hub shows as a table of results.
HEADLINES = {
    "retrieval/image_to_text/recall_at_1": "Image to caption, recall@1",
    "retrieval/image_to_text/recall_at_10": "Image to caption, recall@10",
    "retrieval/text_to_image/recall_at_1": "Caption to image, recall@1",
    "retrieval/text_to_image/recall_at_10": "Caption to image, recall@10",
    "answers/fused/accuracy": "Answer to a question, accuracy",
}


def write_cards(settings: Settings) -> Path:
    """Writes the model card README.md and DATA_CARD.md into cards/ below `settings.artifacts`; returns that folder.

    Raises FuselipError if the run has no model or was not evaluated.
    """
    folder = settings.artifacts / FOLDER
    with atomic_folder(folder) as partial:
        (partial / MODEL_CARD).write_text(model_card(settings), encoding="utf-8")
        (partial / DATA_CARD).write_text(data_card(settings.artifacts / "prepared"), encoding="utf-8")
    return folder


def model_card(settings: Settings) -> str:
    """Markdown with a metadata block, from the stages' outputs below `settings.artifacts`."""
    from huggingface_hub import ModelCard, ModelCardData

    artifacts = settings.artifacts
    config = read_json(artifacts / "model" / "config.json", "run the train stage first")
    numbers = read_numbers(artifacts / "metrics.json")
    manifest = read_json(artifacts / "prepared" / "manifest.json", "run the prepare stage again")
    split = str(find_json(artifacts / "report" / "results.json").get("split", settings.evaluate.split))
    name = f"{settings.register_.name}-{settings.model.size}"
    started = find_json(artifacts / "model" / STARTED_FROM).get("init")
    licence, licence_name = licence_of(manifest)
    metadata = ModelCardData(
        language="en",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["medical", "radiology", "image-text-retrieval", "multimodal-embeddings", "fuselip"],
        base_model=[each for each in (started, settings.codebook.init) if each and HUB_ID.fullmatch(each)] or None,
        datasets=_hub_dataset(manifest),
        metrics=["recall", "accuracy"],
        model_name=name,
        eval_results=_eval_results(numbers, manifest, split),
        license=licence,
        license_name=licence_name,
    )
    card = ModelCard.from_template(
        metadata,
        str(TEMPLATE),
        name=name,
        family=FAMILIES[settings.model.family],
        size=settings.model.size,
        context_length=config.get("context_length") or config.get("towers", {})["text_cfg"]["context_length"],
        image_size=config.get("image_size") or config.get("towers", {})["vision_cfg"]["image_size"],
        millions=f"{numbers['model/parameters'] / 1e6:,.1f}",
        source=manifest["source"],
        split=split,
        findings=findings(numbers),
        tables=_tables(numbers),
        reconstruction=_table("", *sections.reconstruction(numbers)),
        reads_codes=settings.model.family == "fuselip",
        facts=_facts(settings, numbers, manifest, started),
        licence=licence,
        licence_name=licence_name,
        gates=[(gate.metric, f"{gate.at_least:g}", gate.value(numbers)) for gate in settings.register_.gates],
    )
    return str(card)


def _hub_dataset(manifest: Mapping[str, Any]) -> str | None:
    source = str(manifest["origin"].get("source") or "")
    return source.removeprefix("hub:") if source.startswith("hub:") else None


def _eval_results(numbers: Mapping[str, float], manifest: Mapping[str, Any], split: str) -> list[EvalResult] | None:
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="question-answering" if metric.startswith("answers/") else "image-text-retrieval",
            dataset_type=_hub_dataset(manifest) or manifest["source"],
            dataset_name=manifest["source"],
            dataset_split=split,
            dataset_revision=manifest["origin"].get("revision"),
            metric_type="accuracy" if metric.startswith("answers/") else "recall",
            metric_name=title,
            metric_value=round(numbers[metric], 4),
        )
        for metric, title in HEADLINES.items()
        if metric in numbers
    ] or None


def _tables(numbers: Mapping[str, float]) -> list[dict[str, Any]]:
    """Tables of results with chance and controls, each with an explanation."""
    found = []
    if retrieval := sections.retrieval(numbers):
        text = f"Every one of {retrieval['pool']} captions, or of {retrieval['pool_images']} images, is a candidate."
        head = ["", "Recall@1", "Recall@5", "Recall@10", "Median rank", "MRR"]
        found.append(_table("Retrieval", head, retrieval["rows"], text))
    if answers := sections.answers(numbers):
        text = f"Each of {answers['questions']} questions is ranked against {answers['pool']} answers."
        found.append(_table("Questions", answers["head"], answers["rows"], text))
    return found + [
        _table(each["title"], each["head"], each["rows"], each["text"]) for each in sections.tables(numbers)
    ]


def _table(title: str, head: list[str], rows: list[tuple[Any, ...]], text: str = "") -> dict[str, Any]:
    return {"title": title, "text": text, "head": head, "rows": [[cell(each) for each in row] for row in rows]}


def _facts(
    settings: Settings, numbers: Mapping[str, float], manifest: Mapping[str, Any], started: str | None
) -> list[tuple[str, str]]:
    """Rows of the table "How it was made"."""
    run = run_of(settings.artifacts)
    tags = run.get("tags", {})
    changed = ", with changes that the registered state holds" if tags.get("git_dirty") == "true" else ""
    facts = {
        "Commit": f"`{tags.get('git_commit', 'unknown')}`{changed}",
        "Recipe": f"`{settings.recipe}`, size {settings.model.size}",
        "Raw data": origin_of(manifest),
        "Data version": f"`{manifest['data_version']}`",
        "Started from": f"`{started}`" if started else "random weights",
        "Image tokenizer": f"from `{settings.codebook.init}`" if settings.codebook.init else "trained from scratch",
        "Batch size and mixture": f"{settings.train.batch_size:,}: "
        + ", ".join(f"{kind} {weight:g}" for kind, weight in settings.train.mixture.items()),
        "Steps": f"{numbers['train/steps']:,.0f}",
        "Peak learning rate": f"{settings.train.learning_rate:g}",
        "Training time": "{:,.0f} min {:.0f} s".format(*divmod(numbers["train/seconds"], 60)),
        "MLflow run": f"`{run['mlflow_run_id']}`" if run.get("mlflow_run_id") else "none",
    }
    return [(name, cell(value)) for name, value in facts.items()]


def cards_of(model: Path) -> Path:
    """The folder with a model's card: its own, or cards/ beside it. Raises FuselipError if there is no card."""
    for folder in (model, model.parent / FOLDER):
        if (folder / MODEL_CARD).is_file():
            return folder
    raise FuselipError(f"{model} has no model card; run `fuselip card` with the settings of its run first")
