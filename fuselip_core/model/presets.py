"""Dimensions of the sizes tiny, small, base and large of every model family."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from fuselip_core.errors import FuselipError
from fuselip_core.model.titok import TiTokConfig
from fuselip_core.model.vocabulary import TEXT_SIZE

Value = TypeVar("Value")


@dataclass(frozen=True)
class EncoderSize:
    """Dimensions of a joint encoder: width of a token, attention heads, layers, tokens a sequence."""

    width: int
    heads: int
    layers: int
    context_length: int


# FuseLIP (arXiv 2506.03096), section 3.1, names small and base; tiny and large are this project's.
ENCODERS = {
    "tiny": EncoderSize(128, 4, 2, 128),
    "small": EncoderSize(384, 6, 12, 180),
    "base": EncoderSize(512, 8, 12, 180),
    "large": EncoderSize(768, 12, 12, 180),
}

_BASE_CODEBOOK = TiTokConfig(
    codebook_size=8192,
    code_size=64,
    width=768,
    layers=12,
    heads=12,
    decoder_width=1024,
    decoder_layers=24,
    decoder_heads=16,
    normalise_codes=False,
    legacy_layout=False,
)

# small is TiTok S-128, base and large take TiTok BL-128-VQ8k (arXiv 2406.07550).
TOKENIZERS = {
    # One code a patch, so that training can start from patches (training/patch_start.py).
    "tiny": TiTokConfig(
        image_size=96,
        patch_size=16,
        latent_tokens=36,
        codebook_size=2048,
        code_size=16,
        width=128,
        layers=2,
        heads=4,
        decoder_width=128,
        decoder_layers=3,
        decoder_heads=4,
        smooth=False,
        normalise_codes=False,
        legacy_layout=False,
    ),
    "small": TiTokConfig(),
    "base": _BASE_CODEBOOK,
    "large": _BASE_CODEBOOK,
}

# The names by which published FuseLIP checkpoints call their image tokenizer.
PUBLISHED_TOKENIZERS = {
    "yucornetto/tokenizer_titok_s128_imagenet": TOKENIZERS["small"],
    "yucornetto/tokenizer_titok_bl128_vq8k_imagenet": TOKENIZERS["base"],
}


@dataclass(frozen=True)
class TowerSize:
    """Dimensions of a pair of towers; the image tower has heads of 64 dimensions, as in open_clip."""

    image_size: int
    image_width: int
    image_layers: int
    text_width: int
    text_heads: int
    text_layers: int
    context_length: int


TOWERS = {
    "tiny": TowerSize(96, 128, 2, 128, 4, 2, 96),
    "small": TowerSize(256, 384, 12, 384, 6, 12, 180),
    "base": TowerSize(256, 768, 12, 512, 8, 12, 180),
    "large": TowerSize(256, 1024, 24, 768, 12, 12, 180),
}


def encoder_size(name: str) -> EncoderSize:
    """Dimensions of a joint encoder; raises FuselipError for an unknown size."""
    return _pick(ENCODERS, name)


def tokenizer_config(
    name: str, image_size: int | None = None, patch_size: int | None = None, codes: int | None = None
) -> TiTokConfig:
    """Dimensions of the image tokenizer of a size, with other pixels a side, patches or number of codes where given.

    A preset with one latent a patch keeps one a patch. Raises FuselipError for an unknown size, or patches that do not
    fill the image.
    """
    preset = _pick(TOKENIZERS, name)
    image, patch = image_size or preset.image_size, patch_size or preset.patch_size
    if image % patch:
        raise FuselipError(
            f"patches of {patch} pixels do not fill an image of {image}: "
            "set codebook.image_size to a multiple of codebook.patch_size"
        )
    one_a_patch = preset.latent_tokens == (preset.image_size // preset.patch_size) ** 2
    return dataclasses.replace(
        preset,
        image_size=image,
        patch_size=patch,
        latent_tokens=(image // patch) ** 2 if one_a_patch else preset.latent_tokens,
        codebook_size=codes or preset.codebook_size,
    )


def open_clip_config(name: str, context_length: int | None = None) -> dict[str, Any]:
    """Towers of a late-fusion baseline in open_clip's format; raises FuselipError for an unknown size."""
    size = _pick(TOWERS, name)
    return {
        "embed_dim": size.text_width,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": size.image_size,
            "layers": size.image_layers,
            "width": size.image_width,
            "patch_size": 16,
        },
        "text_cfg": {
            "context_length": context_length or size.context_length,
            "vocab_size": TEXT_SIZE,
            "width": size.text_width,
            "heads": size.text_heads,
            "layers": size.text_layers,
            "no_causal_mask": True,
            "mask_pad": True,
            "proj_bias": False,
        },
    }


def _pick(table: dict[str, Value], name: str) -> Value:
    if name not in table:
        raise FuselipError(f"unknown model size '{name}'; there are: {', '.join(table)}")
    return table[name]
