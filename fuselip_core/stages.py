"""One short function a stage: the table of contents of the project.

prepare → codebook → tokenize → train → evaluate → register. Each reads what the stage before it wrote below
`settings.artifacts`, writes its own folder there, and returns a summary of plain values.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError
from fuselip_core.files import atomic_folder, read_numbers, replace_folder, write_json

if TYPE_CHECKING:
    import torch

    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.data.tokens.store import TokenStore
    from fuselip_core.model.hub import Model
    from fuselip_core.training.loop import Validate

CODEBOOK_IMAGES = 20_000  # enough to train a codebook on, and 4 GB as pixels of 256 x 256
VALIDATION_PAIRS = 512


def prepare(settings: Settings) -> dict[str, Any]:
    """Raw data set → Parquet shards and manifest in prepared/."""
    from fuselip_core.data.prepare.prepare import prepare_data

    manifest = prepare_data(settings.prepare, settings.artifacts / "prepared", settings.artifacts / "work" / "prepared")
    return {"counts": manifest["counts"], "quarantine": manifest["quarantine"]}


def codebook(settings: Settings) -> dict[str, Any]:
    """Prepared images → an image tokenizer in codebook/, with its reconstruction error and use of codes."""
    from fuselip_core.data.shards.in_order import PixelCache
    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.model.titok import TiTok
    from fuselip_core.tokenizer.codebook import CodebookTrainer, codebook_run_folder, open_perception
    from fuselip_core.tokenizer.measure import measure_codebook, save_reconstructions
    from fuselip_core.tracking.run import open_run
    from fuselip_core.training.checkpoint import Checkpoints

    prepared = PreparedData(settings.artifacts / "prepared")
    scratch = settings.artifacts / "work" / "codebook"
    tokenizer: TiTok = _new_tokenizer(settings).to(_device())
    checkpoints = Checkpoints(
        codebook_run_folder(scratch / "checkpoints", settings.codebook, tokenizer, prepared.data_version)
    )
    size = tokenizer.config.image_size
    train = PixelCache(scratch / "train.npy", prepared, "train", size, CODEBOOK_IMAGES)
    held_out = PixelCache(scratch / "held_out.npy", prepared, _validation_split(prepared.splits), size, 1000)
    with open_run(settings, "codebook", resume=checkpoints.latest() is not None) as run:

        def log(step: int, metrics: dict[str, float]) -> None:
            run.metrics(metrics, step)

        modalities = _modalities(prepared, len(held_out))
        # A tokenizer that is adapted is measured before as well: an error that rises for one modality must show.
        adapted = settings.codebook.init is not None and settings.codebook.steps > 0
        before = measure_codebook(tokenizer, held_out, modalities, "codebook/before") if adapted else {}
        CodebookTrainer(
            tokenizer, train, settings.codebook, checkpoints, log, open_perception(settings.codebook, _device())
        ).run()
        measured = before | measure_codebook(tokenizer, held_out, modalities)
        with atomic_folder(settings.artifacts / "codebook") as folder:
            tokenizer.save(folder)
            write_json(folder / "codebook.json", measured)
            if tokenizer.reconstructs:
                save_reconstructions(tokenizer, held_out, folder / "reconstructions.png")
        run.metrics(measured, settings.codebook.steps)
        if tokenizer.reconstructs:
            run.artifact(settings.artifacts / "codebook" / "reconstructions.png")
    shutil.rmtree(scratch, ignore_errors=True)
    return measured


def tokenize(settings: Settings) -> dict[str, Any]:
    """Prepared images and texts → codes and ids in tokens/."""
    from fuselip_core.tokenizer.tokenize import open_tokenizing

    work = open_tokenizing(settings)
    counts = work.run()
    replace_folder(work.target, settings.artifacts / "tokens")
    return counts


def train(settings: Settings) -> dict[str, Any]:
    """Stored tokens → a trained encoder in model/ and its curves in history.jsonl; resumes from checkpoints/."""
    from fuselip_core.data.tokens.store import TokenStore
    from fuselip_core.distributed import join_world
    from fuselip_core.encoding.open import open_training
    from fuselip_core.model.titok import TiTok
    from fuselip_core.tracking.run import open_run
    from fuselip_core.training.build import build_model, interpolate, trained_weights
    from fuselip_core.training.checkpoint import Checkpoints, History, seed_everything
    from fuselip_core.training.loop import Trainer, run_folder

    _same_codebook(TokenStore(settings.artifacts / "tokens", "train"), settings.artifacts / "codebook")
    _refuse_own_output(settings)
    tokenizer = TiTok.load(settings.artifacts / "codebook")
    world, device = join_world(), _device()
    seed_everything(settings.train.seed)
    model = build_model(settings.model, settings.train, tokenizer)
    before = trained_weights(model) if settings.train.interpolate < 1 else None
    model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` in a way that hides its arguments
    store, encoder = open_training(model, settings.artifacts, settings.train, device, world)
    all_checkpoints = settings.artifacts / "checkpoints"
    checkpoints = Checkpoints(run_folder(all_checkpoints, settings.train, store), settings.train.keep_checkpoints)
    if not world.leads:
        return Trainer(encoder, store, settings.train, checkpoints, _quietly, world=world).run().metrics()
    history = History(checkpoints.folder / "history.jsonl", checkpoints)
    with open_run(settings, "train", resume=history.resumed_step > 0) as run:
        # By reference: where they are is known, and no tracking server has to hold gigabytes.
        run.params({"checkpoints": str(checkpoints.folder), "model_folder": str(settings.artifacts / "model")})

        def log(step: int, metrics: dict[str, float]) -> None:
            history.add(step, metrics)
            run.metrics(metrics, step)

        done = Trainer(encoder, store, settings.train, checkpoints, log, _validation(settings, model), world).run()
        if before:
            interpolate(model, before, settings.train.interpolate)
        summary = done.metrics() | {"model/parameters": float(sum(p.numel() for p in model.parameters()))}
        _save_trained(settings, model, tokenizer, summary)
        history.publish(settings.artifacts / "history.jsonl")
        run.metrics(summary, done.steps)
    shutil.rmtree(checkpoints.folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # not empty: an interrupted run with other settings can still go on
        all_checkpoints.rmdir()
    shutil.rmtree(settings.artifacts / "work" / "pixels", ignore_errors=True)
    return summary


def evaluate(settings: Settings) -> dict[str, Any]:
    """Trained encoder → measures beside chance and controls in metrics.json, and a page to read in report/."""
    from fuselip_core.data.shards.reader import PreparedData
    from fuselip_core.encoding.open import open_measuring
    from fuselip_core.evaluation.before_after import measure_adaptation
    from fuselip_core.evaluation.candidates import measure_candidates
    from fuselip_core.evaluation.report.page import write_report
    from fuselip_core.evaluation.tasks import evaluate as measure
    from fuselip_core.evaluation.transformations import measure_transformations
    from fuselip_core.model.embedder import Embedder
    from fuselip_core.model.hub import load_pretrained
    from fuselip_core.tracking.run import open_run

    artifacts = settings.artifacts
    made = read_numbers(_trained_model(settings) / "training.json")
    made |= read_numbers(artifacts / "codebook" / "codebook.json")
    model, processor = load_pretrained(_trained_model(settings), _device())
    store, encoder = open_measuring(model, artifacts, settings.evaluate.split, _device())
    prepared = PreparedData(artifacts / "prepared")
    # Opened first: a wrong folder is told before anything is measured.
    with_candidates = [prepared, *map(PreparedData, settings.evaluate.candidates)]
    result = measure(encoder, store, prepared, settings.evaluate)
    embedder = Embedder(model, processor)
    for data in with_candidates:
        measure_candidates(embedder, data, settings.evaluate, result)
    measure_transformations(embedder, prepared, settings.evaluate, result)
    result.metrics.update(measure_adaptation(model, artifacts, settings.evaluate, result.metrics, _device()))
    metrics = {**result.metrics, **made}
    with open_run(settings, "evaluate") as run:
        write_report(artifacts, result, metrics, settings)
        write_json(artifacts / "metrics.json", dict(sorted(metrics.items())))
        run.metrics(metrics, int(metrics["train/steps"]))
        run.artifact(artifacts / "report", "report")
    shutil.rmtree(artifacts / "work" / "pixels", ignore_errors=True)
    return metrics


def register(settings: Settings) -> dict[str, Any]:
    """Trained and measured encoder → a version in MLflow's registry; the alias moves only if every gate passes."""
    from fuselip_core.registry.register import register_run

    return register_run(settings)


def _device() -> torch.device:
    from fuselip_core.distributed import local_device

    return local_device()


def _quietly(step: int, metrics: dict[str, float]) -> None:
    """The log of processes beside the first, which speaks for all."""


def _new_tokenizer(settings: Settings) -> Any:
    """The tokenizer to start from: random, one of this project's folders, or a published one with a new decoder."""
    from fuselip_core.model.hub import load_tokenizer
    from fuselip_core.model.presets import tokenizer_config
    from fuselip_core.model.titok import TiTok
    from fuselip_core.training.checkpoint import seed_everything

    seed_everything(settings.codebook.seed)
    if settings.codebook.init is None:
        if settings.codebook.steps == 0:
            raise FuselipError("codebook.steps is 0 and codebook.init is empty: there is no image tokenizer; set one")
        return TiTok(tokenizer_config(settings.model.size), decoder=True)
    return load_tokenizer(settings.codebook.init, decoder=True)


def _modalities(prepared: PreparedData, count: int) -> list[str | None]:
    """Modality of each of the first `count` images that the tokenizer is measured on."""
    batches = prepared.iter_images(_validation_split(prepared.splits), columns=["modality"])
    return [name for batch in batches for name in batch.column("modality").to_pylist()][:count]


def _save_trained(settings: Settings, model: Model, tokenizer: Any, summary: dict[str, float]) -> None:
    """The model with its image tokenizer, its training's numbers, and the checkpoint that it went on from."""
    from fuselip_core.model.fuselip import FuseLIPModel
    from fuselip_core.model.hub import STARTED_FROM, save_model

    folder = settings.artifacts / "model"
    if isinstance(model, FuseLIPModel):
        model.attach_image_tokenizer(tokenizer)
    save_model(model, folder)
    write_json(folder / "training.json", summary)
    if settings.train.init is not None:
        write_json(folder / STARTED_FROM, {"init": settings.train.init, "interpolate": settings.train.interpolate})


def _validation_split(splits: Any) -> str:
    """The split that training may look at: dev where the published splits are all for evaluation, else valid."""
    for split in ("dev", "valid"):
        if split in splits:
            return split
    raise FuselipError("the prepared data has no dev or valid split; set prepare.dev_share above 0")


def _validation(settings: Settings, model: Model) -> Validate:
    from fuselip_core.data.tokens.store import read_manifest
    from fuselip_core.encoding.open import open_measuring
    from fuselip_core.evaluation.tasks import quick_look

    split = _validation_split(read_manifest(settings.artifacts / "tokens")["splits"])
    store, encoder = open_measuring(model, settings.artifacts, split, _device())
    return lambda: quick_look(encoder, store, VALIDATION_PAIRS)


def _trained_model(settings: Settings) -> Path:
    folder = settings.artifacts / "model"
    if not (folder / "config.json").is_file():
        raise FuselipError(f"{folder} holds no trained model; run the train stage first")
    return folder


def _same_codebook(store: TokenStore, folder: Path) -> None:
    """Codes of another tokenizer mean other things: training on them would end in a model that cannot read images."""
    from fuselip_core.tokenizer.tokenize import codebook_id

    if store.manifest.get("codebook") != codebook_id(folder):
        raise FuselipError(
            f"{store.folder} was made with another tokenizer than {folder}; run the tokenize stage again"
        )


def _refuse_own_output(settings: Settings) -> None:
    """A checkpoint that this run would write over is gone when before and after are compared."""
    if settings.train.init and Path(settings.train.init).resolve() == (settings.artifacts / "model").resolve():
        raise FuselipError(
            f"train.init {settings.train.init} is where this run saves its own model; copy that folder elsewhere first"
        )
