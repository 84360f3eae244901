"""Random crops that are cut and resized where the tokenizer runs, from one upload of the picture.

Pillow's bicubic resizing with antialiasing is two products with matrices of weights, one along rows and one along
columns, each rounded to 8 bits. So all crops of a picture are two matrix products, in float32 where Pillow counts in
fixed point: single values differ by one.
Legend: C crops, H, W pixels of the picture, S pixels a side of a crop.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SHARPNESS = -0.5  # of Pillow's bicubic filter


@dataclass(frozen=True)
class Uncut:
    """The evaluation view uint8 (1, S, S, 3), the picture uint8 (H, W, 3), and left, top, width, height (C, 4)."""

    view: np.ndarray
    picture: np.ndarray
    boxes: np.ndarray

    def views(self, device: torch.device) -> Tensor:
        """The evaluation view and the crops, uint8 (1 + C, S, S, 3) on `device`."""
        view, picture = (torch.tensor(each, device=device) for each in (self.view, self.picture))
        return torch.cat([view, cut(picture, torch.tensor(self.boxes), view.shape[1])])

    def cut_by_pillow(self, crop: int) -> np.ndarray:
        """One of the crops as Pillow makes it, uint8 (S, S, 3)."""
        left, top, width, height = map(int, self.boxes[crop])
        part = Image.fromarray(self.picture).crop((left, top, left + width, top + height))
        return np.asarray(part.resize(self.view.shape[1:3], Image.Resampling.BICUBIC))


def cut(picture: Tensor, boxes: Tensor, size: int) -> Tensor:
    """uint8 (H, W, 3), and left, top, width, height (C, 4) on the CPU → crops, squashed to uint8 (C, S, S, 3)."""
    (height, width, _), count = picture.shape, len(boxes)
    across = _weights(boxes[:, 0], boxes[:, 2], width, size).to(picture.device, torch.float32)
    down = _weights(boxes[:, 1], boxes[:, 3], height, size).to(picture.device, torch.float32)
    channels = picture.permute(2, 0, 1).reshape(3 * height, width).float()
    rows = _rounded(channels @ across.reshape(count * size, width).T)
    rows = rows.view(3, height, count, size).permute(2, 1, 0, 3).reshape(count, height, 3 * size)
    return _rounded(down @ rows).view(count, size, 3, size).transpose(2, 3).to(torch.uint8)


def _rounded(values: Tensor) -> Tensor:
    return (values + 0.5).floor_().clamp_(0, 255)


def _weights(starts: Tensor, lengths: Tensor, whole: int, size: int) -> Tensor:
    """What each of `whole` pixels weighs in each of `size` pixels of the parts (C), (C, size, whole) float64."""
    starts, lengths = starts.double()[:, None, None], lengths.double()[:, None, None]
    scale = lengths / size
    centres = starts + (torch.arange(size)[:, None] + 0.5) * scale
    places = torch.arange(whole) + 0.5
    weights = _bicubic((places - centres) / scale.clamp(min=1.0))
    weights *= (places > starts) & (places < starts + lengths)
    return weights / weights.sum(dim=-1, keepdim=True)


def _bicubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel (Keys 1981), 0 beyond 2."""
    x = x.abs()
    near = ((SHARPNESS + 2) * x - (SHARPNESS + 3)) * x**2 + 1
    far = SHARPNESS * (((x - 5) * x + 8) * x - 4)
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
