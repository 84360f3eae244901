"""What a user searches with: words, a picture in a file, or a DICOM file."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from fuselip_core.data.dicom.picture import decode_dicom, is_dicom
from fuselip_core.errors import FuselipError
from fuselip_core.images import MOST_MEGAPIXELS, decode


def require(text: str | None, has_picture: bool) -> None:
    """Raises FuselipError for a query without words and picture, and for words without a letter or digit."""
    if text is None and not has_picture:
        raise FuselipError("the query has neither words nor a picture; give one of them, or both")
    if text is not None and not any(map(str.isalnum, text)):
        raise FuselipError("the words of the query have no letter and no digit; write what the picture should show")


def picture_of(path: Path) -> Image.Image:
    """The picture in a file, decoded by the rules of `images`; of DICOM the middle frame. Raises FuselipError."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FuselipError(f"there is no picture {path}; name the file of one") from error
    return decode_dicom(data, MOST_MEGAPIXELS) if is_dicom(data) else decode(data)
