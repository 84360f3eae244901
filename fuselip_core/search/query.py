"""Checks a query and reads its picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fuselip_core.errors import FuselipError
from fuselip_core.request_rules import decode_any


def require(text: str | None, has_picture: bool) -> None:
    """Raises FuselipError for a query without words and picture, and for words without a letter or digit."""
    if text is None and not has_picture:
        raise FuselipError("the query has neither words nor a picture; give one of them, or both")
    if text is not None and not any(map(str.isalnum, text)):
        raise FuselipError("the words of the query have no letter and no digit; write what the picture should show")


def picture_of(path: Path) -> Image.Image:
    """The picture in an image file, or the middle frame of a DICOM file; raises FuselipError."""
    try:
        return decode_any(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FuselipError(f"there is no file {path}; give the path of a picture") from error
