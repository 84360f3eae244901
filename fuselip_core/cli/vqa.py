"""The commands of `fuselip vqa`: questions and answers from captions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from fuselip_core.errors import FuselipError
from fuselip_core.files import read_json

app = typer.Typer(help="Make questions and answers from captions.", no_args_is_help=True)


@app.callback()
def _verbs() -> None:
    """Without a callback, Typer would drop the name of the only command."""


@app.command()
def generate(
    captions: Annotated[Path, typer.Argument(help="Prepared data, or a CSV table with the columns path,caption.")],
    out: Annotated[Path, typer.Option(help="Folder of the questions, where the same command resumes.")],
    generator: Annotated[
        Literal["model", "concepts"],
        typer.Option(help="An instruction model, or rules over concepts and captions."),
    ] = "model",
    model: Annotated[
        str, typer.Option(help="Hub id or folder of an instruction model.")
    ] = "meta-llama/Llama-3.1-8B-Instruct",
    names: Annotated[Path | None, typer.Option(help="cui_mapping.csv with the names of concepts.")] = None,
    questions: Annotated[
        int, typer.Option(min=1, max=20, help="Questions per caption that the model is asked for.")
    ] = 3,
    batch_size: Annotated[int, typer.Option(min=1, help="Captions per batch.")] = 16,
    part_rows: Annotated[
        int, typer.Option(min=1, help="Captions per part; an interrupted run loses at most one part.")
    ] = 256,
    max_new_tokens: Annotated[int, typer.Option(min=8, help="Maximum output of the model, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the rules' closed questions.")] = 0,
) -> None:
    """Make questions and answers from captions, as tables (path,question,answer) and prepared pairs."""
    from fuselip_core.generation.questions import Job, run

    if not captions.exists():
        raise FuselipError(f"{captions} does not exist; give a prepared folder or a table path,caption")
    if generator == "concepts" and captions.is_dir() and names is None:
        raise FuselipError("rules over concepts need concept names; give the data set's cui_mapping.csv with --names")
    if names is not None and not names.is_file():
        raise FuselipError(f"{names} does not exist; give the path of the data set's cui_mapping.csv")
    chosen = model if generator == "model" else None
    job = Job(captions, out, chosen, names, questions, part_rows, batch_size, max_new_tokens, seed)
    if not run(job):
        typer.echo(f"this process is done; {out} is complete once the other processes are", err=True)
        return
    manifest = read_json(out / "manifest.json", "start the same command again")
    shown = {"folder": str(out), "counts": manifest["counts"], "quarantine": manifest["quarantine"]}
    typer.echo(json.dumps(shown, indent=2 if sys.stdout.isatty() else None))
