"""Thumbnails, and a contact sheet of sample images with their texts as one PNG."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from fuselip_core.files import atomic_write
from fuselip_core.images import UnreadableImage, decode

CELL, TEXT_LINES, COLUMNS, MARGIN = 200, 4, 6, 12
FONT, FONT_SIZE, LINE = "DejaVuSans.ttf", 12, 16
HEADING, HEADING_SIZE = 38, 16
INK, PAPER, FRAME = "#1f2933", "#ffffff", "#000000"
LETTERS_A_LINE = 29


def thumbnail(data: bytes | None, side: int = CELL) -> Image.Image | None:
    """A small RGB copy; None if the bytes cannot be decoded."""
    try:
        image = decode(data or b"")
    except UnreadableImage:
        return None
    image = image.convert("RGB")
    image.thumbnail((side, side))
    return image


def write_sheet(path: Path, parts: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, bytes]]]) -> None:
    """Writes one PNG with the pairs of each split, one cell a pair, with its pictures and text.

    parts: split → (pairs, bytes of their pictures by id).
    """
    shown = {
        split: [(pair, pictures) for pair in pairs if pair["query_image"] or pair["target_image"]]
        for split, (pairs, pictures) in parts.items()
    }
    row = CELL + TEXT_LINES * LINE + 2 * MARGIN
    heights = [HEADING + -(-len(cells) // COLUMNS) * row for cells in shown.values()]
    sheet = Image.new("RGB", (COLUMNS * (CELL + MARGIN) + MARGIN, sum(heights) + MARGIN), PAPER)
    pen, top = ImageDraw.Draw(sheet), 0
    for (split, cells), height in zip(shown.items(), heights, strict=True):
        pen.text((MARGIN, top + MARGIN), split, fill=INK, font=_font(HEADING_SIZE))
        for number, (pair, pictures) in enumerate(cells):
            left = MARGIN + (number % COLUMNS) * (CELL + MARGIN)
            _draw_cell(sheet, pen, left, top + HEADING + number // COLUMNS * row, pair, pictures)
        top += height
    with atomic_write(path) as partial:
        sheet.save(partial, "PNG", optimize=True)


def _draw_cell(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    left: int,
    top: int,
    pair: Mapping[str, Any],
    pictures: Mapping[str, bytes],
) -> None:
    """Draws a pair: its picture, or those of query and target side by side, and its text below."""
    pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=FRAME)
    names = [pair[side] for side in ("query_image", "target_image") if pair[side]]
    width = CELL // len(names)
    for number, name in enumerate(names):
        if small := thumbnail(pictures.get(name), width - (len(names) > 1)):
            start = left + number * width
            sheet.paste(small, (start + (width - small.width) // 2, top + (CELL - small.height) // 2))
    lines = textwrap.wrap(text_of(pair), LETTERS_A_LINE, max_lines=TEXT_LINES, placeholder=" …")
    for line, words in enumerate(lines):
        pen.text((left, top + CELL + 6 + line * LINE), words, fill=INK, font=_font(FONT_SIZE))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans from the system or from matplotlib, for many scripts; otherwise Pillow's own font."""
    matplotlib = importlib.util.find_spec("matplotlib")
    folder = Path(matplotlib.origin or "").parent / "mpl-data" / "fonts" / "ttf" if matplotlib else Path()
    for path in (FONT, str(folder / FONT)):
        with contextlib.suppress(OSError):
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def text_of(pair: Mapping[str, Any]) -> str:
    """Both texts of a pair in one line."""
    return " → ".join(text for text in (pair["query_text"], pair["target_text"]) if text)
