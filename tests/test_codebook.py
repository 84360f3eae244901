"""The image tokenizer learns, starts from patches, and survives a kill."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from training_data import SHAPES, draw

from fuselip_core.config import CodebookSettings
from fuselip_core.errors import FuselipError, Interrupted
from fuselip_core.model.processing import as_pixels
from fuselip_core.model.titok import TiTok, TiTokConfig
from fuselip_core.tokenizer.measure import measure_codebook, save_reconstructions, warn_of_collapse
from fuselip_core.tokenizer.patch_start import start_from_patches
from fuselip_core.tokenizer.trainer import CodebookTrainer, codebook_run_folder
from fuselip_core.training.checkpoint import Checkpoints

CONFIG = TiTokConfig(
    image_size=32,
    patch_size=8,
    latent_tokens=16,
    codebook_size=64,
    code_size=8,
    width=64,
    layers=2,
    heads=4,
    decoder_width=64,
    decoder_layers=2,
    decoder_heads=4,
    smooth=False,
    normalise_codes=False,
    legacy_layout=False,
)


class Pictures:
    """Images in memory, with the calls of PixelCache that training uses."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(1)
        grey = [np.asarray(draw(SHAPES[number % 4], rng)) for number in range(count)]
        self.pixels = np.stack(grey)[..., None].repeat(3, axis=-1)

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, rows: np.ndarray) -> np.ndarray:
        return self.pixels[rows]


def train(folder: Path, settings: CodebookSettings, stop_after: int | None = None) -> tuple[TiTok, list[float]]:
    torch.manual_seed(3)
    tokenizer, losses = TiTok(CONFIG, decoder=True), []
    checkpoints = Checkpoints(folder)
    trainer = CodebookTrainer(tokenizer, Pictures(32), settings, checkpoints, lambda metrics, step: None)
    original = trainer._train_step

    def step(number: int) -> dict[str, Any]:
        if number == stop_after:
            raise KeyboardInterrupt
        metrics = original(number)
        losses.append(metrics["codebook/loss"])
        if stop_after is not None:
            trainer.step = number + 1
            checkpoints.save(trainer.step, trainer._state())
        return metrics

    trainer._train_step = step
    if stop_after is None:
        trainer.run()
    else:
        with pytest.raises(KeyboardInterrupt):
            trainer.run()
    return tokenizer, losses


def _unquantised(tokenizer: TiTok, pixels: Tensor) -> Tensor:
    """What the decoder makes of latents as they are."""
    return tokenizer.decoder(tokenizer.quantize.flatten(tokenizer.encode(pixels)).transpose(1, 2))


def test_sigterm_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    settings = CodebookSettings(steps=8, batch_size=8, revive_every=3)
    whole, _ = train(tmp_path / "whole", settings)
    torch.manual_seed(3)
    cut = CodebookTrainer(
        TiTok(CONFIG, decoder=True), Pictures(32), settings, Checkpoints(tmp_path / "cut"), lambda metrics, step: None
    )
    original = cut._train_step

    def step(number: int) -> dict[str, Any]:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(number)

    cut._train_step = step
    with pytest.raises(Interrupted, match="stopped at step 5 and saved"):
        cut.run()
    resumed, losses = train(tmp_path / "cut", settings)
    assert len(losses) == 3
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_patch_start_reconstructs_before_any_step() -> None:
    torch.manual_seed(0)
    pixels = as_pixels(Pictures(64).rows(np.arange(64)), torch.device("cpu"))
    tokenizer = TiTok(CONFIG, decoder=True)
    with torch.no_grad():
        random = F.mse_loss(_unquantised(tokenizer, pixels), pixels)
        mean = F.mse_loss(pixels.mean(0, keepdim=True).expand_as(pixels), pixels)
        start_from_patches(tokenizer, pixels)
        started = F.mse_loss(_unquantised(tokenizer, pixels), pixels)
    assert started < 0.04 * mean < random


def test_training_learns_and_uses_its_codes(tmp_path: Path) -> None:
    tokenizer, _ = train(tmp_path, CodebookSettings(steps=40, batch_size=16, learning_rate=1e-3))
    measured = measure_codebook(tokenizer, Pictures(32))
    assert measured["codebook/psnr"] > 14.0  # the mean picture gives 9
    assert measured["codebook/perplexity"] > 4.0
    assert 0.0 < measured["codebook/use"] <= 1.0
    save_reconstructions(tokenizer, Pictures(32), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_a_collapsed_codebook_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="fuselip"):
        warn_of_collapse({"codebook/use": 0.1, "codebook/psnr": 17.0}, codes=50, codebook_size=200)  # 40 % of 50
        warn_of_collapse({"codebook/use": 0.9}, codes=5000, codebook_size=200)  # a decoder that was never trained
        assert not caplog.records
        warn_of_collapse({"codebook/use": 0.2, "codebook/psnr": 17.0}, codes=5000, codebook_size=200)
        warn_of_collapse({"codebook/use": 0.5, "codebook/psnr": 11.0}, codes=5000, codebook_size=200)
    assert [record.getMessage().split(";")[0] for record in caplog.records] == [
        "the codebook has collapsed (20% of the codes it could use, PSNR 17.0 dB",
        "the codebook has collapsed (50% of the codes it could use, PSNR 11.0 dB",
    ]


def test_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    settings = CodebookSettings(steps=8, batch_size=8, revive_every=3)
    whole, losses = train(tmp_path / "whole", settings)
    _, before = train(tmp_path / "cut", settings, stop_after=5)
    resumed, after = train(tmp_path / "cut", settings)
    assert before + after == losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_only_the_very_same_run_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    tokenizer, settings = TiTok(CONFIG), CodebookSettings(steps=8)
    folder = codebook_run_folder(tmp_path, settings, tokenizer, "v1")
    assert folder == codebook_run_folder(tmp_path, CodebookSettings(steps=8), TiTok(CONFIG, decoder=True), "v1")
    wider = TiTok(dataclasses.replace(CONFIG, width=128))
    others = [
        codebook_run_folder(tmp_path, CodebookSettings(steps=9), tokenizer, "v1"),
        codebook_run_folder(tmp_path, settings, wider, "v1"),
        codebook_run_folder(tmp_path, settings, tokenizer, "v2"),
    ]
    assert len({folder, *others}) == 4


def test_a_non_finite_gradient_ends_the_run_before_the_step(tmp_path: Path) -> None:
    torch.manual_seed(3)
    tokenizer = TiTok(CONFIG, decoder=True)
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    settings = CodebookSettings(steps=2, batch_size=8, init="somewhere")
    trainer = CodebookTrainer(tokenizer, Pictures(32), settings, Checkpoints(tmp_path), lambda metrics, step: None)
    tokenizer.encoder.conv_out.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(FuselipError, match=r"gradient (nan|inf) at step 0; lower codebook.learning_rate"):
        trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


def test_saved_tokenizer_gives_the_same_codes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = TiTok(CONFIG, decoder=True)
    tokenizer.save(tmp_path)
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(TiTok.load(tmp_path).codes(pixels), tokenizer.codes(pixels))
    decoded = TiTok.load(tmp_path, decoder=True).decode(tokenizer.codes(pixels))
    assert torch.equal(decoded, tokenizer.decode(tokenizer.codes(pixels)))


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    TiTok(CONFIG).save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(FuselipError, match=r"no readable checkpoint.*codebook stage"):
        TiTok.load(tmp_path)


def test_wrong_pixels_are_refused() -> None:
    with pytest.raises(FuselipError, match="takes pixels"):
        TiTok(CONFIG).encode(torch.rand(1, 3, 16, 16))


def test_perceptual_term_moves_the_tokenizer(tmp_path: Path) -> None:
    """Features of a late-fusion image tower join the loss, and the gradient reaches the tokenizer through them."""
    from fuselip_core.config import check_settings
    from fuselip_core.model.hub import save_model
    from fuselip_core.model.late_fusion import LateFusionConfig, LateFusionModel
    from fuselip_core.tokenizer.trainer import open_perception

    torch.manual_seed(0)
    save_model(LateFusionModel(LateFusionConfig.of_size("tiny", "add")), tmp_path / "tower")
    values = {"perceptual_weight": 1.0, "perceptual_model": str(tmp_path / "tower"), "steps": 1, "batch_size": 4}
    settings = check_settings({"codebook": values}, origin="test")
    perception = open_perception(settings.codebook, torch.device("cpu"))
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    F.mse_loss(perception(pixels), perception(torch.zeros(2, 3, 32, 32))).backward()
    assert pixels.grad.abs().sum() > 0
    trainers = [
        CodebookTrainer(TiTok(CONFIG, decoder=True), Pictures(4), each, Checkpoints(tmp_path), lambda *_: None, model)
        for each, model in ((settings.codebook, perception), (CodebookSettings(steps=1, batch_size=4), None))
    ]
    trainers[1].tokenizer.load_state_dict(trainers[0].tokenizer.state_dict())
    with_term, without = (trainer._train_step(0)["codebook/loss"] for trainer in trainers)
    assert with_term > without
