"""Terminal summary of a finished run: metrics beside their controls, and the next commands."""

from __future__ import annotations

import json
import os
import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from flows.run.folder import Run
from flows.run.runner import Ending
from fuselip_core.config import SECTIONS, read_corrections
from fuselip_core.evaluation.comparisons import Row, comparison_rows
from fuselip_core.files import find_json

SAID_ELSEWHERE = ("prepare.source", "prepare.root", "train.steps", "train.epochs")


def registered_line(registered: dict[str, Any]) -> str:
    """The registered model in a few words; empty if there is none."""
    if not registered:
        return ""
    missed = [gate for gate in registered["gates"] if not gate["passed"]]
    line = f"{registered['name']} version {registered['version']}"
    if registered["alias"]:
        return f"{line}, alias {registered['alias']}, {len(registered['gates'])} gates passed"
    reasons = ", ".join(f"{gate['metric']} {_number(gate['value'])} < {gate['at_least']:.4g}" for gate in missed)
    return f"{line}, without the alias: {reasons or 'it was registered before, and another version has it'}"


def print_summary(ending: Ending, console: Console) -> None:
    """The last screen of a run that went well."""
    run = ending.run
    assert run is not None
    stages = ", ".join(f"{each.stage} {_took(each.status, each.seconds)}" for each in ending.outcomes)
    metrics = find_json(run.artifacts / "metrics.json")
    registered = find_json(run.artifacts / "registered.json")
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
    """The commands a user would type next; they work as they stand, in the repository's root."""
    model = f"models:/{registered.get('name')}@{registered.get('alias') or 'candidate'}"
    prepared = shlex.quote(os.path.relpath(run.artifacts / "prepared"))
    return [
        "make serve-ui    # curves and models, on http://127.0.0.1:5000",
        f"make serve-model MODEL={model}    # answers on http://127.0.0.1:5001",
        f"{_longer(run)}    # only the stages behind the change run",
        f".venv/bin/fuselip index build {prepared} --model {model}    # an index of these pictures",
        ".venv/bin/fuselip app    # a page to search on that index, on http://127.0.0.1:8000",
    ]


def _longer(run: Run) -> str:
    """The command that trains twice as long; it repeats the run's other corrections, which would be lost otherwise."""
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
