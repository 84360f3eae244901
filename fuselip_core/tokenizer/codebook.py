"""The codebook stage: an image tokenizer is trained from scratch, fine-tuned to radiology, or taken over as it is."""

from __future__ import annotations

import shutil

from fuselip_core.config import Settings
from fuselip_core.data.shards.in_order import PixelCache
from fuselip_core.data.shards.reader import PreparedData, validation_split
from fuselip_core.distributed import local_device
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_folder, write_json
from fuselip_core.model.hub import load_tokenizer
from fuselip_core.model.presets import tokenizer_config
from fuselip_core.model.titok import TiTok
from fuselip_core.tokenizer.measure import measure_codebook, save_reconstructions, warn_of_collapse
from fuselip_core.tokenizer.trainer import CodebookTrainer, codebook_run_folder, open_perception
from fuselip_core.tracking.run import open_run
from fuselip_core.training.checkpoint import Checkpoints, seed_everything

TRAINING_IMAGES = 20_000  # enough to train a codebook on, and 4 GB as pixels of 256 x 256
HELD_OUT_IMAGES = 1000


def train_codebook(settings: Settings) -> dict[str, float]:
    """Prepared images → an image tokenizer in codebook/; returns its reconstruction error and use of codes."""
    prepared = PreparedData(settings.artifacts / "prepared")
    scratch = settings.artifacts / "work" / "codebook"
    tokenizer = _new_tokenizer(settings).to(local_device())
    checkpoints = Checkpoints(
        codebook_run_folder(scratch / "checkpoints", settings.codebook, tokenizer, prepared.data_version)
    )
    size, split = tokenizer.config.image_size, validation_split(prepared.splits)
    train = PixelCache(scratch / "train.npy", prepared, "train", size, TRAINING_IMAGES)
    held_out = PixelCache(scratch / "held_out.npy", prepared, split, size, HELD_OUT_IMAGES)
    batches = prepared.iter_images(split, columns=["modality"])
    modalities = [name for batch in batches for name in batch.column("modality").to_pylist()][: len(held_out)]
    with open_run(settings, "codebook", resume=checkpoints.latest() is not None) as run:
        # A tokenizer that is fine-tuned is also measured before: an error that rises for one modality must show.
        fine_tuned = settings.codebook.init is not None and settings.codebook.steps > 0
        before = measure_codebook(tokenizer, held_out, modalities, "codebook/before") if fine_tuned else {}
        perception = open_perception(settings.codebook, local_device())
        CodebookTrainer(tokenizer, train, settings.codebook, checkpoints, run.metrics, perception).run()
        measured = before | measure_codebook(tokenizer, held_out, modalities)
        warn_of_collapse(measured, len(held_out) * tokenizer.config.latent_tokens, tokenizer.config.codebook_size)
        with atomic_folder(settings.artifacts / "codebook") as folder:
            tokenizer.save(folder)
            write_json(folder / "codebook.json", measured)
            if tokenizer.reconstructs:
                save_reconstructions(tokenizer, held_out, folder / "reconstructions.png")
        run.results(measured)
        if tokenizer.reconstructs:
            run.artifact(settings.artifacts / "codebook" / "reconstructions.png")
    shutil.rmtree(scratch, ignore_errors=True)
    return measured


def _new_tokenizer(settings: Settings) -> TiTok:
    """The tokenizer to start from: random, one of this project's folders, or a published one with a new decoder."""
    seed_everything(settings.codebook.seed)
    wanted = settings.codebook
    if wanted.init is not None:
        return load_tokenizer(wanted.init, decoder=True)
    if wanted.steps == 0:
        raise FuselipError("codebook.steps is 0 and codebook.init is empty: there is no image tokenizer; set one")
    config = tokenizer_config(settings.model.size, wanted.image_size, wanted.patch_size, wanted.codes)
    return TiTok(config, decoder=True)
