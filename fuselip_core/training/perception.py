"""What the image tokenizer's perceptual term compares: image features of a late-fusion baseline.

Legend: B images, S pixels a side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import normalize

from fuselip_core.config import CodebookSettings
from fuselip_core.errors import FuselipError
from fuselip_core.model.hub import load_pretrained
from fuselip_core.model.late_fusion import LateFusionModel
from fuselip_core.model.processing import CLIP_MEAN, CLIP_STD
from fuselip_core.tokenizer.codebook import Perception


def open_perception(settings: CodebookSettings, device: torch.device) -> Perception | None:
    """Features of pixels (B, 3, S, S) in 0..1 by the model that `perceptual_model` names; None without the term.

    Raises FuselipError where that is no late-fusion baseline.
    """
    if not settings.perceptual_weight or settings.perceptual_model is None:
        return None
    model, _ = load_pretrained(settings.perceptual_model, device)
    if not isinstance(model, LateFusionModel):
        raise FuselipError(
            f"codebook.perceptual_model {settings.perceptual_model} is no SigLIP baseline; name one, or set "
            "codebook.perceptual_weight=0"
        )
    model.requires_grad_(False)
    size = model.config.image_size

    def features(pixels: torch.Tensor) -> torch.Tensor:
        resized = F.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)
        return model.encode_image(normalize(resized, list(CLIP_MEAN), list(CLIP_STD)))

    return features
