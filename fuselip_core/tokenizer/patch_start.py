"""A start for an image tokenizer that is trained from scratch on a small machine.

From random weights a 1-D tokenizer spends thousands of steps on finding out which latent should look where, and until
then reconstructs the mean image. Here it starts as what can be computed in closed form: each latent holds the first
principal components of one patch. The weights are set so that the first attention layer carries them from patches to
latents, and in the decoder back; the last layer is fitted by least squares. Training then does what patches alone
cannot: it lets latents speak about more than their own patch.

Legend: N images, P patch side, G patches a side, W width, D code dimensions, K = G * G codes an image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fuselip_core.model.blocks import ResidualBlock
from fuselip_core.model.titok import TiTok, bias_of, to_patches

SHARPNESS = 3.0  # factor of queries and keys; an attention head then sees its own place and hardly its neighbours
POSITION_AMPLITUDE = 0.3
# Random Fourier features whose similarity falls to a half at about one patch's distance (a Gaussian kernel).
FREQUENCY_SPREAD = 1.2
READ_FIRST = 5.0  # factor of the key that sets tokens with content apart from those that are to receive it
LATER_LAYERS = 0.1  # factor of what every other layer adds at the start


def can_start_from_patches(tokenizer: TiTok) -> bool:
    """Whether there is one latent a patch and a decoder to set."""
    config = tokenizer.config
    grid = config.image_size // config.patch_size
    return tokenizer.decoder is not None and config.latent_tokens == grid**2 and not config.legacy_layout


@torch.no_grad()
def start_from_patches(tokenizer: TiTok, pixels: Tensor) -> None:
    """Sets the weights of `tokenizer`, in place, from a sample of pixels (N, 3, S, S) float in 0..1."""
    encoder, decoder, config = tokenizer.encoder, tokenizer.decoder, tokenizer.config
    assert decoder is not None
    patches = to_patches(pixels, config.patch_size).flatten(0, 1)
    mean, components, spread = _principal_components(patches, config.code_size)
    grid = config.image_size // config.patch_size
    for part, heads in ((encoder, config.heads), (decoder, config.decoder_heads)):
        _set_places(part, grid, config.code_size, heads, patches_have_content=part is encoder)
        for layer, block in enumerate(part.transformer):
            assert isinstance(block, ResidualBlock)
            _set_block(block, config.code_size, heads, first=layer == 0)
    tokenizer.latent_tokens.zero_()
    decoder.mask_token.zero_()
    content = _content_dimensions(config.width, config.code_size)
    # Small beside the position, so that the layer norm in between stays almost linear in the content.
    gain = 0.3 * POSITION_AMPLITUDE * math.sqrt(config.width / config.code_size) / spread
    encoder.patch_embed.weight.zero_()
    encoder.patch_embed.weight[content] = (components * gain).reshape(-1, 3, config.patch_size, config.patch_size)
    bias = bias_of(encoder.patch_embed).zero_()
    bias[content] = -(components @ mean) * gain
    encoder.conv_out.weight.zero_()
    encoder.conv_out.weight[torch.arange(len(content)), content, 0, 0] = 1.0
    bias_of(encoder.conv_out).zero_()
    _scale_latents(tokenizer, pixels)
    _set_decoder_ends(tokenizer, pixels)


def _principal_components(patches: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (N, F) → mean (F), the first `count` components (count, F), root of the variance they hold (scalar)."""
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    return mean, vectors[:, -count:].T.flip(0), values[-count:].sum().clamp_min(1e-8).sqrt()


def _content_dimensions(width: int, code_size: int) -> Tensor:
    """The dimensions that carry content, spread over the heads so that each also has its share of position."""
    return torch.arange(code_size) * (width // code_size)


def _flag_dimensions(width: int, heads: int) -> Tensor:
    """One dimension a head, its last, that says whether a token brings content or is to receive it."""
    return torch.arange(1, heads + 1) * (width // heads) - 1


def _set_places(part: nn.Module, grid: int, code_size: int, heads: int, patches_have_content: bool) -> None:
    """The same position features for patches and latents of one place, but for the flag; none where content is."""
    positions = part.get_parameter("positional_embedding")
    width = positions.shape[1]
    generator = torch.Generator().manual_seed(0)
    axis = (torch.arange(grid) + 0.5) / grid
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1).reshape(-1, 2)
    angles = places @ (torch.randn(width // 2, 2, generator=generator) * FREQUENCY_SPREAD * grid).T
    features = torch.stack([angles.cos(), angles.sin()], dim=-1).flatten(1) * POSITION_AMPLITUDE
    features[:, _content_dimensions(width, code_size)] = 0.0
    flags = _flag_dimensions(width, heads)
    features[:, flags] = POSITION_AMPLITUDE if patches_have_content else -POSITION_AMPLITUDE
    positions[1:] = features.to(positions.device)
    features[:, flags] *= -1.0
    part.get_parameter("latent_token_positional_embedding").copy_(features)


def _set_block(block: ResidualBlock, code_size: int, heads: int, first: bool) -> None:
    """The first block moves content between equal places; the others begin close to the identity."""
    block.mlp.get_parameter("c_proj.weight").mul_(LATER_LAYERS)
    if not first:
        block.attn.out_proj.weight.mul_(LATER_LAYERS)
        return
    width = block.attn.out_proj.weight.shape[0]
    content = _content_dimensions(width, code_size)
    of_content = torch.zeros(width)
    of_content[content] = 1.0
    query = SHARPNESS * (1.0 - of_content)
    key = query.clone()
    # A receiver's flag is negative, a bringer's positive: without it a receiver would see itself beside its own patch.
    flags = _flag_dimensions(width, heads)
    query[flags], key[flags] = -READ_FIRST, READ_FIRST
    block.attn.in_proj_weight.copy_(torch.cat([torch.diag(query), torch.diag(key), torch.eye(width)]))
    block.attn.in_proj_bias.zero_()
    block.attn.out_proj.weight.copy_(torch.diag(of_content))


def _scale_latents(tokenizer: TiTok, pixels: Tensor) -> None:
    """Centres the latents and gives them a variance of one in total, the size that codes are compared at."""
    rows = tokenizer.encode(pixels).transpose(1, 2).flatten(0, 1)
    mean, size = rows.mean(0), rows.var(0).sum().clamp_min(1e-12).sqrt()
    conv = tokenizer.encoder.conv_out
    conv.weight.div_(size)
    bias_of(conv).sub_(mean).div_(size)


def _set_decoder_ends(tokenizer: TiTok, pixels: Tensor) -> None:
    """Latents enter in the dimensions of the content; the last layer is the least-squares map back to patches."""
    decoder, config = tokenizer.decoder, tokenizer.config
    assert decoder is not None
    content = _content_dimensions(config.decoder_width, config.code_size)
    decoder.decoder_embed.weight.zero_()
    entry = 0.3 * POSITION_AMPLITUDE * math.sqrt(config.decoder_width / config.code_size)
    decoder.decoder_embed.weight[content, torch.arange(len(content))] = entry
    decoder.decoder_embed.bias.zero_()
    latents = tokenizer.quantize.flatten(tokenizer.encode(pixels)).transpose(1, 2)
    features = decoder.place_features(latents).flatten(0, 1)
    design = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    # The decoder's patches have the order row, column, colour.
    side = config.patch_size
    wanted = to_patches(pixels, side).flatten(0, 1).reshape(-1, 3, side, side).permute(0, 2, 3, 1).flatten(1)
    ridge = 1e-3 * torch.eye(design.shape[1], device=design.device)
    solution = torch.linalg.solve(design.T @ design / len(design) + ridge, design.T @ wanted / len(design))
    decoder.pixel_head.weight.copy_(solution[:-1].T[..., None, None])
    bias_of(decoder.pixel_head).copy_(solution[-1])
