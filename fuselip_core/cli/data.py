"""The commands of `fuselip data`: download, prepare, inspect and compare data sets."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fuselip_core import config
from fuselip_core.errors import FuselipError

app = typer.Typer(help="Data sets: download, prepare, inspect, diff.", no_args_is_help=True)
NAMES_SHOWN = 10

Folder = Annotated[Path, typer.Argument(help="Prepared data: a folder with manifest.json.")]


def _at_a_terminal() -> bool:
    return sys.stdout.isatty()


def _show(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2 if _at_a_terminal() else None, ensure_ascii=False, default=str))


def _show_counts(found: dict[str, Any]) -> None:
    """Prints a row for each split, and what was set aside."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    kinds = sorted({kind for part in found["counts"].values() for kind in part["pairs"]})
    table = Table("split", box=box.SIMPLE)
    for name in ("images", "cases", *(f"{kind} pairs" for kind in kinds)):
        table.add_column(name, justify="right")
    for split, part in found["counts"].items():
        numbers = [part["images"], part["cases"], *(part["pairs"].get(kind, 0) for kind in kinds)]
        table.add_row(split, *(f"{number:,}" for number in numbers))
    Console().print(table)
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in found["quarantine"].items())
    typer.echo(f"set aside: {reasons or 'nothing'}")


@app.command()
def download(
    source: Annotated[str, typer.Argument(help="Name of a data set, hub:OWNER/NAME, zenodo:RECORD, or a URL.")],
    out: Annotated[Path | None, typer.Option(help="Folder; default: ./<name of the source>.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a Hub data set.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Glob of files to fetch; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Glob of files to leave out; repeatable.")] = None,
    connections: Annotated[int, typer.Option(min=1, max=32, help="Files fetched at once.")] = 4,
    verify: Annotated[bool, typer.Option("--verify", help="Verify the checksums of existing files.")] = False,
    refresh: Annotated[bool, typer.Option("--refresh", help="Ask the host for a newer version.")] = False,
) -> None:
    """Download a data set; resumes after an interruption."""
    from fuselip_core.data.download.download import DownloadSettings
    from fuselip_core.data.download.download import download as fetch
    from fuselip_core.data.download.hosts import folder_name_of

    settings = DownloadSettings(
        revision=revision,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        connections=connections,
        verify="full" if verify else "quick",
        refresh=refresh,
    )
    target = out or Path(folder_name_of(source))
    manifest = fetch(source, target, settings)
    _show({"folder": target, "files": len(manifest.files), "bytes": manifest.size, "licence": manifest.licence})


@app.command()
def prepare(
    source: Annotated[str, typer.Option(help="Kind of data set; `fuselip data sources` lists them.")],
    root: Annotated[Path, typer.Option(help="Folder of the raw data set.")],
    out: Annotated[Path, typer.Option(help="Folder of the prepared data.")] = Path("artifacts/prepared"),
    text: Annotated[Path | None, typer.Option(help="Table of texts, for DICOM folders.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Another field of the section `prepare`; repeatable."),
    ] = None,
) -> None:
    """Turn a raw data set into checked Parquet shards and a manifest."""
    from fuselip_core.data.prepare.prepare import prepare_data

    # Fields are also accepted with their section, as everywhere else.
    fields = config.parse_overrides([f"prepare.{override.removeprefix('prepare.')}" for override in overrides or ()])
    given: dict[str, Any] = {"source": source, "root": root}
    if text is not None:
        given["dicom"] = {"text": text}
    settings = config.check_settings(config.merge(fields, {"prepare": given}), origin="fuselip data prepare")
    manifest = prepare_data(settings.prepare, out)
    found = {"folder": out, **{key: manifest[key] for key in ("counts", "quarantine", "duplicates", "notes")}}
    if not _at_a_terminal():
        _show(found)
        return
    _show_counts(found)
    for note in manifest["notes"]:
        typer.echo(f"- {note}")
    typer.echo(f"prepared: {out}")


@app.command()
def sources() -> None:
    """List the kinds of data sets that can be prepared, and the names that can be downloaded."""
    from fuselip_core.data.download.hosts import origins
    from fuselip_core.data.sources.catalogue import source_names

    _show({"prepare": source_names(), "download": {name: origin.note for name, origin in origins().items()}})


@app.command()
def find_files(
    root: Annotated[Path, typer.Argument(help="Folder of DICOM files.")],
    ids: Annotated[list[str], typer.Argument(help="Names such as file-0a1b2c..., from quarantine.jsonl.")],
    key_file: Annotated[Path | None, typer.Option(help="Key of the pseudonyms; default: the user's own.")] = None,
) -> None:
    """Find DICOM files that were set aside by their pseudonyms; needs the key of these."""
    from fuselip_core.data.dicom import listing

    dicom = config.DicomSettings() if key_file is None else config.DicomSettings(key_file=key_file)
    found = listing.find_files(root, set(ids), listing.settings_for(root, config.PrepareSettings(dicom=dicom)))
    if missing := sorted(set(ids) - set(found)):
        raise FuselipError(
            f"no file below {root} has the pseudonym {missing[0]} with this key; give the prepared folder, and its "
            "key with --key-file"
        )
    _show(found)


@app.command()
def inspect(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder of the page; default: <folder>-inspection.")] = None,
    samples: Annotated[int, typer.Option(min=1, max=200, help="Pairs to show of each kind and split.")] = 12,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of pairs.")] = 0,
) -> None:
    """Write a page with counts, lengths, modalities and samples (index.html), and contact-sheet.png."""
    from fuselip_core.data.inspect.page import inspect_data

    found = inspect_data(folder, out or folder.with_name(f"{folder.name}-inspection"), samples, seed)
    if not _at_a_terminal():
        _show(found)
        return
    _show_counts(found)
    typer.echo(f"lengths, modalities and samples: {found['page']}")


@app.command()
def card(folder: Folder) -> None:
    """Print the data card: counts, modalities, licences, and what was set aside."""
    from fuselip_core.cards.data_card import data_card

    typer.echo(data_card(folder))


@app.command()
def diff(
    old: Folder,
    new: Folder,
    every: Annotated[bool, typer.Option("--all", help=f"List all rows, not only the first {NAMES_SHOWN}.")] = False,
) -> None:
    """List rows that were added, removed or changed; exits with 1 if there are any."""
    from fuselip_core.data.inspect.diff import differences

    found = differences(old, new)
    for part in found:
        for what in ("added", "removed", "changed"):
            names = getattr(part, what)
            shown = names if every else names[:NAMES_SHOWN]
            for name in shown:
                typer.echo(f"{what} {part.table} {part.split} {name}")
            if len(names) > len(shown):
                typer.echo(f"{what} {part.table} {part.split} … and {len(names) - len(shown):,} more (--all)")
    if found:
        raise typer.Exit(1)
    typer.echo("no row differs")
