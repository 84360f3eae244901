"""The model, the data and the encoder of a run, for every family: what train.py puts together.

Everything is found below the run's folder of artifacts: codebook/, tokens/, prepared/ and, for models that read pixels,
work/pixels/.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fuselip_core.config import ModelSettings, TrainSettings
from fuselip_core.errors import FuselipError
from fuselip_core.model.fuselip import FuseLIPConfig, FuseLIPModel, Kept, Transformer
from fuselip_core.model.hub import Model, load_pretrained
from fuselip_core.model.late_fusion import FUSIONS, LateFusionConfig, LateFusionModel
from fuselip_core.model.titok import TiTok


def build_model(options: ModelSettings, settings: TrainSettings, tokenizer: TiTok) -> Model:
    """The model to train, on the CPU: random, or that of `train.init` with the context that is asked for."""
    if settings.init is not None:
        return _from_checkpoint(options, settings, tokenizer)
    if options.family == "fuselip":
        return _new_fuselip(options, settings, tokenizer)
    config = LateFusionConfig.of_size(options.size, FUSIONS[options.family], options.context_length)
    model = LateFusionModel(config)
    _start_scale(model, settings)
    return model


def _new_fuselip(options: ModelSettings, settings: TrainSettings, tokenizer: TiTok) -> FuseLIPModel:
    config = FuseLIPConfig.of_size(
        options.size, tokenizer.config, options.context_length, options.mask_token, options.width
    )
    model = FuseLIPModel(config)
    _start_scale(model, settings)
    spread = settings.initial_embedding_std / model.token_embedding.weight.std().item()
    model.token_embedding.weight.data.mul_(spread)
    model.positional_embedding.data.mul_(spread)
    if settings.codes_from_codebook:
        model.start_codes_from(tokenizer.quantize.vectors())
    if settings.places_from_grid:
        model.start_places_from_grid(settings.initial_embedding_std)
    return model


def _start_scale(model: Model, settings: TrainSettings) -> None:
    model.logit_scale.data.fill_(math.log(settings.initial_scale))
    model.logit_bias.data.fill_(settings.initial_bias)


def _from_checkpoint(options: ModelSettings, settings: TrainSettings, tokenizer: TiTok) -> Model:
    model, _ = load_pretrained(str(settings.init), "cpu")
    family = "fuselip" if isinstance(model, FuseLIPModel) else _family_of(model.config.fusion)
    if family != options.family:
        raise FuselipError(f"train.init {settings.init} is of the family {family}; set model.family={family}")
    if isinstance(model, LateFusionModel):
        return model
    config = model.config
    if (config.codebook_size, config.codes_per_image) != (
        tokenizer.config.codebook_size,
        tokenizer.config.latent_tokens,
    ):
        raise FuselipError(
            f"train.init {settings.init} reads {config.codes_per_image} codes of {config.codebook_size}, but the "
            f"codebook here makes {tokenizer.config.latent_tokens} of {tokenizer.config.codebook_size}; "
            f"set codebook.init={settings.init}"
        )
    if settings.mask_weight and not config.mask_token:
        raise FuselipError(f"train.init {settings.init} has no mask token; set train.mask_weight=0")
    if options.context_length:
        extend_context(model, options.context_length)
    # The codebook here may be the checkpoint's own fine-tuned: its codes are what is trained on, and looked at.
    model.attach_image_tokenizer(tokenizer)
    return model


def _family_of(fusion: str) -> str:
    return next(name for name, published in FUSIONS.items() if published == fusion)


def keep(model: nn.Module, kept: Kept) -> None:
    """Sets what the stacks of `model` keep for the backward pass, see Transformer.

    Gradient checkpointing (arXiv 1604.06174) of blocks: activations of one instead of all, for a third more work.
    """
    for module in model.modules():
        if isinstance(module, Transformer):
            module.kept = kept


@torch.no_grad()
def extend_context(model: FuseLIPModel, context_length: int) -> None:
    """Gives `model` places for `context_length` tokens; those it has stay, new ones begin as copies of its last.

    So no sequence that fitted before is embedded differently, and what lies beyond is at first read as if it stood at
    the old end. Raises FuselipError for a length below the model's own.
    """
    own = model.config.context_length
    if context_length < own:
        raise FuselipError(
            f"model.context_length {context_length} is below the {own} places of train.init; leave it empty or raise it"
        )
    table = model.positional_embedding
    longer = torch.cat([table, table[-1:].expand(context_length - own, -1)])
    model.positional_embedding = nn.Parameter(longer.clone())
    model.config.context_length = context_length


@torch.no_grad()
def interpolate(model: nn.Module, before: Mapping[str, Tensor], share: float) -> None:
    """Leaves in `model` the weights that lie `share` of the way from `before` to its own.

    Robust fine-tuning (WiSE-FT, arXiv 2109.01903): on that line both what was learned and what was known stay high.
    """
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.copy_(torch.lerp(before[name].to(p), p, share))


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter that trains."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
