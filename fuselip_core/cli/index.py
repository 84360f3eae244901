"""The commands of `fuselip index`: build, add, update, remove, info, verify, search."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fuselip_core.errors import FuselipError
from fuselip_core.search import DEFAULT_INDEX, DEFAULT_MODEL

if TYPE_CHECKING:
    from fuselip_core.search.index import Hit

app = typer.Typer(help="Search your own archive: build, change and search an index.", no_args_is_help=True)

ARCHIVE_HELP = "Folder of pictures or DICOM files, prepared data, or a table."
Archive = Annotated[Path, typer.Argument(help=ARCHIVE_HELP)]
ArchiveOrNone = Annotated[Path | None, typer.Argument(help=ARCHIVE_HELP)]
DicomwebOption = Annotated[
    str | None, typer.Option("--dicomweb", help="URL of a DICOMweb server, instead of an archive.")
]
IndexOption = Annotated[str, typer.Option("--index", help="Folder of the index, or an s3:// address.")]
ModelOption = Annotated[str, typer.Option("--model", help="models:/NAME@ALIAS, a folder, or a hub id.")]
SameModelOption = Annotated[str, typer.Option("--model", help="Model; default: the one that built the index.")]
KindOption = Annotated[
    str | None,
    typer.Option("--kind", help="Kind of data set, see `fuselip data sources`; detected by default."),
]
NameOption = Annotated[str | None, typer.Option("--name", help="Name of the archive; default: the folder's.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Several = list[str] | None
CAPTION_SHOWN = 90


def load(model: str) -> Any:
    """Loads the embedder of a model."""
    from fuselip_core import Embedder

    return Embedder.from_pretrained(model)


def _source(archive: Path | None, dicomweb: str | None) -> Path | str:
    if (archive is None) == (dicomweb is None):
        raise FuselipError("the source is not clear; give either an archive, or a DICOMweb server with --dicomweb")
    return archive or str(dicomweb)


@app.command()
def build(
    archive: ArchiveOrNone = None,
    index: IndexOption = DEFAULT_INDEX,
    model: ModelOption = DEFAULT_MODEL,
    kind: KindOption = None,
    name: NameOption = None,
    dicomweb: DicomwebOption = None,
) -> None:
    """Build the index of an archive; replaces an existing index once the new one is complete."""
    from fuselip_core.search import build as builder

    source = _source(archive, dicomweb)
    typer.echo(f"{index}: {builder.build(source, index, load(model), kind, name).sentence()}")


@app.command()
def add(
    archive: ArchiveOrNone = None,
    index: IndexOption = DEFAULT_INDEX,
    model: SameModelOption = "",
    kind: KindOption = None,
    name: NameOption = None,
    dicomweb: DicomwebOption = None,
) -> None:
    """Add an archive to an index, or the rows of it that are new or have changed."""
    from fuselip_core.search import build as builder
    from fuselip_core.search.index import Index

    source = _source(archive, dicomweb)
    embedder = load(model or Index.open(index).model_address)
    typer.echo(f"{index}: {builder.add(source, index, embedder, kind, name).sentence()}")


@app.command()
def update(
    archive: ArchiveOrNone = None,
    index: IndexOption = DEFAULT_INDEX,
    model: ModelOption = DEFAULT_MODEL,
    kind: KindOption = None,
    dicomweb: DicomwebOption = None,
) -> None:
    """Update an index: rebuild it if the model has changed, else add rows that are new or have changed."""
    from fuselip_core.search import build as builder

    source = _source(archive, dicomweb)
    typer.echo(f"{index}: {builder.update(source, index, load(model), kind).sentence()}")


@app.command()
def remove(
    index: IndexOption = DEFAULT_INDEX,
    case: Annotated[str | None, typer.Option(help="Case to remove.")] = None,
    ids: Annotated[Several, typer.Option("--id", help="Id of a picture to remove; repeatable.")] = None,
) -> None:
    """Remove a case, or single pictures, for good."""
    from fuselip_core.search import build as builder

    if (case is None) == (not ids):
        raise FuselipError("the selection is not clear; give either --case, or --id at least once")
    typer.echo(f"{index}: {builder.remove(index, case, ids or ()):,} pictures removed")


@app.command()
def info(index: IndexOption = DEFAULT_INDEX, as_json: JsonOption = False) -> None:
    """Show the content of an index and its model."""
    from fuselip_core.search.index import Index

    opened = Index.open(index)
    found, facets = opened.info(), opened.facets()
    if as_json:
        _echo_json({**found, "facets": facets})
        return
    for name, value in found.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:%Y-%m-%d %H:%M}" if name.endswith("ed") else value
        typer.echo(f"{name.replace('_', ' '):14}  {shown}")
    for name, counts in facets.items():
        typer.echo(f"{name:14}  {', '.join(f'{value} {count:,}' for value, count in counts.items()) or 'none'}")


@app.command()
def verify(index: IndexOption = DEFAULT_INDEX) -> None:
    """Read and check the whole index, and delete leftovers of killed processes."""
    from fuselip_core.search import build as builder

    typer.echo(f"{index}: {builder.verify(index):,} pictures, all with unique ids and valid vectors")


@app.command()
def search(
    text: Annotated[str | None, typer.Option(help="Words to search for.")] = None,
    image: Annotated[Path | None, typer.Option(help="Picture or DICOM file to search for.")] = None,
    index: IndexOption = DEFAULT_INDEX,
    model: SameModelOption = "",
    limit: Annotated[int, typer.Option(min=1, help="Number of results.")] = 10,
    offset: Annotated[int, typer.Option(min=0, help="Results to skip.")] = 0,
    threshold: Annotated[float | None, typer.Option(help="Minimum cosine similarity.")] = None,
    modality: Annotated[Several, typer.Option(help="Only this modality; repeatable.")] = None,
    concept: Annotated[Several, typer.Option(help="Only with this concept; repeatable.")] = None,
    split: Annotated[Several, typer.Option(help="Only this split; repeatable.")] = None,
    source: Annotated[Several, typer.Option(help="Only this archive; repeatable.")] = None,
    after: Annotated[datetime | None, typer.Option(help="Only pictures indexed at this time or later.")] = None,
    before: Annotated[datetime | None, typer.Option(help="Only pictures indexed before this time.")] = None,
    hybrid: Annotated[bool, typer.Option(help="Also search captions for the words, and fuse both rankings.")] = True,
    exact: Annotated[bool, typer.Option("--exact", help="Search exactly even in a large index.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Search by words, by a picture, or by both as one query."""
    from fuselip_core.search import query
    from fuselip_core.search.index import Filters, Index

    opened = Index.open(index)
    query.require(text, image is not None)
    embedder = load(model or opened.model_address)
    opened.check_model(embedder.digest)
    wanted = [tuple(given or ()) for given in (modality, concept, split, source)]
    filters = Filters(wanted[0], wanted[1], wanted[2], wanted[3], indexed_after=after, indexed_before=before)
    vector = embedder.embed([None if image is None else query.picture_of(image)], [text])[0]
    hits = opened.search(vector, text if hybrid else None, limit, offset, filters, threshold, exact=exact or None)
    if as_json:
        _echo_json([dataclasses.asdict(hit) | {"thumbnail": len(hit.thumbnail)} for hit in hits])
    else:
        _show_hits(hits, offset)


def _echo_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, default=str, ensure_ascii=False))


def _show_hits(hits: list[Hit], offset: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not hits:
        typer.echo("nothing found; lower --threshold or remove filters")
        return
    table = Table("", "score", "id", "modality", "caption", box=box.SIMPLE)
    for rank, hit in enumerate(hits, offset + 1):
        caption = hit.caption if len(hit.caption) <= CAPTION_SHOWN else f"{hit.caption[: CAPTION_SHOWN - 1]}…"
        name = f"{hit.id} (and {hit.folded} equal)" if hit.folded else hit.id
        table.add_row(str(rank), f"{hit.score:.3f}", name, hit.modality, caption)
    Console().print(table)
