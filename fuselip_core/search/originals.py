"""Notes in the index where an original picture is stored, and reads it from there."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fuselip_core.data.pair import DataError
from fuselip_core.data.places import Place
from fuselip_core.data.prepare.image_reader import ImageReader
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.images import UnreadableImage


def note_place(image: object) -> str:
    """A place as text; empty if it cannot be read later, or if it may name a person (DICOM)."""
    if type(image) is not Place:
        return ""
    return json.dumps(asdict(image) | {"file": str(image.file.absolute())})


def note_prepared(folder: Path, split: str, row: int) -> str:
    """Row `row` of a split of prepared data, as text."""
    return json.dumps({"prepared": str(folder.absolute()), "split": split, "row": row})


def read_original(noted: str, sha256: str) -> bytes | None:
    """The bytes of a picture; None if it is gone or no longer has the same SHA-256."""
    try:
        data = _read(json.loads(noted)) if noted else b""
    except (UnreadableImage, DataError, OSError):
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _read(place: dict[str, Any]) -> bytes:
    if "prepared" in place:
        batches = PreparedData(Path(place["prepared"])).iter_images(place["split"], ["bytes"], 1, place["row"])
        return next((bytes(batch["bytes"][0].as_py()) for batch in batches), b"")
    span = place["span"] and tuple(place["span"])
    with ImageReader() as reader:
        return reader.read(Place(**place | {"file": Path(place["file"]), "span": span}))
