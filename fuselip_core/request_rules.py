"""What a request may contain: the same rules for the server, its page and the registered model.

A row is an image, a text or both. Errors name the row and the fault but never quote the request, which may be about a
patient.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

from PIL import Image

from fuselip_core.errors import FuselipError
from fuselip_core.images import MOST_MEGAPIXELS, UnreadableImage, decode

# The text tokenizer is quadratic in the length of a word: a word of this length takes 1.3 s.
MOST_CHARACTERS = 2_000


class Refusal(FuselipError):
    """A request that is invalid."""


class UnreadablePicture(Refusal):
    """An image that cannot be decoded."""


def read_row(
    row: int, image: object, text: object, max_megapixels: float = MOST_MEGAPIXELS
) -> tuple[Image.Image | None, str | None]:
    """Picture and text of a row. `image` is a file's bytes, base64 or a data URI; None and white space count as absent.

    Raises Refusal for an empty row, a wrong type or an unreadable image.
    """
    for name, value, kinds in (("image", image, (str, bytes)), ("text", text, (str,))):
        if value is not None and not isinstance(value, kinds):
            raise Refusal(f"row {row}: {name} is not a string")
    image = None if isinstance(image, str | bytes) and not image.strip() else image
    text = None if isinstance(text, str) and not text.strip() else text
    if image is None and text is None:
        raise Refusal(f"row {row} has neither image nor text; give at least one of them")
    if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Refusal(f"row {row}: the text is not valid Unicode")
    picture = None
    if image is not None:
        data = image if isinstance(image, bytes) else _from_base64(image, row)
        picture = read_picture(data, f"row {row}: image", max_megapixels)
    return picture, text if isinstance(text, str) else None


def read_picture(data: bytes, name: str, max_megapixels: float = MOST_MEGAPIXELS) -> Image.Image:
    """As `decode_any`, but raises a Refusal that calls the image `name` and quotes nothing of it."""
    try:
        return decode_any(data, max_megapixels)
    except UnreadableImage as error:
        raise UnreadablePicture(f"{name} can't be read ({error.reason.replace('_', ' ')})") from None


def decode_any(data: bytes, max_megapixels: float = MOST_MEGAPIXELS) -> Image.Image:
    """The picture in the bytes of an image file, or the middle frame of a DICOM file; raises UnreadableImage."""
    if data[128:132] == b"DICM":
        from fuselip_core.data.dicom.picture import decode_dicom  # loads pydicom

        return decode_dicom(data, max_megapixels)
    return decode(data, max_megapixels)


def _from_base64(encoded: Any, row: int) -> bytes:
    try:
        return base64.b64decode(encoded.rpartition("base64,")[2], validate=True)
    except (ValueError, binascii.Error):
        raise UnreadablePicture(f"row {row}: image is not base64 of an image file") from None


def fit_text(tokenizer: Any, row: int, text: str, truncate: bool) -> str:
    """`text`, shortened if `truncate` is set; otherwise raises Refusal for a text that is too long for the model."""
    if truncate:
        return text[:MOST_CHARACTERS]
    most = tokenizer.context_length - 2  # start and end token
    remedy = "shorten it, or set truncate to true to have it cut"
    if len(text) > MOST_CHARACTERS:
        raise Refusal(f"row {row}: the text has more than {MOST_CHARACTERS} characters; {remedy}")
    if (count := len(tokenizer.encode(text))) > most:
        raise Refusal(f"row {row}: the text has {count} tokens and the model reads {most}; {remedy}")
    return text
