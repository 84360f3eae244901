"""The late-fusion baselines of FuseLIP (arXiv 2506.03096, section 4.1): SigLIP towers, their embeddings fused last.

SF adds the two embeddings ("add"); MLF puts a small transformer on them ("magiclens", after arXiv 2403.19651).
Legend: B pairs, L tokens, W width of the embedding, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig
from transformers.utils import ModelOutput

from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import Transformer
from fuselip_core.model.presets import open_clip_config
from fuselip_core.model.towers import build_towers, image_tower_output, text_tower_output
from fuselip_core.model.vocabulary import BEGIN_OF_TEXT, END_OF_TEXT, longest_text
from fuselip_core.model.weights import StrictModel

FUSIONS = {"siglip-sf": "add", "siglip-mlf": "magiclens"}  # this project's family names → published names


class LateFusionConfig(PreTrainedConfig):
    """Towers in open_clip's own configuration format, and how their embeddings are fused."""

    model_type = "fuselip-late-fusion"

    towers: dict[str, Any] | None = None
    fusion: str = "add"
    fusion_layers: int = 4

    def __post_init__(self, **options: Any) -> None:
        super().__post_init__(**options)
        if self.towers is None:
            self.towers = open_clip_config("small")
        if self.fusion not in FUSIONS.values():
            raise FuselipError(f"unknown fusion '{self.fusion}'; there are: {', '.join(FUSIONS.values())}")
        if not self._text.get("no_causal_mask"):
            raise FuselipError("the late-fusion baselines need text_cfg.no_causal_mask: true, as published")

    @property
    def _text(self) -> dict[str, Any]:
        assert self.towers is not None
        return self.towers["text_cfg"]

    @property
    def embed_dim(self) -> int:
        """W, the width of an embedding."""
        assert self.towers is not None
        return int(self.towers["embed_dim"])

    @property
    def heads(self) -> int:
        """Attention heads of the text tower, and of the late-fusion module."""
        return int(self._text["heads"])

    @property
    def context_length(self) -> int:
        """Text tokens, begin and end included."""
        return int(self._text["context_length"])

    @property
    def image_size(self) -> int:
        """S, pixels a side."""
        assert self.towers is not None
        return int(self.towers["vision_cfg"]["image_size"])

    @classmethod
    def of_size(cls, size: str, fusion: str, context_length: int | None = None) -> Self:
        """Preset `size` with `fusion` "add" or "magiclens"."""
        return cls(towers=open_clip_config(size, context_length), fusion=fusion)

    @classmethod
    def from_published(cls, towers: Mapping[str, Any], names: set[str]) -> Self:
        """open_clip's configuration as published; the names of the weights tell how embeddings are fused."""
        towers = towers.get("model_cfg", towers)
        if "vision_cfg" not in towers or "text_cfg" not in towers:
            raise FuselipError("the open_clip configuration lacks vision_cfg or text_cfg; take the file as published")
        prefix = "fusion_module.transformer.resblocks."
        layers = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
        if not layers:
            return cls(towers=dict(towers), fusion="add")
        return cls(towers=dict(towers), fusion="magiclens", fusion_layers=len(layers))


@dataclass
class LateFusionOutput(ModelOutput):
    """`embeddings` (B, W) float32 of unit norm."""

    embeddings: Tensor | None = None


class AttentionPooler(nn.Module):
    """One learned query attends to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.pool_attn_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, W) → (B, W)."""
        query = self.query.expand(len(x), -1, -1)
        return self.pool_attn_ln(self.attn(query, x, x, need_weights=False)[0])[:, 0]


class FusionModule(nn.Module):
    """Image and text embedding as a sequence of two tokens, without positions, pooled to one."""

    def __init__(self, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.transformer = Transformer(width, heads, layers, mlp_ratio=4.0)
        self.attention_pooler = AttentionPooler(width, heads)

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Two (B, W) → (B, W)."""
        return self.attention_pooler(self.transformer(torch.stack([image_features, text_features], dim=1)))


class LateFusionModel(StrictModel):
    """Embeds images, texts and pairs of both in one space, like FuseLIPModel, with one tower for each modality."""

    config_class = LateFusionConfig
    config: LateFusionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__(config)
        assert config.towers is not None
        self.model = build_towers(config.towers)
        self.fusion_module: FusionModule | None = None
        if config.fusion == "magiclens":
            self.fusion_module = FusionModule(config.embed_dim, config.heads, config.fusion_layers)
        self.post_init()

    @property
    def logit_scale(self) -> nn.Parameter:
        """Logarithm of the sigmoid loss's scale."""
        return self.model.logit_scale

    @property
    def logit_bias(self) -> nn.Parameter:
        """The sigmoid loss's bias."""
        return self.model.logit_bias

    def encode_image(self, pixels: Tensor, normalize: bool = True) -> Tensor:
        """Normalised pixels (B, 3, S, S) float → embeddings (B, W) float32, of unit norm if `normalize`."""
        empty = torch.tensor([[BEGIN_OF_TEXT, END_OF_TEXT]], device=pixels.device)
        # As published, an image without a text is an image with the empty text, and not the image tower's own output.
        empty_features = text_tower_output(self.model.text, empty).expand(len(pixels), -1)
        return self.fuse(self._image_features(pixels), empty_features, normalize)

    def encode_text(self, input_ids: Tensor, normalize: bool = True) -> Tensor:
        """Text ids (B, L) int64 with begin, end and padding → embeddings (B, W) float32."""
        text_features = self._text_features(input_ids)
        return self.fuse(torch.zeros_like(text_features), text_features, normalize)

    def encode_multimodal(self, pixels: Tensor, input_ids: Tensor, normalize: bool = True) -> Tensor:
        """Normalised pixels (B, 3, S, S) and text ids (B, L) int64 → embeddings (B, W) float32 of the fused pairs."""
        if len(pixels) != len(input_ids):
            raise FuselipError(f"encode_multimodal got {len(pixels)} images but {len(input_ids)} texts; give as many")
        return self.fuse(self._image_features(pixels), self._text_features(input_ids), normalize)

    def tokenize_image(self, pixels: Tensor, append_empty_text: bool = False) -> Tensor:
        """Raises FuselipError: the baselines read pixels."""
        raise FuselipError("a late-fusion model reads pixels and has no image tokens; load a FuseLIP model for them")

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, has_image: Tensor | None = None, **_: Any
    ) -> LateFusionOutput:
        """Pixels and text ids (B, L) of a batch in which some rows may lack the image → embeddings.

        `has_image` (B) boolean tells which rows have one. `pixel_values` are of all rows, (B, 3, S, S), or only of
        those that have one, in order. A row without a text has the empty text's ids.
        """
        text_features = self._text_features(input_ids)
        if has_image is None:
            return LateFusionOutput(embeddings=self.fuse(self._image_features(pixel_values), text_features))
        chosen = pixel_values[has_image] if len(pixel_values) == len(has_image) else pixel_values
        image_features = torch.zeros_like(text_features)
        if len(chosen):
            found = self._image_features(chosen)
            image_features = image_features.to(found.dtype).index_put((has_image.nonzero().squeeze(1),), found)
        return LateFusionOutput(embeddings=self.fuse(image_features, text_features))

    def fuse(self, image_features: Tensor, text_features: Tensor, normalize: bool = True) -> Tensor:
        """The towers' outputs, two (B, W), zeros for a missing image → embeddings (B, W) float32."""
        if self.fusion_module is not None:
            fused = self.fusion_module(image_features, text_features)
        else:
            fused = F.normalize(image_features.float(), dim=-1) + F.normalize(text_features.float(), dim=-1)
        return F.normalize(fused.float(), dim=-1) if normalize else fused.float()

    def _image_features(self, pixels: Tensor) -> Tensor:
        expected = (3, self.config.image_size, self.config.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected or not pixels.is_floating_point():
            raise FuselipError(f"the image tower takes float pixels (B, {expected}), not {tuple(pixels.shape)}")
        return image_tower_output(self.model.visual, pixels)

    def _text_features(self, input_ids: Tensor) -> Tensor:
        if not bool((input_ids == END_OF_TEXT).any(dim=1).all()):
            raise FuselipError("every text needs an end-of-text token; make ids with the text tokenizer")
        if self.model.text.use_pad_mask:  # columns that are padding in every row cost time and change nothing
            input_ids = input_ids[:, : longest_text(input_ids)]
        if input_ids.shape[1] > self.config.context_length:
            raise FuselipError(f"a text of {input_ids.shape[1]} tokens exceeds {self.config.context_length}; cut it")
        return text_tower_output(self.model.text, input_ids)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: modules draw their own weights when built, and loading is strict, so none is ever missing."""


AutoConfig.register(LateFusionConfig.model_type, LateFusionConfig)
AutoModel.register(LateFusionConfig, LateFusionModel)
