"""TiTok (arXiv 2406.07550): an image becomes K discrete tokens, and back.

The encoder reads patches and K latent tokens together and keeps the latents; each is replaced by the nearest code of a
codebook. Encoder and codebook bear the published names, so that published weights load strictly. The decoder predicts
pixels; published decoders of the first TiTok generation predict another tokenizer's codes and are not used here.

Legend: B images, S pixels a side, P patch side, G = S / P patches a side, W width, K codes an image, D code dimensions.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fuselip_core.errors import FuselipError
from fuselip_core.files import read_json, sha256_of, write_json
from fuselip_core.model.blocks import ResidualBlock, through
from fuselip_core.model.weights import read_weights, refuse_misfits, refuse_non_finite, shapes

VIT_SIZES = {"small": (512, 8, 8), "base": (768, 12, 12), "large": (1024, 24, 16)}  # width, layers, heads


@dataclass(frozen=True)
class TiTokConfig:
    """Dimensions of an image tokenizer."""

    image_size: int = 256
    patch_size: int = 16
    latent_tokens: int = 128
    codebook_size: int = 4096
    code_size: int = 12
    width: int = 512
    layers: int = 8
    heads: int = 8
    decoder_width: int = 512
    decoder_layers: int = 8
    decoder_heads: int = 8
    smooth: bool = True  # a last convolution over the decoder's pixels, as published; costly on small machines
    normalise_codes: bool = True
    # The first generation reads the (K, W) latents as if they were (W, K): kept, published weights depend on it.
    legacy_layout: bool = True

    @classmethod
    def from_published(cls, config: dict[str, Any]) -> Self:
        """Reads the `model.vq_model` section of a published TiTok configuration."""
        vq = config["model"]["vq_model"]
        width, layers, heads = VIT_SIZES[vq["vit_enc_model_size"]]
        decoder_width, decoder_layers, decoder_heads = VIT_SIZES[vq["vit_dec_model_size"]]
        return cls(
            image_size=config["dataset"]["preprocessing"]["crop_size"],
            patch_size=vq["vit_enc_patch_size"],
            latent_tokens=vq["num_latent_tokens"],
            codebook_size=vq["codebook_size"],
            code_size=vq["token_size"],
            width=width,
            layers=layers,
            heads=heads,
            decoder_width=decoder_width,
            decoder_layers=decoder_layers,
            decoder_heads=decoder_heads,
            normalise_codes=vq["use_l2_norm"],
            legacy_layout=vq.get("is_legacy", True),
        )


@dataclass
class TiTokOutput:
    """What a training step needs: `pixels` (B, 3, S, S), `codes` (B, K), and the quantiser's two scalar losses."""

    pixels: Tensor
    codes: Tensor
    commitment: Tensor
    codebook: Tensor


def bias_of(layer: nn.Conv2d) -> Tensor:
    """The bias of a convolution that was built with one, for the type checker's sake too."""
    assert layer.bias is not None
    return layer.bias


def to_patches(pixels: Tensor, side: int) -> Tensor:
    """Pixels (B, 3, S, S) → (B, G * G, 3 * P * P), the patches row by row, each in the order colour, row, column."""
    batch, colours, size, _ = pixels.shape
    grid = size // side
    x = pixels.reshape(batch, colours, grid, side, grid, side).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(batch, grid * grid, colours * side * side)


def _initial(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * shape[-1] ** -0.5)


class TiTokEncoder(nn.Module):
    """Patches and latent tokens through a vision transformer; what comes out at the latents goes to the codebook."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        width, grid = config.width, config.image_size // config.patch_size
        self.config = config
        self.patch_embed = nn.Conv2d(3, width, config.patch_size, config.patch_size)
        self.class_embedding = _initial(1, width)
        self.positional_embedding = _initial(grid**2 + 1, width)
        self.latent_token_positional_embedding = _initial(config.latent_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(ResidualBlock(width, config.heads) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(width)
        self.conv_out = nn.Conv2d(width, config.code_size, 1)

    def forward(self, pixels: Tensor, latent_tokens: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) in 0..1 and latent tokens (K, W) → latents (B, D, K), before quantisation."""
        batch, kept = pixels.shape[0], self.config.latent_tokens
        # The convolution's kernel is its stride: as one matrix product its backward pass is several times faster.
        patches = F.linear(to_patches(pixels, self.config.patch_size), self.patch_embed.weight.flatten(1))
        patches = patches + bias_of(self.patch_embed)
        begin = self.class_embedding.expand(batch, 1, -1)
        patches = torch.cat([begin, patches], dim=1) + self.positional_embedding
        latents = (latent_tokens + self.latent_token_positional_embedding).expand(batch, -1, -1)
        x = self.ln_pre(torch.cat([patches, latents], dim=1))
        x = self.ln_post(through(self.transformer, x, read=slice(-kept, None)))
        x = x.reshape(batch, x.shape[-1], kept).transpose(1, 2) if self.config.legacy_layout else x
        # As a product and not as a convolution, which a GPU rounds to TF32: codes that are near would change places.
        return F.linear(x, self.conv_out.weight.flatten(1), self.conv_out.bias).transpose(1, 2)


class Quantizer(nn.Module):
    """The codebook: each latent becomes its nearest code (VQ-VAE, arXiv 1711.00937)."""

    def __init__(self, codebook_size: int, code_size: int, normalise: bool) -> None:
        super().__init__()
        self.normalise = normalise
        self.embedding = nn.Embedding(codebook_size, code_size)
        nn.init.uniform_(self.embedding.weight, -1.0 / codebook_size, 1.0 / codebook_size)

    def vectors(self) -> Tensor:
        """Codebook (codebook_size, D) as it is compared: on the unit sphere where codes are normalised."""
        weight = self.embedding.weight
        return F.normalize(weight, dim=-1) if self.normalise else weight

    def flatten(self, latents: Tensor) -> Tensor:
        """Latents (B, D, K) → rows (B, K, D) as they are compared with the codebook."""
        rows = latents.transpose(1, 2)
        return F.normalize(rows, dim=-1) if self.normalise else rows

    def nearest(self, rows: Tensor) -> Tensor:
        """Rows (..., D) → index (...) int64 of the nearest code in Euclidean distance."""
        codes = self.vectors()
        distance = codes.square().sum(-1) - 2.0 * rows @ codes.T  # the rows' own norm changes no order
        return distance.argmin(dim=-1)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Latents (B, D, K) → quantised (B, D, K), codes (B, K), commitment loss, codebook loss.

        The gradient passes the quantisation straight through.
        """
        rows = self.flatten(latents)
        codes = self.nearest(rows.detach())
        chosen = F.embedding(codes, self.vectors())
        commitment = F.mse_loss(rows, chosen.detach())
        codebook = F.mse_loss(chosen, rows.detach())
        quantised = rows + (chosen - rows).detach()
        return quantised.transpose(1, 2), codes, commitment, codebook


class TiTokDecoder(nn.Module):
    """Codes and one mask token a patch through a vision transformer; each patch place becomes its pixels."""

    def __init__(self, config: TiTokConfig) -> None:
        super().__init__()
        width, self.grid = config.decoder_width, config.image_size // config.patch_size
        self.patch_size = config.patch_size
        self.decoder_embed = nn.Linear(config.code_size, width)
        self.class_embedding = _initial(1, width)
        self.mask_token = _initial(1, 1, width)
        self.positional_embedding = _initial(self.grid**2 + 1, width)
        self.latent_token_positional_embedding = _initial(config.latent_tokens, width)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(
            ResidualBlock(width, config.decoder_heads) for _ in range(config.decoder_layers)
        )
        self.ln_post = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Conv2d(width, 3 * config.patch_size**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1) if config.smooth else None
        if self.conv_out is not None:
            nn.init.dirac_(self.conv_out.weight)
            nn.init.zeros_(bias_of(self.conv_out))

    @property
    def pixel_head(self) -> nn.Conv2d:
        """The 1 x 1 convolution from features to the pixels of a patch, published as `ffn.0`."""
        layer = self.ffn[0]
        assert isinstance(layer, nn.Conv2d)
        return layer

    def place_features(self, quantised: Tensor) -> Tensor:
        """Quantised latents (B, D, K) → features (B, G * G, W) of the patch places, before they become pixels."""
        batch = quantised.shape[0]
        latents = self.decoder_embed(quantised.transpose(1, 2)) + self.latent_token_positional_embedding
        places = self.mask_token.expand(batch, self.grid**2, -1)
        begin = self.class_embedding.expand(batch, 1, -1)
        places = torch.cat([begin, places], dim=1) + self.positional_embedding
        x = self.ln_pre(torch.cat([places, latents], dim=1))
        return self.ln_post(through(self.transformer, x, read=slice(1, 1 + self.grid**2)))

    def forward(self, quantised: Tensor) -> Tensor:
        """Quantised latents (B, D, K) → pixels (B, 3, S, S), not clamped."""
        batch = quantised.shape[0]
        head = self.pixel_head
        x = F.linear(self.place_features(quantised), head.weight.flatten(1), head.bias)
        # The published channel order of a patch is (row, column, colour).
        x = x.reshape(batch, self.grid, self.grid, self.patch_size, self.patch_size, 3)
        x = x.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, self.grid * self.patch_size, self.grid * self.patch_size)
        return self.conv_out(x) if self.conv_out is not None else x


class TiTok(nn.Module):
    """The whole tokenizer; `decoder=False` leaves out what only reconstruction needs."""

    def __init__(self, config: TiTokConfig, decoder: bool = False) -> None:
        super().__init__()
        self.config = config
        self.latent_tokens = _initial(config.latent_tokens, config.width)
        self.encoder = TiTokEncoder(config)
        self.quantize = Quantizer(config.codebook_size, config.code_size, config.normalise_codes)
        self.decoder = TiTokDecoder(config) if decoder else None
        self.reconstructs = decoder  # false where the decoder is still as it was drawn, beside a published encoder

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) float in 0..1 → latents (B, D, K) before quantisation."""
        expected = (3, self.config.image_size, self.config.image_size)
        if pixels.ndim != 4 or tuple(pixels.shape[1:]) != expected:
            raise FuselipError(f"the image tokenizer takes pixels (B, {expected}), not {tuple(pixels.shape)}")
        return self.encoder(pixels, self.latent_tokens)

    def codes(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) float in 0..1 → codes (B, K) int64."""
        return self.quantize.nearest(self.quantize.flatten(self.encode(pixels)))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, K) of any integer type → pixels (B, 3, S, S) in 0..1."""
        if self.decoder is None:
            raise FuselipError("this tokenizer has no decoder; train one with the codebook stage")
        chosen = F.embedding(codes.to(torch.int64), self.quantize.vectors())
        return self.decoder(chosen.transpose(1, 2)).clamp(0, 1)

    def forward(self, pixels: Tensor) -> TiTokOutput:
        """One training pass over pixels (B, 3, S, S) in 0..1."""
        if self.decoder is None:
            raise FuselipError("this tokenizer has no decoder, so it cannot be trained to reconstruct")
        latents = self.encode(pixels)
        with torch.autocast(pixels.device.type, enabled=False):  # in half precision near codes would change places
            quantised, codes, commitment, codebook = self.quantize(latents.float())
        return TiTokOutput(self.decoder(quantised), codes, commitment, codebook)

    def save(self, folder: Path) -> None:
        """Writes `config.json` and `model.safetensors` into an existing folder; CheckpointError if not all finite."""
        weights = self.state_dict()
        refuse_non_finite(weights, "the image tokenizer", "it is not saved; lower codebook.learning_rate")
        write_json(folder / "config.json", dataclasses.asdict(self.config))
        safetensors.torch.save_file(weights, folder / "model.safetensors")
        (folder / "model.safetensors").chmod(0o644)  # safetensors lets only the owner read; containers may be others

    @classmethod
    def load(cls, folder: Path, decoder: bool = False) -> Self:
        """Reads what `save` wrote; raises FuselipError where a file is missing, damaged or does not fit."""
        remedy = "run the codebook stage"
        try:
            config = TiTokConfig(**read_json(folder / "config.json", remedy))
        except TypeError as error:
            raise FuselipError(f"{folder} describes no image tokenizer ({error}); {remedy}") from error
        tokenizer, weights = cls(config, decoder=decoder), read_weights(folder, remedy)
        if not decoder:
            weights = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
        refuse_misfits(shapes(tokenizer.state_dict()), shapes(weights), folder)
        tokenizer.load_state_dict(weights)
        return tokenizer


def codebook_id(folder: Path) -> str:
    """What names the image tokenizer in `folder`: the beginning of its weights' hash."""
    return sha256_of(folder / "model.safetensors")[:16]
