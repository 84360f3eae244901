"""The verbs of `fuselip index`: build, add, remove, info, search, verify."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fuselip_core.errors import FuselipError
from fuselip_core.search import DEFAULT_INDEX, DEFAULT_MODEL

app = typer.Typer(help="Search one's own archive: build an index, add, remove, search.", no_args_is_help=True)
Archive = Annotated[Path, typer.Argument(help="Folder of pictures or DICOM files, prepared data, or a table.")]
IndexOption = Annotated[str, typer.Option("--index", help="Folder of the index, or an s3:// address.")]
ModelOption = Annotated[str, typer.Option("--model", help="models:/NAME@ALIAS, a folder, or a hub id.")]
KindOption = Annotated[str | None, typer.Option("--kind", help="Kind of data set, where it is not found out.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _embedder(model: str) -> Any:
    from fuselip_core import Embedder

    return Embedder.from_pretrained(model)


@app.command()
def build(
    archive: Archive, index: IndexOption = DEFAULT_INDEX, model: ModelOption = DEFAULT_MODEL, kind: KindOption = None
) -> None:
    """Build an index of an archive; one that stands there is replaced."""
    from fuselip_core.search import build as builder

    outcome = builder.build(archive, index, _embedder(model), kind)
    typer.echo(f"{index}: {outcome.sentence()}")


@app.command()
def add(archive: Archive, index: IndexOption = DEFAULT_INDEX, model: ModelOption = "", kind: KindOption = None) -> None:
    """Add an archive to an index; what is there already is brought up to date."""
    from fuselip_core.search import build as builder
    from fuselip_core.search.index import Index

    outcome = builder.add(archive, index, _embedder(model or Index.open(index).model_name), kind)
    typer.echo(f"{index}: {outcome.sentence()}")


@app.command()
def remove(
    index: IndexOption = DEFAULT_INDEX,
    case: Annotated[str | None, typer.Option(help="Case whose pictures are forgotten.")] = None,
    ids: Annotated[list[str] | None, typer.Option("--id", help="Picture that is forgotten; may be repeated.")] = None,
) -> None:
    """Forget a case or single pictures for good."""
    from fuselip_core.search import build as builder

    if (case is None) == (not ids):
        raise FuselipError("name what to remove: either --case, or --id once or more")
    typer.echo(f"{builder.remove(index, case, ids or ())} pictures removed from {index}")


@app.command()
def info(index: IndexOption = DEFAULT_INDEX, as_json: JsonOption = False) -> None:
    """Say what an index holds, and which model it belongs to."""
    from fuselip_core.search.index import Index

    opened = Index.open(index)
    found = {**opened.info(), "facets": opened.facets()}
    typer.echo(json.dumps(found, indent=2, default=str, ensure_ascii=False))


@app.command()
def verify(index: IndexOption = DEFAULT_INDEX) -> None:
    """Read all of an index and check it."""
    from fuselip_core.search import build as builder

    typer.echo(json.dumps(builder.verify(index)))


@app.command()
def search(
    text: Annotated[str | None, typer.Option(help="Words that the pictures should match.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture that they should be like.")] = None,
    index: IndexOption = DEFAULT_INDEX,
    model: ModelOption = "",
    limit: Annotated[int, typer.Option(min=1, help="Number of results.")] = 10,
    as_json: JsonOption = False,
) -> None:
    """Search by words, by a picture, or by both at once."""
    from fuselip_core.search.index import Index

    opened = Index.open(index)
    embedder = _embedder(model or opened.model_name)
    opened.check_model(embedder.digest)
    if text is None and image is None:
        raise FuselipError("the query has neither --text nor --image; give one of them, or both")
    vector = embedder.embed(images=[image], texts=[text])[0]
    for hit in opened.search(vector, text if image is None else None, limit):
        shown = dataclasses.asdict(hit) | {"thumbnail": f"{len(hit.thumbnail)} bytes"}
        typer.echo(json.dumps(shown, default=str) if as_json else f"{hit.score:.3f} {hit.id} {hit.caption}")
