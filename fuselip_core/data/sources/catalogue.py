"""Name → adapter, for all data sets. An adapter takes the folder of a data set and returns a Listing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from fuselip_core.config import PrepareSettings
from fuselip_core.data.pair import DataError, Listing
from fuselip_core.data.sources.conceptual_captions import list_web_captions, list_web_questions
from fuselip_core.data.sources.evaluation_sets import list_imagenet, list_open_images, list_sugarcrepe, list_tgit
from fuselip_core.data.sources.folder import list_folder
from fuselip_core.data.sources.hq_edit import list_hq_edit
from fuselip_core.data.sources.mmeb import list_mmeb
from fuselip_core.data.sources.rocov2 import list_rocov2
from fuselip_core.data.sources.slake import list_slake
from fuselip_core.data.sources.visual_genome import list_visual_genome
from fuselip_core.data.sources.vqa_rad import list_vqa_rad


def list_phantom(root: Path) -> Listing:
    """The embedded sample: ROCOv2's layout, and questions."""
    if not root.is_dir() or not any(root.iterdir()):
        raise DataError(f"{root} has no sample; draw one with `fuselip sample --out {root}`, or run `make demo`")
    return list_rocov2(root)


def list_dicom_folder(root: Path, settings: PrepareSettings) -> Listing:
    """A tree of DICOM files; needs the extra `download`."""
    from fuselip_core.data.dicom.listing import list_dicom, settings_for

    return list_dicom(root, settings_for(root, settings))


SOURCES: Mapping[str, Callable[[Path], Listing]] = {
    "phantom": list_phantom,
    "rocov2": list_rocov2,
    "folder": list_folder,
    "vqa-rad": list_vqa_rad,
    "slake": list_slake,
    "cc3m": list_web_captions,
    "cc12m": list_web_captions,
    "cc3m-vqa": list_web_questions,
    "cc12m-vqa": list_web_questions,
    "hq-edit": list_hq_edit,
    "visual-genome": list_visual_genome,
    "open-images": list_open_images,
    "sugarcrepe": list_sugarcrepe,
    "imagenet": list_imagenet,
    "mmeb-eval": list_mmeb,
    "tgit": list_tgit,
}
# Adapters with their own settings.
SOURCES_WITH_SETTINGS: Mapping[str, Callable[[Path, PrepareSettings], Listing]] = {"dicom": list_dicom_folder}


def source_names() -> tuple[str, ...]:
    """The names that `list_source` accepts."""
    return (*SOURCES, *SOURCES_WITH_SETTINGS)


def list_source(name: str, root: Path, settings: PrepareSettings | None = None) -> Listing:
    """The listing of a data set; raises DataError for an unknown name or a folder with another data set."""
    if name not in source_names():
        raise DataError(f"unknown source '{name}'; use one of {', '.join(source_names())}")
    if name in SOURCES_WITH_SETTINGS:
        listing = SOURCES_WITH_SETTINGS[name](root, settings or PrepareSettings())
    else:
        with published_form(name, root):
            listing = SOURCES[name](root)
    if not listing.images:
        raise DataError(f"{root} has no image in the layout of {name}; compare it with the published layout")
    return listing


@contextlib.contextmanager
def published_form(name: str, root: Path) -> Iterator[None]:
    """Turns errors while reading tables into a sentence: they differ from the published form (--debug shows where)."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise DataError(
            f"{root} has tables that differ from the published form of {name} ({type(error).__name__}); compare them "
            "with the published files"
        ) from error
