"""Entry point of the container images: turns a short command line into settings and runs the stages.

    bacor_fuselip_download [SOURCE]
    bacor_fuselip_train [small|base|large|tiny] [--recipe NAME] [section.field=value ...]
    bacor_fuselip_train tokenize|evaluate|embed|sync ...

`fuselip_core/stages.py` does the work. This module finds the data, skips finished stages, and reports errors in one
sentence. Exit codes: 0 done, 1 failed, 2 wrong arguments, 75 stopped with its state saved.
"""

from __future__ import annotations

import difflib
import logging
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Literal, NamedTuple, get_args

import typer

from fuselip_core import config
from fuselip_core.cli import main as cli
from fuselip_core.container.fit_recipe import without_missing_kinds, without_nameless_concepts
from fuselip_core.container.mounts import MountError, require_data, require_memory, require_writable
from fuselip_core.container.skip_done import own_shards, run_stages
from fuselip_core.errors import FuselipError, Interrupted, log_to_stderr, sentence_of
from fuselip_core.files import atomic_folder
from fuselip_core.lock import sole_process
from fuselip_core.preflight import check_prepared, check_run

SIZES = get_args(config.Size)
DATA_VOLUME = "-v $(pwd)/ROCOv2_data:/workspace/ROCOv2_data"
MODELS_VOLUME = "-v $(pwd)/trained_models:/workspace/models"
LOGS_VOLUME = "-v $(pwd)/logs:/workspace/logs"

logger = logging.getLogger("fuselip")


_APP: dict[str, Any] = {"add_completion": False, "pretty_exceptions_enable": False}
download_image, train_image = typer.Typer(**_APP), typer.Typer(**_APP)
# Verbs of the training image; without one, `train` is meant.
VERBS = ("train", "tokenize", "evaluate", "embed", "sync")
FOLDERS = (
    "Other verbs: tokenize, evaluate, embed, sync. Folders: data in /workspace/ROCOv2_data (Parquet, zip, or JPEG with "
    "text), models in /workspace/models, logs and MLflow's store in /workspace/logs unless MLFLOW_TRACKING_URI is set. "
    "docker stop saves a checkpoint (exit code 75); the same command resumes. --debug shows the traceback of an error."
)


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C arrived in a stage without checkpoints. Not an Exception, so that no handler swallows it."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs an image's command. The first argument, set by the image's entry point, says which image this is."""
    image, *words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    log_to_stderr(debug)
    _heed_signals()
    try:
        _command(image, words)
    except Stopped:
        sys.stderr.write("error: stopped; the same command resumes it\n")
        return Interrupted.exit_code
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(f"error: {sentence_of(error)}\n")
        return error.exit_code if isinstance(error, FuselipError) else 1
    return 0


def _command(image: str, words: list[str]) -> None:
    if image == "fuselip":
        sys.argv = ["fuselip", *words]
        cli.main()
        return
    if image == "download":
        _hand_over(download_image, "bacor_fuselip_download", words)
        return
    verb = words.pop(0) if words and words[0] in VERBS else "train"
    _hand_over(train_image, "bacor_fuselip_train", [verb, *words])


def _hand_over(image: typer.Typer, name: str, words: list[str]) -> None:
    """Runs a command of `image`, and turns Typer's errors about options into one sentence."""
    try:
        image(args=words, prog_name=name, standalone_mode=False)
    except Exception as error:
        if not hasattr(error, "format_message"):  # only Typer's own errors have it
            raise
        said = error.format_message().rstrip(".")
        raise config.SettingsError(f"{said}; see `{name} --help`") from error


def _heed_signals() -> None:
    """Stops on SIGTERM, which the kernel ignores for a container's first process by default, and on Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(Interrupted.exit_code)

    signal.signal(signal.SIGTERM, stop)
    # Raises SIGTERM, because the training loop replaces that handler to save a checkpoint.
    signal.signal(signal.SIGINT, lambda number, frame: signal.raise_signal(signal.SIGTERM))


# ---- the download image ------------------------------------------------------------------------------------------


@download_image.command()
def download(
    source: Annotated[str, typer.Argument(help="rocov2, rocov2-zenodo, ..., hub:OWNER/NAME")] = "rocov2",
    out: Annotated[Path | None, typer.Option(help="Folder; default: the mounted one.")] = None,
    include: Annotated[list[str] | None, typer.Option(metavar="GLOB", help="Only these files; repeatable.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit, branch or tag of a Hub data set.")] = None,
    verify: Annotated[
        Literal["quick", "full"], typer.Option(help="How to verify existing files: size, or checksum.")
    ] = "quick",
) -> None:
    """Download a data set into the mounted folder; a second call resumes, or verifies the files."""
    from fuselip_core.data.download.download import DownloadSettings
    from fuselip_core.data.download.download import download as fetch

    target = out or Path(os.environ.get("FUSELIP_DATA", "/app/fuselip/ROCOv2_data"))
    require_writable(target, f"-v $(pwd)/ROCOv2_data:{target}", _in_container())
    settings = DownloadSettings(include=tuple(include or ()), revision=revision, verify=verify)
    manifest = fetch(source, target, settings)
    _say(f"{len(manifest.files)} files, {manifest.size / 1e9:.2f} GB in {target}, all complete")


# ---- the training image ------------------------------------------------------------------------------------------


def _add_verb(verb: str, stages: Sequence[str], what: str) -> None:
    @train_image.command(verb, help=what, epilog=FOLDERS)
    def run(
        words: Annotated[
            list[str] | None,
            typer.Argument(metavar="WORD", help="Size (small, base, large, tiny), or section.field=value."),
        ] = None,
        recipe: Annotated[str | None, typer.Option(help="Recipe; default: that of the size.")] = None,
        overrides: Annotated[
            list[str] | None, typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Override one field.")
        ] = None,
        name: Annotated[str | None, typer.Option(help="Folder of the model; default: name and size.")] = None,
    ) -> None:
        _run(read_words(words or [], recipe, overrides or [], name), verb, stages)


_add_verb("train", config.STAGES, "Run all stages on the mounted data set; finished ones are skipped.")
_add_verb("tokenize", config.STAGES[:3], "Prepare and tokenize the mounted data set; `train` continues from there.")
_add_verb("evaluate", ("evaluate",), "Evaluate a trained model again; size and recipe as for `train`.")


@train_image.command()
def sync() -> None:
    """Send events that MLflow or wandb have missed; correct the paths in an MLflow store that has moved."""
    require_writable(_workspace() / "logs", LOGS_VOLUME, _in_container())
    _set_tracking_uri()
    from fuselip_core.tracking.run import sync as send

    work = _work_folder()
    names = sorted(path.name for path in work.iterdir()) if work.is_dir() else []
    if unsent := [name for name in names if send(work / name)]:
        raise FuselipError(f"not all events of {', '.join(unsent)} were sent; check MLFLOW_TRACKING_URI and try again")
    _say(f"all events sent: {', '.join(names) or 'there are no runs yet'}")


@train_image.command()
def embed(
    model: Annotated[str, typer.Argument(help="Name of a folder in /workspace/models, a folder, or a hub id.")],
    archive: Annotated[Path, typer.Argument(help="Folder of pictures or DICOM files, prepared data, or a table.")],
    out: Annotated[Path | None, typer.Option(help="Parquet file; default: logs/embeddings.parquet.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 64,
) -> None:
    """Write embeddings of an archive to a Parquet file."""
    out = out or _workspace() / "logs" / "embeddings.parquet"
    require_writable(out.parent, LOGS_VOLUME, _in_container())
    from fuselip_core import Embedder
    from fuselip_core.search.embed import embed_archive

    _say_device()
    folder = _workspace() / "models" / model
    embedder = Embedder.from_pretrained(folder if folder.is_dir() else model)
    _say(f"{out}: {embed_archive(archive, out, embedder, batch_size).sentence()}")


def _run(given: Asked, verb: str, stages: Sequence[str]) -> None:
    settings, name, asked = given
    workspace, work = _workspace(), settings.artifacts
    models, logs = workspace / "models", workspace / "logs"
    for folder, volume in ((models, MODELS_VOLUME), (logs, LOGS_VOLUME)):
        require_writable(folder, volume, _in_container())
    if "prepare" in stages:
        require_data(settings.prepare.root, DATA_VOLUME)
        require_memory(settings.model.size, stages)
    elif not (work / "model").is_dir():
        raise FuselipError(f"there is no trained model in {work}; run `train` with the same size and recipe first")
    _set_tracking_uri()
    (logs / name).mkdir(parents=True, exist_ok=True)
    _keep_log(logs / name / f"{verb}.log")
    work.mkdir(parents=True, exist_ok=True)
    busy = MountError(f"another container is using {work}; wait for it or stop it")
    delivered: list[str] = []

    def deliver(stage: str, summary: Any) -> None:
        if line := _publish(stage, summary, work, models / name, logs / name):
            delivered.append(line)

    def fit(prepared: config.Settings) -> config.Settings:
        fitted = without_missing_kinds(prepared, asked)
        check_prepared(fitted, stages)
        return fitted

    with sole_process(work / ".lock", busy):
        check_run(settings, stages)
        _say_device()
        if "prepare" in stages and own_shards(settings.prepare.root) is None:
            settings = without_nameless_concepts(settings, asked)
        try:
            run_stages(settings, stages, fit, deliver, force=verb == "evaluate")
        finally:
            # Also if a later stage failed, such as registering.
            for line in delivered:
                _say(line)


class Asked(NamedTuple):
    """A parsed command line: settings, name of the run's folders, and the fields set explicitly, as train.steps."""

    settings: config.Settings
    name: str
    fields: frozenset[str]


def read_words(words: Sequence[str], recipe: str | None, more: Sequence[str], name: str | None) -> Asked:
    """Parses words (a size, overrides) and options; raises SettingsError with a hint for a wrong one."""
    sizes = [word for word in words if "=" not in word]
    for word in sizes:
        if word not in SIZES:
            near = difflib.get_close_matches(word, [*SIZES, *VERBS], n=1)
            hint = f"did you mean {near[0]}?" if near else "write overrides as section.field=value"
            raise config.SettingsError(f"'{word}' is neither a size ({', '.join(SIZES)}) nor an override; {hint}")
    if len(sizes) > 1:
        raise config.SettingsError(f"the command line names the sizes {' and '.join(sizes)}; give one")
    overrides = [*(word for word in words if "=" in word), *more]
    fields = frozenset(override.partition("=")[0] for override in overrides)
    if "artifacts" in fields:
        raise config.SettingsError("artifacts cannot be set, since they are mounted; give the run a --name instead")
    size = sizes[0] if sizes else None
    recipe = recipe or recipe_of_size(size)
    root = f"prepare.root={_workspace() / 'ROCOv2_data'}"
    settings = config.load_settings(recipe=recipe, overrides=[root, *overrides], size=size)
    name = name or f"{settings.register_.name}-{settings.model.size}"
    config.check_run_name(name)
    return Asked(settings.model_copy(update={"artifacts": _work_folder() / name}), name, fields)


def recipe_of_size(size: str | None) -> str:
    """The recipe for ROCOv2 at `size` (small if None); tiny trains from scratch and needs no GPU."""
    return "rocov2-tiny" if size == "tiny" else "fuselip-rocov2"


def _publish(stage: str, summary: Any, work: Path, model: Path, logs: Path) -> str | None:
    """Copies a finished stage's results to the mounted folders; returns a line that says where they are."""
    if stage == "tokenize":
        return f"tokens: {work / 'tokens'}"
    if stage == "train":
        _replace(model, work / "model")
        shutil.copy(work / "history.jsonl", logs)
        return f"model: {model}"
    if stage == "evaluate":
        _replace(logs / "report", work / "report")
        shutil.copy(work / "metrics.json", logs)
        return f"report: {logs / 'report' / 'index.html'}"
    if stage == "register":
        shutil.copy(work / "registered.json", logs)
        shutil.copytree(work / "cards", model, dirs_exist_ok=True)
        return f"registered: {summary['name']} version {summary['version']} on {summary['tracking_uri']}"
    return None


def _replace(target: Path, source: Path) -> None:
    with atomic_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def _say_device() -> None:
    import torch

    if torch.cuda.is_available():
        _say(f"training on {torch.cuda.get_device_name()}")
    else:
        _say("no GPU in this container, using the CPU (if the machine has one, add --gpus all)")


def _keep_log(path: Path) -> None:
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger().addHandler(handler)


def _say(line: str) -> None:
    logger.info("%s", line)


def _workspace() -> Path:
    return Path(os.environ.get("FUSELIP_WORKSPACE", "/workspace"))


def _work_folder() -> Path:
    return Path(os.environ.get("FUSELIP_WORK", _workspace() / "models" / ".work"))


def _set_tracking_uri() -> None:
    # An empty variable counts as unset.
    own = f"sqlite:///{_workspace() / 'logs'}/mlflow/mlflow.db"
    os.environ["MLFLOW_TRACKING_URI"] = os.environ.get("MLFLOW_TRACKING_URI") or own


def _in_container() -> bool:
    return "FUSELIP_IMAGE" in os.environ


if __name__ == "__main__":
    sys.exit(main())
