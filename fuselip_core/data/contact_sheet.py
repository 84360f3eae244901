"""Pictures to look at: thumbnails, and a sheet of samples with their texts as one PNG."""

from __future__ import annotations

import base64
import contextlib
import functools
import importlib.util
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fuselip_core.data.images import UnreadableImage, decode
from fuselip_core.files import atomic_write

CELL, TEXT_LINES, COLUMNS, MARGIN = 200, 4, 6, 12
FONT, FONT_SIZE, LINE = "DejaVuSans.ttf", 12, 16
INK, PAPER, FRAME = "#1f2933", "#ffffff", "#000000"
LETTERS_A_LINE = 29


def thumbnail(data: bytes | None, side: int = CELL) -> Image.Image | None:
    """A small RGB copy; None where there is nothing to show."""
    try:
        image = decode(data or b"", max_megapixels=1e4)
    except UnreadableImage:
        return None
    image = image.convert("RGB")
    image.thumbnail((side, side))
    return image


def data_uri(image: Image.Image) -> str:
    """The image as a data: address, so that a page needs no file beside it."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def write_sheet(path: Path, pairs: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> None:
    """One PNG with a cell a pair: its picture (of the query, else of the target) and its text."""
    shown = [pair for pair in pairs if pair["query_image"] or pair["target_image"]]
    height = CELL + TEXT_LINES * LINE + 2 * MARGIN
    rows = max(1, -(-len(shown) // COLUMNS))
    sheet = Image.new("RGB", (COLUMNS * (CELL + MARGIN) + MARGIN, rows * height + MARGIN), PAPER)
    font = _font()
    pen = ImageDraw.Draw(sheet)
    for number, pair in enumerate(shown):
        left = MARGIN + (number % COLUMNS) * (CELL + MARGIN)
        top = MARGIN + (number // COLUMNS) * height
        pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=FRAME)
        if small := thumbnail(pictures.get(pair["query_image"] or pair["target_image"])):
            sheet.paste(small, (left + (CELL - small.width) // 2, top + (CELL - small.height) // 2))
        lines = textwrap.wrap(text_of(pair), LETTERS_A_LINE, max_lines=TEXT_LINES, placeholder=" …")
        for line, words in enumerate(lines):
            pen.text((left, top + CELL + 6 + line * LINE), words, fill=INK, font=font)
    with atomic_write(path) as partial:
        sheet.save(partial, "PNG", optimize=True)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, of the system or of matplotlib, for letters of many scripts; else the few of Pillow's own font."""
    matplotlib = importlib.util.find_spec("matplotlib")
    folder = Path(matplotlib.origin or "").parent / "mpl-data" / "fonts" / "ttf" if matplotlib else Path()
    for path in (FONT, str(folder / FONT)):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(path, FONT_SIZE)
    return ImageFont.load_default(FONT_SIZE)


def text_of(pair: Mapping[str, Any]) -> str:
    """Both texts of a pair in one line."""
    return " → ".join(text for text in (pair["query_text"], pair["target_text"]) if text)
