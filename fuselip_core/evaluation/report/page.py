"""The report of a run as one page: findings in sentences, numbers with their controls, examples and curves.

The page needs no other file and no network. Its charts are also in the folder as PNG, and all numbers in results.json.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from fuselip_core.config import Settings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.evaluation.comparisons import findings
from fuselip_core.evaluation.report import sections
from fuselip_core.evaluation.report.charts import draw_answers, draw_map, draw_retrieval
from fuselip_core.evaluation.report.run_before import beside_run_before
from fuselip_core.evaluation.result import AnswerExample, EvaluationResult, RetrievalExample
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.html import data_uri, picture_uri, render
from fuselip_core.images import UnreadableImage, decode
from fuselip_core.tracking.run import run_of

TEMPLATE = Path(__file__).with_name("report.html.j2")
FAMILIES = {"fuselip": "FuseLIP", "siglip-sf": "SigLIP-SF", "siglip-mlf": "SigLIP-MLF"}
MOST_DOTS = 1500
Pictures = dict[int, dict[str, str]]


def write_report(settings: Settings, result: EvaluationResult) -> Path:
    """Writes report/ (index.html, charts, results.json) below `settings.artifacts` and returns the page's path.

    Reads the prepared data there and, if they exist, history.jsonl and the tokenizer's reconstructions.
    """
    artifacts = settings.artifacts
    prepared = PreparedData(artifacts / "prepared")
    numbers, asked = result.numbers(), settings.model_dump(mode="json", by_alias=True)
    pictures, modalities, credits = _pictures(prepared, result)
    with atomic_folder(artifacts / "report") as folder:
        plain = asdict(replace(result, embeddings=None, metrics=dict(sorted(result.metrics.items()))))
        del plain["embeddings"]
        write_json(folder / "results.json", plain)
        if "retrieval/pool" in numbers:
            draw_retrieval(folder / "retrieval.png", result.metrics, result.intervals)
        if "answers/pool" in numbers:
            draw_answers(folder / "answers.png", result.metrics, result.intervals)
        values = {
            "retrieval": sections.retrieval(numbers),
            "answers": sections.answers(numbers),
            "concepts": sections.concepts(result),
            "before": beside_run_before(settings, result),
            "tables": sections.tables(numbers),
            "map": _map(folder, result, modalities),
            "training": sections.training(folder, artifacts, numbers),
            "tokenizer": sections.tokenizer(folder, artifacts, numbers, settings.model.family == "fuselip"),
            "data": sections.data(prepared.manifest, credits),
        }
        page = render(
            TEMPLATE,
            **_head(settings, result, prepared, numbers),
            **values,
            contents=_contents(values),
            result=result,
            pictures=pictures,
            findings=findings(numbers),
            settings=yaml.safe_dump(asked, sort_keys=False, allow_unicode=True),
            numbers=[(name, f"{value:.6g}") for name, value in numbers.items()],
        )
        (folder / "index.html").write_text(page, encoding="utf-8")
    return artifacts / "report" / "index.html"


def _head(
    settings: Settings, result: EvaluationResult, prepared: PreparedData, numbers: dict[str, float]
) -> dict[str, Any]:
    """Title, data, date, code version, and gates."""
    counts, run = prepared.manifest["counts"].get(result.split, {}), run_of(settings.artifacts)
    held = [f"{counts.get('images', 0):,} images"]
    held += [f"{count:,} {sections.kind_name(kind)}" for kind, count in counts.get("pairs", {}).items()]
    tags = run.get("tags", {})
    commit = f"commit {tags['git_commit'][:10]}{' (changed)' * (tags.get('git_dirty') == 'true')}" if tags else ""
    number = f"run {run['mlflow_run_id']}" if run.get("mlflow_run_id") else ""
    uri = str(run.get("mlflow_uri", ""))
    place = f"#/experiments/{run.get('mlflow_experiment_id')}/runs/{run.get('mlflow_run_id')}"
    made = f"{datetime.now(UTC):%d %B %Y, %H:%M} UTC"
    gates = [(gate, gate.value(numbers)) for gate in settings.register_.gates]
    return {
        "title": f"{FAMILIES.get(settings.model.family, settings.model.family)} {settings.model.size} on "
        f"{settings.prepare.source}",
        "asked": f"Evaluated on the {result.split} split: {', '.join(held)}. Recipe {settings.recipe}.",
        "made": " · ".join(filter(None, (made, commit, number))),
        "mlflow": f"{uri.rstrip('/')}/{place}" if uri.startswith("http") and number else None,
        "gates": [
            {
                "name": gate.metric,
                "at_least": f"{gate.at_least:g}",
                "value": "missing" if value is None else f"{value:.4g}",
                "passed": value is not None and value >= gate.at_least,
            }
            for gate, value in gates
        ],
    }


def _contents(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Anchor and name of each section."""
    found = [(name, name.capitalize()) for name in ("retrieval", "answers", "concepts") if values[name]]
    found += [(each["id"], each["title"]) for each in values["tables"]]
    found += [("before", "The run before")] * bool(values["before"])
    found += [("map", "Map")] * bool(values["map"])
    return [*found, *((name, name.capitalize()) for name in ("training", "tokenizer", "data", "settings"))]


def _pictures(prepared: PreparedData, result: EvaluationResult) -> tuple[Pictures, list[str], list[tuple[str, str]]]:
    """Pictures of all examples by row, the modality of every image, and attributions with the names of their images."""
    rows: set[int | None] = set()
    for example in (*result.retrieval, *result.captions, *result.worst, *result.answers, *result.worst_answers):
        if isinstance(example, RetrievalExample | AnswerExample):
            rows |= {example.image, *(candidate.image for candidate in example.top)}
    found: Pictures = {}
    modalities: list[str] = []
    credits: dict[str, list[str]] = {}
    columns = ["image_id", "bytes", "licence", "attribution", "modality"]
    for batch in prepared.iter_images(result.split, columns=columns):
        start = len(modalities)
        modalities += [name or "unknown" for name in batch.column("modality").to_pylist()]
        for row in sorted(row for row in rows if row is not None and start <= row < len(modalities)):
            image = {name: batch.column(name)[row - start].as_py() for name in columns}
            found[row] = {"name": str(image["image_id"]), "source": "", "error": ""}
            try:
                found[row]["source"] = picture_uri(decode(image["bytes"]))
            except UnreadableImage as error:
                found[row]["error"] = str(error)
            if credit := ", ".join(str(image[key]) for key in ("attribution", "licence") if image[key]):
                credits.setdefault(credit, []).append(found[row]["name"])
    return found, modalities, [(credit, ", ".join(names)) for credit, names in credits.items()]


def _map(folder: Path, result: EvaluationResult, modalities: list[str]) -> dict[str, str] | None:
    """Images and captions on two principal components; None if none were embedded."""
    if result.embeddings is None or len(result.embeddings[0]) < 3:
        return None
    rows, images, texts = result.embeddings
    share = draw_map(folder / "map.png", images[:MOST_DOTS], texts[:MOST_DOTS], [modalities[row] for row in rows])
    return {"share": sections.percent(share), "source": data_uri((folder / "map.png").read_bytes(), "png")}
