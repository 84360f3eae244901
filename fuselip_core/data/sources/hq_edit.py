"""HQ-Edit (`UCSC-VLAA/HQ-Edit`): pictures edited by instruction, as Parquet files with both images in a row.

Columns: input_image, output_image ({bytes, path}), edit, inverse_edit, input, output (descriptions of the pictures). A
row gives three pairs of the kind "edit", as in the published training (FuseLIP, arXiv 2506.03096):

    (input, edit) → output · (output, inverse edit) → input      one group, hard negatives of each other
    (input, edit) → output with its description                  its own group
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselip_core.data.pair import (
    DataError,
    ImageEntry,
    Listing,
    Pair,
    SetAside,
    Side,
    one_line,
    require_columns,
    require_folder,
    split_of_path,
)
from fuselip_core.data.places import Place
from fuselip_core.data.table_reader import columns_of, read_table
from fuselip_core.data.walk import files_below

TEXTS = ("edit", "inverse_edit", "output")
IMAGES = ("input_image", "output_image")


def list_hq_edit(root: Path) -> Listing:
    """All rows of the Parquet files below `root`; raises DataError if there are none or they lack a column."""
    require_folder(root, "HQ-Edit")
    files = files_below(root, (".parquet",))
    if not files:
        raise DataError(f"{root} has no Parquet files; download them with `fuselip data download hq-edit`")
    listing = Listing()
    for path in files:
        require_columns(columns_of(path), IMAGES, path)
        for row, values in enumerate(read_table(path, TEXTS)):
            _list_row(path, row, values, listing)
    return listing


def _list_row(path: Path, row: int, values: Mapping[str, Any], listing: Listing) -> None:
    name, split = f"{path.stem}/{row}", split_of_path(Path(path.name))
    edit, inverse, description = (one_line(values[column] or "") for column in TEXTS)
    before, after = (
        ImageEntry(f"{name}/{column.split('_')[0]}", split, name, Place(path, row=row, column=column))
        for column in IMAGES
    )
    listing.images.extend((before, after))
    forward, backward = Side(before.image_id, edit), Side(after.image_id, inverse)
    if edit:
        listing.pairs.append(_pair(name, "edit", split, name, forward, Side(after.image_id)))
    if inverse:
        listing.pairs.append(_pair(name, "inverse", split, name, backward, Side(before.image_id)))
    if edit and description:
        described = Side(after.image_id, description)
        listing.pairs.append(_pair(name, "described", split, f"{name}/described", forward, described))
    if not (edit and inverse):
        listing.set_aside.append(SetAside(name, split, "empty_instruction", "edit or inverse edit"))


def _pair(name: str, part: str, split: str, group: str, query: Side, target: Side) -> Pair:
    return Pair(f"{name}/{part}", split, "edit", group, name, query, target)
