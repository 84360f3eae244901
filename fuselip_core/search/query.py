"""What a user searches with: words, a picture in a file, or a DICOM file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image

from fuselip_core.data.dicom.file import discreet, read_dataset
from fuselip_core.data.dicom.pixels import render
from fuselip_core.errors import FuselipError
from fuselip_core.images import MOST_MEGAPIXELS, UnreadableImage, decode
from fuselip_core.search.inputs import is_dicom


def require(text: str | None, has_picture: bool) -> None:
    """Raises FuselipError for a query without a picture whose text is missing or has neither letter nor digit."""
    if text is None and not has_picture:
        raise FuselipError("the query has neither words nor a picture; give one of them, or both")
    if text is not None and not any(map(str.isalnum, text)):
        raise FuselipError("the words of the query have no letter and no digit; write what the picture should show")


def picture_of(path: Path) -> Image.Image:
    """The picture in a file, decoded by the rules of `images`; of DICOM the middle frame. Raises FuselipError."""
    try:
        return picture_of_bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise FuselipError(f"there is no picture {path}; name another file") from error
    except IsADirectoryError as error:
        raise FuselipError(f"{path} is a folder; name a picture in it") from error


def picture_of_bytes(data: bytes) -> Image.Image:
    """The same for the bytes of a file; raises UnreadableImage, which quotes nothing of a DICOM file."""
    if not is_dicom(data):
        return decode(data)
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file, discreet():  # a codec may need a file to read
        file.write(data)
        file.flush()
        dataset = read_dataset(Path(file.name))
        try:
            if "Rows" not in dataset:
                raise UnreadableImage("no_pixels", "a DICOM file without a picture", "give an image")
            frame = int(dataset.get("NumberOfFrames") or 1) // 2
            return Image.fromarray(render(dataset, frame, None, MOST_MEGAPIXELS))
        except UnreadableImage:
            raise
        except Exception as error:  # values that contradict their types
            raise UnreadableImage("damaged_header", type(error).__name__) from None
