"""HTML from Jinja templates, and pictures as data URIs."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import jinja2
from PIL import Image

PICTURE_SIZE = 320  # pixels of the longer side


def render(template: Path, **values: object) -> str:
    """Fills a Jinja template with `values`, escaped; missing values are errors. It may include files of its folder."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


def data_uri(data: bytes, kind: str) -> str:
    """The data URI of an image file of `kind` (png, jpeg, ...)."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def picture_uri(image: Image.Image) -> str:
    """The data URI of a small JPEG of the picture."""
    small = image.convert("L" if image.mode in ("L", "1", "LA") else "RGB")
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    return data_uri(stream.getvalue(), "jpeg")
