"""How well an image tokenizer reconstructs held-out images, and how much of its codebook it uses."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fuselip_core.data.shards.in_order import PixelCache
from fuselip_core.model.processing import as_pixels
from fuselip_core.model.titok import TiTok

logger = logging.getLogger("fuselip")
LEAST_USE = 0.25  # share of codes
LEAST_PSNR = 12.0  # dB; the mean of all images gives 9 to 12


def _batches(images: PixelCache, device: torch.device, size: int = 64) -> Iterator[Tensor]:
    for first in range(0, len(images), size):
        yield as_pixels(images.rows(np.arange(first, min(first + size, len(images)))), device)


@torch.no_grad()
def measure_codebook(
    tokenizer: TiTok, images: PixelCache, modalities: Sequence[str | None] = (), name: str = "codebook"
) -> dict[str, float]:
    """Use of the codes over all `images`, and the reconstruction error of all and of each of their `modalities`.

    `use` is the share of codes that occur at all, `perplexity` the exponential of the entropy of their frequencies.
    There is no error of a tokenizer whose decoder was never trained, which would say nothing about its codes.
    """
    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.float64, device=device)
    errors: list[Tensor] = []
    for pixels in _batches(images, device):
        codes = tokenizer.codes(pixels)
        if tokenizer.reconstructs:
            errors.append(_errors(tokenizer.decode(codes), pixels))
        counts += torch.bincount(codes.flatten(), minlength=len(counts))
    frequency = counts / counts.sum()
    entropy = -(frequency * frequency.clamp_min(1e-12).log()).sum().item()
    found = _by_modality(name, torch.cat(errors).numpy(), modalities) if errors else {}
    return found | {
        f"{name}/use": (counts > 0).double().mean().item(),
        f"{name}/perplexity": math.exp(entropy),
    }


def warn_of_collapse(measured: Mapping[str, float], codes: int, codebook_size: int) -> None:
    """Says when a codebook has collapsed, and what to do; `codes` is the number of codes that were measured."""
    used, psnr = measured["codebook/use"] / min(1.0, codes / codebook_size), measured.get("codebook/psnr", math.inf)
    if used < LEAST_USE or psnr < LEAST_PSNR:
        found = f"{used:.0%} of the codes it could use" + (f", PSNR {psnr:.1f} dB" if math.isfinite(psnr) else "")
        logger.warning(
            "the codebook has collapsed (%s; below %.0f %% or %.0f dB images look alike): train it longer "
            "(codebook.steps), with a lower codebook.learning_rate, or start from a published one (codebook.init)",
            *(found, 100 * LEAST_USE, LEAST_PSNR),
        )


def _errors(predicted: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of each image, (B) float64 on the CPU."""
    return F.mse_loss(predicted, pixels, reduction="none").mean(dim=(1, 2, 3)).double().cpu()


def _by_modality(name: str, errors: np.ndarray, modalities: Sequence[str | None]) -> dict[str, float]:
    found = _error(name, "", errors)
    for modality in sorted({each for each in modalities if each}):
        found |= _error(name, f"/{modality}", errors[np.array(modalities) == modality])
    return found


def _error(name: str, part: str, errors: np.ndarray) -> dict[str, float]:
    mse = float(errors.mean())
    return {f"{name}/reconstruction_mse{part}": mse, f"{name}/psnr{part}": -10.0 * math.log10(max(mse, 1e-12))}


@torch.no_grad()
def save_reconstructions(tokenizer: TiTok, images: PixelCache, path: Path, columns: int = 8) -> None:
    """A picture: `columns` originals, spread over `images`, and below each what its codes give back."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tokenizer.eval()
    device = next(tokenizer.parameters()).device
    rows = np.unique(np.linspace(0, len(images) - 1, min(columns, len(images))).astype(int))
    originals = as_pixels(images.rows(rows), device)
    restored = tokenizer.decode(tokenizer.codes(originals))
    figure, axes = pyplot.subplots(2, len(rows), figsize=(1.6 * len(rows), 3.5), squeeze=False)
    for title, axis_row, pictures in (("original", axes[0], originals), ("from codes", axes[1], restored)):
        for axis, picture in zip(axis_row, pictures, strict=True):
            axis.imshow(picture.permute(1, 2, 0).cpu().numpy())
            axis.set_xticks([])
            axis.set_yticks([])
        axis_row[0].set_ylabel(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
