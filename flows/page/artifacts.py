"""Prefect artifacts of a finished run: results, pictures, and links to its report and to MLflow."""

from __future__ import annotations

import io
import os
from pathlib import Path

from PIL import Image
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_table_artifact,
)

from flows.environment import MLFLOW_TRAININGS
from flows.page.summary import registered_line
from flows.run.folder import Run
from fuselip_core.evaluation.comparisons import Row, comparison_rows
from fuselip_core.files import find_json
from fuselip_core.html import data_uri
from fuselip_core.tracking.run import run_of
from fuselip_core.tracking.store import tracking_uri

# Pictures are kept in the server's database, so they are small.
PICTURE_SIDE = 900
MOST_PICTURES = 6
REPORT = "/artifacts/report/index.html"
SHOWN = {
    "reconstructions": "held-out images above, what the image tokenizer keeps of them below",
    "training": "losses, validation, learning rate and speed over the steps",
    "retrieval": "recall in both directions beside chance",
    "answers": "right answers beside the controls",
}


def publish(run: Run) -> None:
    """Makes the artifacts of the run's results so far; called from within its flow."""
    metrics = find_json(run.artifacts / "metrics.json")
    rows = comparison_rows(metrics)
    mlflow_run = mlflow_url(run.artifacts)
    if metrics:
        create_markdown_artifact(key="results", markdown=results_page(run, rows, metrics), description=run.name)
        create_table_artifact(key="metrics", table=rows, description=f"Measures of {run.name} beside their controls")
    report = run.artifacts / "report" / "index.html"
    if report.is_file():
        link = mlflow_url(run.artifacts, REPORT) or report.resolve().as_uri()
        create_link_artifact(key="report", link=link, link_text="Report", description=f"Also in {report}")
    if mlflow_run:
        create_link_artifact(key="mlflow-run", link=mlflow_run, link_text="MLflow run", description="Curves and model")
    for path in pictures_of(run.artifacts):
        shown = f"{run.name}: {SHOWN.get(path.stem, path.stem)}"
        create_image_artifact(image_url=small_picture(path), key=f"picture-{path.stem}", description=shown)


def results_page(run: Run, rows: list[Row], metrics: dict[str, float]) -> str:
    """Markdown: the model, the measures beside their controls, and every metric."""
    known = run_of(run.artifacts)
    model = registered_line(find_json(run.artifacts / "registered.json"))
    lines = [f"**{model}**", ""] if model else []
    lines += _table([list(rows[0]), *(list(row.values()) for row in rows)]) if rows else []
    if link := mlflow_url(run.artifacts):
        lines += ["", f"[Report]({mlflow_url(run.artifacts, REPORT)}), [MLflow run]({link})"]
    lines += ["", f"Report: `{run.artifacts / 'report' / 'index.html'}`", ""]
    if known.get("mlflow_run_id"):
        lines += [f"MLflow run: `{known['mlflow_run_id']}` on `{known.get('mlflow_uri')}`", ""]
    lines += _table([["metric", "value"], *([name, f"{value:.4g}"] for name, value in sorted(metrics.items()))])
    return "\n".join(lines) + "\n"


def mlflow_url(artifacts: Path, part: str = "") -> str | None:
    """Address of the MLflow page of the run that trained the model, or of a part; None if no such page is known.

    ``FUSELIP_MLFLOW_UI`` names the page for a browser: a tracking server may have another name inside its network.
    """
    known = run_of(artifacts)
    uri = tracking_uri()
    base = os.environ.get("FUSELIP_MLFLOW_UI") or (uri if uri.startswith("http") else None)
    if not base or known.get("mlflow_uri") != uri:
        return None
    place = f"experiments/{known['mlflow_experiment_id']}/runs/{known['mlflow_run_id']}"
    return f"{base.rstrip('/')}/#/{place}{part}?{MLFLOW_TRAININGS}"


def pictures_of(artifacts: Path) -> list[Path]:
    """Pictures worth a look: what the image tokenizer keeps of some images, then the report's charts."""
    found = [artifacts / "codebook" / "reconstructions.png", *sorted((artifacts / "report").glob("*.png"))]
    # The report has a copy of the first.
    by_name = {path.name: path for path in reversed(found) if path.is_file()}
    return list(reversed(by_name.values()))[:MOST_PICTURES]


def small_picture(path: Path) -> str:
    """The picture itself as an address, made smaller where it is large."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
    small.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    stream = io.BytesIO()
    small.save(stream, "PNG", optimize=True)
    return data_uri(stream.getvalue(), "png")


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [head, f"|{' --- |' * len(rows[0])}", *body]
