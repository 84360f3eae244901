"""Name → adapter: the only place that lists data sets. An adapter takes the data set's folder and returns a Listing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fuselip_core.config import PrepareSettings
from fuselip_core.data.captions import list_rocov2
from fuselip_core.data.pair import DataError, Listing
from fuselip_core.data.vqa import add_questions, list_vqa_rad


def list_phantom(root: Path) -> Listing:
    """The embedded sample: ROCOv2's layout, and questions."""
    if not root.is_dir() or not any(root.iterdir()):
        raise DataError(f"no sample in {root}; draw it with `fuselip sample --out {root}`, or run `make demo`")
    listing = list_rocov2(root)
    add_questions(root, listing)
    return listing


SOURCES: Mapping[str, Callable[[Path], Listing]] = {
    "phantom": list_phantom,
    "rocov2": list_rocov2,
    "vqa-rad": list_vqa_rad,
}


def list_source(name: str, root: Path, settings: PrepareSettings | None = None) -> Listing:
    """All of a data set but its pixels; raises DataError for an unknown name or a folder that is not that data set."""
    if name not in SOURCES:
        raise DataError(f"unknown source '{name}'; there are: {', '.join(SOURCES)}")
    listing = SOURCES[name](root)
    if not listing.images:
        raise DataError(f"{root} holds no image with a text that could be read as {name}; see the published layout")
    return listing
