"""What a finished run says on the terminal: its measures beside their controls, and what to type next."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.run.folder import Run
from flows.run.runner import Ending
from fuselip_core.config import SECTIONS, read_corrections
from fuselip_core.tracking.run import tracking_uri

Row = dict[str, str]
SAID_ELSEWHERE = ("prepare.source", "prepare.root", "train.steps", "train.epochs")
# Metric, what it is measured against, and the words for both; rows whose metric is absent are left out.
COMPARISONS = (
    ("image → text, recall@1", "retrieval/image_to_text/recall_at_1", "retrieval/image_to_text/chance_at_1", "chance"),
    ("", "", "retrieval_shuffled/image_to_text/recall_at_1", "pairs shuffled"),
    (
        "image → text, mean 1 / rank",
        "retrieval/image_to_text/mean_reciprocal_rank",
        "retrieval_shuffled/image_to_text/mean_reciprocal_rank",
        "pairs shuffled",
    ),
    ("text → image, recall@1", "retrieval/text_to_image/recall_at_1", "retrieval/text_to_image/chance_at_1", "chance"),
    ("", "", "retrieval_shuffled/text_to_image/recall_at_1", "pairs shuffled"),
    (
        "text → image, mean 1 / rank",
        "retrieval/text_to_image/mean_reciprocal_rank",
        "retrieval_shuffled/text_to_image/mean_reciprocal_rank",
        "pairs shuffled",
    ),
    ("answers, image and question", "answers/fused/accuracy", "answers/majority/accuracy", "commonest answer"),
    ("", "", "answers/question_only/accuracy", "question alone"),
    ("", "", "answers/image_only/accuracy", "image alone"),
    ("", "", "answers/blank_image/accuracy", "blank image"),
    ("", "", "answers/shuffled_image/accuracy", "shuffled image"),
    (
        "answers, mean 1 / rank",
        "answers/fused/mean_reciprocal_rank",
        "answers/shuffled_image/mean_reciprocal_rank",
        "shuffled image",
    ),
)


def comparison_rows(metrics: dict[str, float]) -> list[Row]:
    """One row a comparison: measure, value, control, value of the control."""
    rows = []
    for measure, name, control, words in COMPARISONS:
        if control in metrics and (not name or name in metrics):
            value = f"{metrics[name]:.3f}" if name else ""
            rows.append(
                {"measure": measure, "value": value, "control": words, "value of control": f"{metrics[control]:.3f}"}
            )
    return rows


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is no such file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def registered_line(registered: dict[str, Any]) -> str:
    """The registered model in a few words; empty if there is none."""
    if not registered:
        return ""
    missed = [gate for gate in registered["gates"] if not gate["passed"]]
    line = f"{registered['name']} version {registered['version']}"
    if registered["alias"]:
        return f"{line}, alias {registered['alias']}, {len(registered['gates'])} gates passed"
    reasons = ", ".join(f"{gate['metric']} {_number(gate['value'])} < {gate['at_least']}" for gate in missed)
    return f"{line}, without the alias: {reasons}"


def print_summary(ending: Ending, console: Console) -> None:
    """The last screen of a run that went well."""
    run = ending.run
    assert run is not None
    stages = ", ".join(f"{each.stage} {_took(each.status, each.seconds)}" for each in ending.outcomes)
    metrics = read_json(run.artifacts / "metrics.json")
    registered = read_json(run.artifacts / "registered.json")
    shown = os.path.relpath(run.artifacts)
    console.print()
    if metrics:
        console.print(_table(comparison_rows(metrics), title=f"{run.name}, {run.settings.evaluate.split} split"))
    console.print(f"[bold]Stages[/]    {stages}", soft_wrap=True)
    if metrics:
        console.print(f"[bold]Metrics[/]   {shown}/metrics.json")
        console.print(f"[bold]Pictures[/]  {shown}/report/index.html")
    if registered:
        console.print(f"[bold]Model[/]     {registered_line(registered)}", soft_wrap=True)
        console.print("[bold]Next[/]")
        for command in next_commands(run, registered):
            console.print(f"  {command}", highlight=False, soft_wrap=True)


def next_commands(run: Run, registered: dict[str, Any]) -> list[str]:
    """The three commands a user would type next; they work as they stand, in the repository's root."""
    uri = tracking_uri().replace(f"{run.repository}/", "")
    model = f"models:/{registered.get('name')}@{registered['alias'] if registered.get('alias') else 'candidate'}"
    return [
        f".venv/bin/mlflow ui --backend-store-uri {uri}    # curves and models, on http://127.0.0.1:5000",
        f"MLFLOW_TRACKING_URI={uri} .venv/bin/mlflow models serve -m {model} --env-manager local -p 5001",
        f"{_longer(run)}    # only the stages behind the change run",
    ]


def _longer(run: Run) -> str:
    """The command that trains twice as long; what else the run corrects is said again, or it would be taken back."""
    train, prepare = run.settings.train, run.settings.prepare
    steps = f"train.steps={2 * train.steps}" if train.steps else f"train.epochs={2 * (train.epochs or 1):g}"
    words = ["make", "demo"]
    if prepare.source != "phantom":
        words += [f"SOURCE={prepare.source}", f"ROOT={shlex.quote(str(prepare.root))}"]
    corrected: list[str] = []
    if run.folder != run.repository:
        words.append(f"NAME={run.name}")
        corrected = [
            f"{section}.{name}={value if isinstance(value, str) else json.dumps(value, separators=(',', ':'))}"
            for section, values in read_corrections(run.folder / "params.yaml").items()
            if section in SECTIONS
            for name, value in values.items()
            if f"{section}.{name}" not in SAID_ELSEWHERE
        ]
    return " ".join([*words, f"SET={shlex.quote(' '.join([*corrected, steps]))}"])


def _table(rows: list[Row], title: str) -> Table:
    table = Table(title=title, title_justify="left", show_lines=False)
    for name in ("measure", "value", "control", "value of control"):
        table.add_column(name, justify="right" if name.startswith("value") else "left")
    for row in rows:
        table.add_row(*row.values())
    return table


def _took(status: str, seconds: float) -> str:
    return f"{seconds:.0f} s" if status == "done" else status


def _number(value: float | None) -> str:
    return "missing" if value is None else f"{value:.4g}"
