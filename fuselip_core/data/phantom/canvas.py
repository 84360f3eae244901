"""A grey image, and shapes to blend into it.

Coordinates: x to the right, y down; the shorter image side is -1 to 1 before the patient's pose (shift, turn, scale).

Grey values are computed only from integers of a seeded PCG64 by additions, multiplications, divisions and square roots,
which IEEE 754 defines to the last bit, without exp, sin or matrix products. The same seed therefore gives the same
bytes on every machine.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Box = tuple[slice, slice]

RIGHT, LEFT = -1, 1  # sides of the patient, as signs of x in the image


class Canvas:
    """Grey values (height, width) float32 in 0..255, and methods that blend shapes into them."""

    def __init__(self, width: int, height: int, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pixels: Field = np.zeros((height, width), np.float32)
        self.scale = min(width, height) / 2 * rng.uniform(0.93, 1.0)
        turn = rng.uniform(-0.035, 0.035)  # tangent of half the angle: cosine and sine without trigonometry
        self.cosine = (1 - turn * turn) / (1 + turn * turn)
        self.sine = 2 * turn / (1 + turn * turn)
        self.centre = (width / 2 + rng.uniform(-0.04, 0.04) * width, height / 2 + rng.uniform(-0.03, 0.03) * height)
        self.columns: Field = ((np.arange(width) + 0.5 - self.centre[0]) / self.scale).astype(np.float32)[None, :]
        self.rows: Field = ((np.arange(height) + 0.5 - self.centre[1]) / self.scale).astype(np.float32)[:, None]
        self.coarse = self.smooth_noise(7)
        self.fine = self.smooth_noise(30)

    def smooth_noise(self, cells: int) -> Field:
        """Values in -1..1, interpolated linearly in a random lattice with `cells` cells along the longer side."""
        height, width = self.pixels.shape
        step = max(height, width) / cells
        lattice = self.rng.integers(-128, 129, (int(height / step) + 2, int(width / step) + 2)).astype(np.float32) / 128
        row, column = np.arange(height) / step, np.arange(width) / step
        top, left = row.astype(np.int64), column.astype(np.int64)
        down, right = (row - top).astype(np.float32)[:, None], (column - left).astype(np.float32)[None, :]
        lines = lattice[top] + (lattice[top + 1] - lattice[top]) * down
        start = lines[:, left]
        field: Field = start + (lines[:, left + 1] - start) * right
        return field

    def wobble(self, value: float, share: float = 0.07) -> float:
        """`value`, randomly up to `share` larger or smaller."""
        return value * self.rng.uniform(1 - share, 1 + share)

    def _box(self, x: float, y: float, reach: float) -> Box:
        """Pixels that a shape around (x, y) with the given reach can touch."""
        column = (self.cosine * x - self.sine * y) * self.scale + self.centre[0]
        row = (self.sine * x + self.cosine * y) * self.scale + self.centre[1]
        radius = reach * self.scale + 2
        height, width = self.pixels.shape
        return (
            slice(min(max(int(row - radius), 0), height), min(max(int(row + radius) + 1, 0), height)),
            slice(min(max(int(column - radius), 0), width), min(max(int(column + radius) + 1, 0), width)),
        )

    def _place(
        self, x: float, y: float, reach: float, turn: float, rx: float = 1.0, ry: float = 1.0
    ) -> tuple[Box, Field, Field]:
        """Pixels around a shape, and their coordinates in its own frame in multiples of `rx` and `ry`."""
        box = self._box(x, y, reach)
        turn_cosine, turn_sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
        cosine = turn_cosine * self.cosine - turn_sine * self.sine
        sine = turn_cosine * self.sine + turn_sine * self.cosine
        rows, columns = self.rows[box[0]], self.columns[:, box[1]]
        across = columns * (cosine / rx) + (rows * (sine / rx) - (turn_cosine * x + turn_sine * y) / rx)
        down = columns * (-sine / ry) + (rows * (cosine / ry) - (turn_cosine * y - turn_sine * x) / ry)
        return box, across, down

    def _blend(self, box: Box, cover: Field, value: float, texture: float, fine: float, add: bool) -> None:
        target: Field | float = value
        if texture:
            target = target + self.coarse[box] * texture
        if fine:
            target = target + self.fine[box] * fine
        pixels = self.pixels[box]
        cover *= target if add else target - pixels
        pixels += cover

    def ellipse(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        value: float,
        *,
        turn: float = 0.0,
        opacity: float = 1.0,
        soft: float = 1.0,
        texture: float = 0.0,
        fine: float = 0.0,
        add: bool = False,
    ) -> None:
        """Fills an ellipse. soft: width of its edge in pixels. add: add `value`, like overlapping tissue in X-rays."""
        box, across, down = self._place(x, y, max(rx, ry), turn, rx, ry)
        distance = np.square(across, out=across)
        distance += np.square(down, out=down)
        slope = min(rx, ry) * self.scale / (2 * soft)
        distance *= -slope
        distance += slope + 0.5
        self._blend(box, _cover(distance, opacity), value, texture, fine, add)

    def ring(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        thickness: float,
        value: float,
        *,
        opacity: float = 1.0,
        add: bool = False,
        half: str = "",
        turn: float = 0.0,
    ) -> None:
        """Draws the outline of an ellipse, or its upper or lower half."""
        box, across, down = self._place(x, y, max(rx, ry) + thickness, turn, rx, ry)
        away = np.abs(np.sqrt(np.square(across) + np.square(down)) - 1)
        away *= -self.scale * (rx + ry) / 2
        away += self.scale * thickness / 2 + 0.5
        cover = _cover(away, opacity)
        if half:
            cover *= (down < 0) if half == "upper" else (down > 0)
        self._blend(box, cover, value, 0.0, 0.0, add)

    def bar(
        self,
        x: float,
        y: float,
        rx: float,
        ry: float,
        value: float,
        *,
        turn: float = 0.0,
        opacity: float = 1.0,
        fine: float = 0.0,
        add: bool = False,
    ) -> None:
        """Fills a rectangle with half sides `rx` and `ry`."""
        box, across, down = self._place(x, y, rx + ry, turn)
        inside = np.minimum(rx - np.abs(across), ry - np.abs(down))
        inside *= self.scale
        inside += 0.5
        self._blend(box, _cover(inside, opacity), value, 0.0, fine, add)

    def both(self, draw: Callable[..., None], x: float, *rest: float, turn: float = 0.0, **options: object) -> None:
        """Draws a shape on both sides of the midline, mirrored."""
        for side in (RIGHT, LEFT):
            draw(side * x, *rest, turn=-side * turn, **options)

    def grain(self, amplitude: int) -> None:
        """Adds triangular noise of at most twice `amplitude`."""
        drawn = self.rng.integers(-amplitude, amplitude + 1, (2, *self.pixels.shape), dtype=np.int16)
        drawn[0] += drawn[1]
        self.pixels += drawn[0]

    def grey(self) -> NDArray[np.uint8]:
        """The picture (height, width) uint8, with random contrast and brightness."""
        gain, offset = self.rng.uniform(0.9, 1.06), self.rng.uniform(-4, 8)
        return np.clip(self.pixels * np.float32(gain) + np.float32(offset), 0, 255).astype(np.uint8)


def _cover(inside: Field, opacity: float) -> Field:
    """Coverage of each pixel, computed in place. inside: its distance from the edge plus one half, in pixels."""
    np.minimum(inside, 1, out=inside)
    np.maximum(inside, 0, out=inside)
    if opacity != 1:
        inside *= opacity
    return inside
