"""Dimensions of the joint encoder, as this project's config.json and as the published one tells them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from transformers import PreTrainedConfig

from fuselip_core.errors import FuselipError
from fuselip_core.model.presets import PUBLISHED_TOKENIZERS, encoder_size, tokenizer_config
from fuselip_core.model.titok import TiTokConfig
from fuselip_core.model.vocabulary import PAD, TEXT_SIZE, Vocabulary

PUBLISHED_NAME = "fuse-clip-titok"  # `model_name` in a published config.json
# What a published text_config must say for this port to be right; anything else would be another architecture.
PUBLISHED_FIXED = {"ls_init_value": None, "no_causal_mask": True, "pad_id": PAD, "pool_type": "eot"}


class FuseLIPConfig(PreTrainedConfig):
    """Dimensions of the joint encoder; `image_tokenizer` holds TiTokConfig's fields where the model contains one."""

    model_type = "fuselip"
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "num_hidden_layers": "layers",
    }

    width: int = 384
    heads: int = 6
    layers: int = 12
    mlp_ratio: float = 4.0
    context_length: int = 180
    codebook_size: int = 4096
    codes_per_image: int = 128
    image_size: int = 256
    mask_token: bool = True
    mask_padding: bool = True
    image_tokenizer: dict[str, Any] | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **options: Any) -> None:
        _refuse_end_of_image(options.pop("end_of_image", False))  # a field of earlier versions, nearly always false
        super().__post_init__(**options)

    @property
    def vocabulary(self) -> Vocabulary:
        """The map between text ids, image codes and joint ids."""
        return Vocabulary(self.codebook_size, self.mask_token)

    @property
    def vocab_size(self) -> int:
        """Number of joint ids."""
        return self.vocabulary.size

    @classmethod
    def of_size(
        cls,
        size: str,
        codebook: TiTokConfig | None = None,
        context_length: int | None = None,
        mask_token: bool = True,
        width: int | None = None,
    ) -> Self:
        """Preset `size` for the codes of `codebook` (the preset's if None); the model itself contains no tokenizer.

        `context_length` and `width`, where given, replace the preset's. Raises FuselipError for an unknown size, and
        for a width that the size's heads do not divide.
        """
        encoder, codebook = encoder_size(size), codebook or tokenizer_config(size)
        if width and width % encoder.heads:
            fitting = max(1, round(width / encoder.heads)) * encoder.heads
            raise FuselipError(
                f"model.width {width} is no multiple of the {encoder.heads} heads of size {size}; set {fitting}, say"
            )
        return cls(
            width=width or encoder.width,
            heads=encoder.heads,
            layers=encoder.layers,
            context_length=context_length or encoder.context_length,
            codebook_size=codebook.codebook_size,
            codes_per_image=codebook.latent_tokens,
            image_size=codebook.image_size,
            mask_token=mask_token,
        )

    @classmethod
    def from_published(cls, content: Mapping[str, Any]) -> Self:
        """Reads the config.json of a published checkpoint; raises FuselipError where it is of another kind."""
        try:
            text, codebook = content["text_config"], _published_tokenizer(content)
            _refuse_end_of_image(content["use_eoi"])
            extra = text["vocab_size"] - TEXT_SIZE - codebook.codebook_size
            if extra not in (0, 1):
                raise FuselipError(f"vocab_size {text['vocab_size']} goes with no codebook of {codebook.codebook_size}")
            return cls(
                width=text["width"],
                heads=text["heads"],
                layers=text["layers"],
                mlp_ratio=text["mlp_ratio"],
                context_length=text["context_length"],
                codebook_size=codebook.codebook_size,
                codes_per_image=codebook.latent_tokens,
                image_size=codebook.image_size,
                mask_token=extra == 1,
                mask_padding=bool(content["mask_pad"]),
                image_tokenizer=dataclasses.asdict(codebook),
            )
        except KeyError as error:
            raise FuselipError(f"the published configuration lacks {error}; take config.json as published") from error


def _refuse_end_of_image(used: object) -> None:
    if used:
        raise FuselipError(
            "this model was made with an end-of-image token (end_of_image, published as use_eoi), "
            "which is not supported; give a checkpoint without one"
        )


def _published_tokenizer(content: Mapping[str, Any]) -> TiTokConfig:
    """The image tokenizer that a published configuration names; FuselipError if this port would get the model wrong."""
    if content["model_name"] != PUBLISHED_NAME:
        raise FuselipError(f"model_name is '{content['model_name']}', expected '{PUBLISHED_NAME}'")
    for key, value in PUBLISHED_FIXED.items():
        if content["text_config"][key] != value:
            raise FuselipError(f"text_config.{key} is {content['text_config'][key]!r}; only {value!r} is supported")
    name = content["image_tokenizer"]
    if name not in PUBLISHED_TOKENIZERS:
        raise FuselipError(f"unknown image tokenizer '{name}'; there are: {', '.join(PUBLISHED_TOKENIZERS)}")
    return PUBLISHED_TOKENIZERS[name]
