"""Draws radiology-like pictures: four modalities of three body regions, with optional lesions.

As in radiology, the image's left is the patient's right. A unit of the canvas is 50 mm: a phantom is 100 mm wide, so
the smallest lesion (14 mm) takes 14 % of its width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fuselip_core.data.phantom.canvas import LEFT, RIGHT, Canvas

MILLIMETRES_A_UNIT = 50.0


@dataclass(frozen=True)
class Lesion:
    """side: RIGHT or LEFT of the patient; level: 0 upper, 1 middle, 2 lower third of the image; diameter in mm."""

    side: int
    level: int
    millimetres: int


@dataclass(frozen=True)
class Scene:
    """The content of a picture: everything that a caption may mention."""

    modality: str
    region: str
    finding: bool
    bright: bool
    lesions: tuple[Lesion, ...]

    @property
    def study(self) -> str:
        return f"{self.modality}-{self.region}"


def draw(scene: Scene, width: int, height: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of a scene, (height, width) uint8."""
    canvas = Canvas(width, height, rng)
    study = STUDIES[scene.study]
    study.anatomy(canvas, scene.finding)
    for lesion in scene.lesions:
        _draw_lesion(canvas, study, lesion, scene.bright)
    if scene.modality == "us":
        _speckle(canvas, linear=scene.region == "chest")
    canvas.grain(study.noise)
    return canvas.grey()


def _draw_lesion(canvas: Canvas, study: Study, lesion: Lesion, bright: bool) -> None:
    """Draws a slightly displaced, slightly oval blob with an edge of the opposite tone."""
    jitter = canvas.rng.uniform
    x = lesion.side * (study.middle_x if lesion.level == 1 else study.outer_x) + jitter(-0.03, 0.03)
    y = study.centre_y + (lesion.level - 1) * study.pitch + jitter(-0.02, 0.02)
    radius = lesion.millimetres / 2 / MILLIMETRES_A_UNIT * jitter(0.97, 1.05)
    oval, turn = jitter(0.9, 1.1), jitter(-0.5, 0.5)
    rx, ry = radius * oval, radius / oval
    if bright:
        canvas.ellipse(x, y, rx + 0.025, ry + 0.025, study.dark, turn=turn, soft=1.5, opacity=0.45)
        canvas.ellipse(x, y, rx, ry, study.bright, turn=turn, soft=1.5, fine=8)
    else:
        canvas.ellipse(x, y, rx + 0.03, ry + 0.03, study.rim, turn=turn, soft=1.5, opacity=0.7)
        canvas.ellipse(x, y, rx, ry, study.dark, turn=turn, soft=1.5, fine=4)


def _ct_head(c: Canvas, finding: bool) -> None:
    rx, ry = c.wobble(0.76), c.wobble(0.9, 0.05)
    c.ellipse(0, 0, rx + 0.06, ry + 0.05, 85, soft=2)
    c.ellipse(0, 0, rx, ry, 252)
    rx, ry = rx - 0.07, ry - 0.07
    c.ellipse(0, 0, rx, ry, 70)
    c.ellipse(0, 0, rx - 0.03, ry - 0.03, 122, fine=10)
    c.both(c.ellipse, 0.31, -0.02, rx * 0.36, ry * 0.72, 104, soft=5, texture=6)
    c.bar(0, -ry * 0.75, 0.008, ry * 0.22, 175, opacity=0.8)
    c.bar(0, ry * 0.75, 0.008, ry * 0.22, 175, opacity=0.8)
    wide = 2.3 if finding else 1.0
    c.both(c.ellipse, 0.07 * wide, -0.2, 0.045 * wide, 0.19 * (1 + (wide - 1) / 2), 32, turn=0.14)
    c.both(c.ellipse, 0.1 * wide, 0.2, 0.05 * wide, 0.2 * (1 + (wide - 1) / 3), 32, turn=-0.2)
    c.ellipse(0, 0.03, 0.02 * wide, 0.1, 40)


def _mr_head(c: Canvas, finding: bool) -> None:
    rx, ry = c.wobble(0.8), c.wobble(0.93, 0.04)
    c.ellipse(0, 0, rx, ry, 225, fine=20)
    c.ellipse(0, 0, rx - 0.06, ry - 0.06, 12)
    rx, ry = rx - 0.11, ry - 0.11
    c.ellipse(0, 0, rx, ry, 150, fine=75)
    c.both(c.ellipse, 0.29, 0, rx * 0.42, ry * 0.78, 108, soft=4, fine=18)
    c.both(c.ellipse, 0.2, 0.02, 0.09, 0.15, 150, turn=0.15, soft=3)
    c.bar(0, 0, 0.012, ry, 45, opacity=0.8)
    wide = 2.3 if finding else 1.0
    c.both(c.ellipse, 0.06 * wide, -0.2, 0.045 * wide, 0.2 * (1 + (wide - 1) / 2), 14, turn=0.14)
    c.both(c.ellipse, 0.09 * wide, 0.2, 0.045 * wide, 0.2 * (1 + (wide - 1) / 3), 14, turn=-0.2)
    c.bar(0, -0.02, 0.03, 0.03, 150)


def _xray_head(c: Canvas, finding: bool) -> None:
    rx, ry = c.wobble(0.72), c.wobble(0.76, 0.04)
    c.bar(0, 0.85, 0.36, 0.3, 70, opacity=0.9)
    c.ellipse(0, 0.42, rx * 0.78, 0.52, 95, soft=3)
    c.ellipse(0, -0.14, rx + 0.05, ry + 0.05, 70, soft=3)
    c.ellipse(0, -0.14, rx, ry, 118, soft=2, texture=8)
    thick = 0.17 if finding else 0.045
    c.ring(0, -0.14, rx - thick / 2, ry - thick / 2, thick, 95 if finding else 120, add=True)
    c.both(c.ellipse, 0.27, 0.2, 0.17, 0.14, -22, add=True, soft=2)
    c.both(c.ring, 0.27, 0.2, 0.18, 0.15, 0.03, 45, add=True)
    c.ellipse(0, 0.42, 0.09, 0.17, -45, add=True, soft=2)
    c.bar(0, 0.42, 0.012, 0.17, 50, add=True)
    c.both(c.ellipse, 0.27, 0.52, 0.13, 0.13, -28, add=True, soft=3)
    c.both(c.ring, 0, 0.4, rx * 0.74, 0.5, 0.07, 40, half="lower", add=True, opacity=0.6)
    for tooth in range(-3, 4):
        c.bar(tooth * 0.075, 0.73, 0.03, 0.06, 70, add=True)
    c.bar(0, -0.5, 0.006, 0.3, 14, add=True)


def _us_head(c: Canvas, finding: bool) -> None:
    c.pixels += 62 + c.coarse * 10
    c.ellipse(0, 0.1, 0.84, 0.84, 88, fine=24, texture=12, soft=3)
    c.ring(0, 0.1, 0.86, 0.88, 0.06, 215, opacity=0.9)
    for depth in (0.25, 0.45, 0.62):
        c.both(c.ring, 0.5, depth - 0.25, 0.26, 0.1, 0.025, 165, half="upper", opacity=0.7, turn=0.3)
    c.bar(0, -0.1, 0.012, 0.6, 190, opacity=0.8)
    wide = 2.2 if finding else 1.0
    c.both(c.ellipse, 0.1 * wide, -0.08, 0.085 * wide, 0.06 * wide, 6, turn=0.3)
    c.both(c.ellipse, 0.09 * wide, -0.02 + 0.02 * wide, 0.04, 0.03, 205, soft=2)
    c.ellipse(0, 0.12, 0.025 * wide, 0.08 * wide, 8)


def _ct_chest(c: Canvas, finding: bool) -> None:
    rx, ry = c.wobble(0.96, 0.03), c.wobble(0.84, 0.04)
    c.ring(0, 0.35, 1.3, 0.75, 0.03, 120, half="lower")
    c.ellipse(0, 0, rx, ry, 62, fine=8)
    c.ellipse(0, 0, rx - 0.07, ry - 0.06, 128, fine=10)
    c.both(c.ellipse, 0.47, 0, 0.35, ry - 0.19, 54, soft=1.5, fine=30)
    for side in (RIGHT, LEFT):
        for rib in range(-2, 3):
            turn = side * rib * 0.24
            c.bar(side * (rx - 0.1 - 0.05 * rib * rib), rib * 0.27, 0.025, 0.1, 240, turn=-turn)
    c.ellipse(0, -0.05, 0.17, 0.55, 128, fine=10)
    size = 1.55 if finding else 1.0
    c.ellipse(0.11, -0.15, 0.23 * size, 0.2 * size, 152, turn=0.25, soft=1.5)
    c.ellipse(0.13, 0.3, 0.075, 0.075, 185)
    c.both(c.ellipse, 0.08, 0.12, 0.05, 0.035, 20)
    c.ellipse(0, 0.52, 0.14, 0.12, 235, fine=15)
    c.bar(0, 0.68, 0.035, 0.1, 235)
    c.ellipse(0, 0.63, 0.05, 0.045, 110)


def _mr_chest(c: Canvas, finding: bool) -> None:
    c.bar(0, 1, c.wobble(0.8, 0.03), 1.45, 205, fine=12)
    c.ellipse(0, -0.5, 0.98, 0.42, 205, fine=12)
    c.bar(0, -1.3, 0.3, 0.55, 190)
    c.bar(0, 1, 0.74, 1.45, 105, fine=14)
    c.ellipse(0, -0.5, 0.9, 0.36, 105, fine=14)
    c.both(c.ellipse, 0.8, -0.5, 0.12, 0.15, 190, fine=14)
    c.both(c.ellipse, 0.4, -0.05, 0.33, 0.76, 58, soft=2, fine=14)
    c.ellipse(-0.3, 0.88, 0.52, 0.3, 138, texture=8)
    c.ellipse(0.45, 0.9, 0.3, 0.24, 150, texture=8)
    c.bar(0, 0, 0.09, 0.95, 125)
    size = 1.55 if finding else 1.0
    c.ellipse(0.12, 0.3, 0.22 * size, 0.26 * size, 170, turn=0.25, soft=2, fine=10)
    c.ellipse(0.12, 0.34, 0.1 * size, 0.14 * size, 78, turn=0.25, soft=2)
    c.ellipse(0.03, -0.22, 0.08, 0.2, 200, soft=2)
    c.bar(0, -0.68, 0.04, 0.35, 14)


def _xray_chest(c: Canvas, finding: bool) -> None:
    c.bar(0, 0.9, c.wobble(0.86, 0.03), 1.5, 128)
    c.ellipse(0, -0.48, 0.99, 0.4, 124, soft=3)
    c.bar(0, -1.3, 0.26, 0.6, 120)
    c.both(c.ellipse, 0.41, -0.06, 0.34, c.wobble(0.74, 0.04), 52, soft=2, fine=12)
    for rib in range(6):
        c.both(c.ring, 0.42, -0.38 + rib * 0.22, 0.4, 0.24, 0.05, 26, half="upper", add=True, turn=0.1)
    c.both(c.bar, 0.42, -0.73, 0.36, 0.03, 62, add=True, turn=0.07)
    c.both(c.ellipse, 0.17, 0.0, 0.1, 0.17, 40, add=True, soft=4, fine=20)
    c.bar(0, 0, 0.11, 2, 178)
    for vertebra in range(-7, 8):
        c.bar(0, vertebra * 0.19, 0.08, 0.075, 14, add=True)
    c.bar(0, -0.72, 0.03, 0.3, -40, add=True)
    size = 1.7 if finding else 1.0
    c.ellipse(0.13, 0.33, 0.21 * size, 0.25 * size, 168, turn=0.22, soft=2)
    c.ellipse(0.1, -0.3, 0.09, 0.09, 175, soft=2)
    c.ellipse(-0.42, 0.92, 0.48, 0.3, 186, soft=2)
    c.ellipse(0.46, 0.95, 0.42, 0.28, 178, soft=2)
    c.ellipse(0.42, 0.86, 0.12, 0.07, -60, add=True, soft=3)


def _us_chest(c: Canvas, finding: bool) -> None:
    c.pixels += 105 + c.coarse * 14
    for depth, value in ((-0.95, 150), (-0.86, 80), (-0.78, 165)):
        c.bar(0, depth, 1.4, 0.035, value, fine=25)
    c.both(c.ellipse, 0.9, -0.7, 0.16, 0.07, 225)
    c.bar(0, -0.62, 1.4, 0.03, 245)
    if finding:
        c.bar(0, -0.42, 1.4, 0.16, 5)
        c.bar(0, -0.25, 1.4, 0.02, 215)
    for line in range(4):
        c.bar(0, -0.1 + line * 0.34, 1.4, 0.018, 205 - 22 * line, opacity=0.7)
    c.both(c.bar, 0.98, 0.2, 0.12, 0.85, 22, opacity=0.85)


def _ct_abdomen(c: Canvas, finding: bool) -> None:
    rx, ry = c.wobble(0.96, 0.03), c.wobble(0.84, 0.04)
    c.ring(0, 0.35, 1.3, 0.75, 0.03, 120, half="lower")
    c.ellipse(0, 0, rx, ry, 34, fine=8)
    c.ellipse(0, 0, rx - 0.08, ry - 0.08, 132, fine=8)
    c.ellipse(0, 0, rx - 0.11, ry - 0.11, 98 if finding else 26, fine=3 if finding else 10)
    shrink = 0.86 if finding else 1.0
    c.ellipse(-0.38, -0.1, 0.42 * shrink, 0.54 * shrink, 146, turn=0.12, fine=9)
    c.ellipse(0.08, -0.36, 0.3 * shrink, 0.2 * shrink, 144, turn=0.1, fine=9)
    c.ellipse(0.44, -0.22, 0.27 * shrink, 0.27 * shrink, 118, turn=-0.15, fine=16)
    c.ellipse(0.5, 0.2, 0.2 * shrink, 0.32 * shrink, 158, turn=-0.1, fine=9)
    c.both(c.ellipse, 0.34, 0.36, 0.14, 0.17, 182, turn=0.2)
    c.both(c.ellipse, 0.29, 0.37, 0.05, 0.08, 118, turn=0.2)
    c.ellipse(0.06, 0.22, 0.07, 0.07, 192)
    c.ellipse(-0.07, 0.22, 0.07, 0.055, 165)
    c.ellipse(0, 0.44, 0.15, 0.13, 236, fine=15)
    c.bar(0, 0.61, 0.035, 0.1, 236)
    c.ellipse(0, 0.56, 0.05, 0.045, 110)
    c.both(c.ellipse, 0.22, 0.6, 0.15, 0.1, 138, turn=0.1)


def _mr_abdomen(c: Canvas, finding: bool) -> None:
    c.bar(0, 0, c.wobble(0.84, 0.03), 2, 215, fine=14)
    c.bar(0, 0, 0.73, 2, 60, fine=10)
    c.bar(0, 0.05, 0.68, 0.98, 190 if finding else 84, fine=4 if finding else 30)
    shrink = 0.84 if finding else 1.0
    c.ellipse(-0.33, -0.46, 0.4 * shrink, 0.4 * shrink, 92, turn=0.15, fine=10)
    c.ellipse(0.42, -0.5, 0.24 * shrink, 0.34 * shrink, 142, turn=-0.1, fine=10)
    c.both(c.ellipse, 0.38, 0.08, 0.17 * shrink, 0.26 * shrink, 165, turn=0.1, fine=12)
    for row, reach in ((0.4, 0.36), (0.58, 0.4), (0.76, 0.3)):
        for loop in (-1, 0, 1):
            c.ellipse(loop * reach, row, 0.17 * shrink, 0.085, 112, turn=c.rng.uniform(-0.2, 0.2), fine=30)
    c.bar(0, 0, 0.1, 2, 118)
    for vertebra in range(-7, 8):
        c.bar(0, vertebra * 0.2, 0.1, 0.03, 55)
    c.ellipse(0, 0.92, 0.26, 0.17, 235)


def _xray_abdomen(c: Canvas, finding: bool) -> None:
    c.bar(0, 0, c.wobble(0.9, 0.03), 2, 104)
    c.pixels += c.coarse * 7
    c.both(c.ellipse, 0.72, 0.05, 0.08, 0.7, -22, add=True, soft=5)
    for rib in range(2):
        c.both(c.ring, 0.42, -0.72 + rib * 0.2, 0.42, 0.22, 0.05, 24, half="upper", add=True, turn=0.16)
    c.both(c.bar, 0.24, 0.15, 0.1, 0.5, 9, add=True, turn=0.14)
    c.ellipse(-0.42, -0.55, 0.42, 0.32, 14, add=True, soft=4)
    for vertebra in range(-6, 4):
        c.bar(0, vertebra * 0.25, 0.13, 0.1, 86, add=True)
        c.bar(0, vertebra * 0.25, 0.24, 0.02, 36, add=True)
    c.both(c.ellipse, 0.47, 0.85, 0.36, 0.3, 66, add=True, turn=0.3, soft=2)
    c.ellipse(0, 0.92, 0.16, 0.3, 62, add=True, soft=2)
    if finding:
        for loop in (-0.42, -0.14, 0.14, 0.42):
            c.ellipse(0, loop, 0.52, 0.13, -74, add=True, soft=1.5, turn=c.rng.uniform(-0.1, 0.1))
            c.ring(0, loop, 0.52, 0.13, 0.025, 40, add=True)
    else:
        for _ in range(4):
            c.ellipse(c.rng.uniform(-0.5, 0.5), c.rng.uniform(-0.2, 0.6), 0.1, 0.04, -20, add=True, soft=2)


def _us_abdomen(c: Canvas, finding: bool) -> None:
    c.pixels += 112 + c.coarse * 10 + c.fine * 14
    c.bar(0, -0.86, 1.4, 0.09, 165, fine=30)
    c.ring(0, -0.1, 1.0, 0.93, 0.05, 232, half="lower", opacity=0.9)
    c.ellipse(0.0, 0.12, 0.09, 0.055, 8)
    c.ring(0, 0.12, 0.1, 0.065, 0.03, 215)
    c.ellipse(0.03, 0.62, 0.2, 0.08, 10, turn=0.1)
    c.both(c.bar, 0.12, -0.2, 0.02, 0.22, 25, turn=0.35, opacity=0.8)
    if finding:
        c.ring(0, -0.14, 0.98, 0.9, 0.15, 4)
        c.bar(0, -0.66, 1.4, 0.11, 4)


def _speckle(c: Canvas, linear: bool) -> None:
    """Adds multiplicative speckle, attenuation with depth, and black outside the probe's field."""
    height, width = c.pixels.shape
    drawn = c.rng.integers(0, 256, (height, width + 2), dtype=np.int16)
    c.pixels *= np.float32(0.6) + (drawn[:, 2:] + drawn[:, 1:-1] + drawn[:, :-2]) / np.float32(960)
    x = c.cosine * c.columns + c.sine * c.rows
    y = c.cosine * c.rows - c.sine * c.columns
    c.pixels *= 1.04 - 0.1 * y
    if linear:
        inside = (np.abs(x) < 0.96) & (np.abs(y) < 1.0)
    else:
        depth = y + 2.0
        radius = np.square(x) + np.square(depth)
        inside = (np.abs(x) < 0.56 * depth) & (radius > 1.15 * 1.15) & (radius < 2.95 * 2.95)
    c.pixels *= inside


@dataclass(frozen=True)
class Study:
    """Appearance of a region in a modality: anatomy, positions of lesions, and grey values.

    The three levels of lesions are `pitch` apart around `centre_y`, at `outer_x` (upper, lower) or `middle_x` from
    the midline; dark lesions have a `rim`.
    """

    anatomy: Callable[[Canvas, bool], None]
    bright: float
    dark: float
    rim: float
    noise: int
    outer_x: float = 0.42
    middle_x: float = 0.45
    pitch: float = 0.42
    centre_y: float = 0.0


STUDIES: dict[str, Study] = {
    "ct-head": Study(_ct_head, 232, 22, 135, 5, 0.27, 0.36),
    "mr-head": Study(_mr_head, 250, 8, 150, 7, 0.27, 0.37),
    "xray-head": Study(_xray_head, 240, 20, 150, 4, 0.27, 0.36, 0.4, -0.12),
    "us-head": Study(_us_head, 248, 4, 120, 4, 0.34, 0.42, 0.42, 0.12),
    "ct-chest": Study(_ct_chest, 240, 2, 130, 6, 0.45, 0.5, 0.41),
    "mr-chest": Study(_mr_chest, 238, 2, 130, 7, 0.4, 0.44, 0.43, -0.08),
    "xray-chest": Study(_xray_chest, 248, 2, 110, 4, 0.4, 0.44, 0.43, -0.08),
    "us-chest": Study(_us_chest, 250, 4, 140, 4, 0.44, 0.44, 0.44, 0.12),
    "ct-abdomen": Study(_ct_abdomen, 245, 10, 140, 6, 0.4, 0.46, 0.41),
    "mr-abdomen": Study(_mr_abdomen, 252, 6, 150, 7, 0.38, 0.4, 0.46, -0.02),
    "xray-abdomen": Study(_xray_abdomen, 245, 10, 140, 4, 0.42, 0.45, 0.44, -0.02),
    "us-abdomen": Study(_us_abdomen, 250, 4, 130, 4, 0.38, 0.44, 0.42, 0.12),
}
