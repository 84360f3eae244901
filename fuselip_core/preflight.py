"""Checks in the first seconds of a run what it would otherwise miss after hours; every complaint names the field.

Needs no torch, so that a flow can check on a machine whose stages run in containers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

from fuselip_core.config import Settings
from fuselip_core.data.shards.reader import PreparedData, validation_split
from fuselip_core.data.tokens.store import read_manifest
from fuselip_core.errors import FuselipError
from fuselip_core.model.fetch import fetch
from fuselip_core.tracking.run import services_from_environment
from fuselip_core.tracking.store import require_answer, store_folder, tracking_uri

HELD_OUT = ("valid", "dev")  # evaluated if the wanted split is missing
GIGABYTE = 1e9
# Weights of the larger family of each size, image tokenizer included, as float32. A checkpoint holds them three times.
WEIGHTS_GB = {"tiny": 0.05, "small": 0.4, "base": 1.0, "large": 2.1}


def check_run(settings: Settings, stages: Collection[str], root: Path = Path()) -> None:
    """Raises FuselipError that lists what `stages` lack, as far as this is known before the first one.

    root: folder that the settings' paths are relative to. `check_prepared` checks the data.
    """
    services_from_environment()
    complaints = [
        *_checkpoints(settings, stages, root),
        *_stores(settings, stages, root),
        *_measures(settings, stages, root),
        *_space(settings, stages, root),
        *_compiling(settings, stages),
    ]
    if complaints:
        raise FuselipError("; ".join(complaints))
    if "register" in stages:  # last, since a new store takes seconds
        require_answer(tracking_uri())


def check_prepared(settings: Settings, stages: Collection[str], root: Path = Path()) -> None:
    """Raises FuselipError if the prepared data lack splits or kinds of pairs that `stages` need."""
    data = PreparedData(root / settings.artifacts / "prepared")
    complaints = []
    if "train" in stages:
        validation_split(data.splits)
        there = data.manifest["counts"].get("train", {}).get("pairs", {})
        wanted = [kind for kind, weight in settings.train.mixture.items() if weight > 0 and ":" not in kind]
        if missing := [kind for kind in wanted if not there.get(kind)]:
            complaints.append(
                f"{data.folder} has no training pairs of kind {', '.join(missing)}, which train.mixture names, but "
                f"only: {', '.join(there) or 'none'}; change train.mixture or prepare.extra_pairs"
            )
    if "evaluate" in stages and not {settings.evaluate.split, *HELD_OUT} & set(data.splits):
        complaints.append(
            f"{data.folder} has no split {settings.evaluate.split}, valid or dev to evaluate; set evaluate.split to "
            f"one of {', '.join(data.splits)}, or prepare.dev_share above 0"
        )
    if complaints:
        raise FuselipError("; ".join(complaints))


def _checkpoints(settings: Settings, stages: Collection[str], root: Path) -> Iterator[str]:
    codebook, train = settings.codebook, settings.train
    if "codebook" in stages and codebook.steps == 0 and codebook.init is None:
        yield "codebook.steps is 0 and codebook.init is empty, so there is no image tokenizer; set one of them"
    named = {
        "codebook.init": codebook.init if "codebook" in stages else None,
        "codebook.perceptual_model": codebook.perceptual_model if "codebook" in stages else None,
        "train.init": train.init if "train" in stages else None,
    }
    for name in dict.fromkeys(filter(None, named.values())):
        fields = " and ".join(field for field, value in named.items() if value == name)
        try:
            folder = fetch(root / name if (root / name).is_dir() else name, weights=False)
        except FuselipError as error:
            yield f"{fields}: {error}"
        except ImportError:  # huggingface_hub is missing, as on a machine whose stages run in containers
            return
        else:
            if not any((folder / file).is_file() for file in ("config.json", "open_clip_config.json")):
                yield f"{fields}: {folder} has no config.json, so it is not a checkpoint; give another folder"


def _stores(settings: Settings, stages: Collection[str], root: Path) -> Iterator[str]:
    for name, folder in settings.train.tokens.items() if "train" in stages else ():
        try:
            if "train" not in read_manifest(root / folder)["splits"]:
                yield f"train.tokens.{name}: {folder} has no split train; name another token store"
        except FuselipError as error:
            yield f"train.tokens.{name}: {error}"


def _measures(settings: Settings, stages: Collection[str], root: Path) -> Iterator[str]:
    wanted = settings.evaluate
    if "evaluate" not in stages:
        return
    for folder in wanted.candidates:
        try:
            PreparedData(root / folder)
        except FuselipError as error:
            yield f"evaluate.candidates: {error}"
    if wanted.retention is None:
        return
    if settings.train.init is None:
        yield "evaluate.retention compares with the checkpoint of train.init, which is empty; set it, or leave it out"
    try:
        splits = read_manifest(root / wanted.retention / "tokens")["splits"]
        if not {"test", *HELD_OUT} & set(splits):
            yield f"evaluate.retention: {wanted.retention} has no held-out split; prepare it with prepare.dev_share"
    except FuselipError as error:
        yield f"evaluate.retention: {error}"


def _space(settings: Settings, stages: Collection[str], root: Path) -> Iterator[str]:
    weights = WEIGHTS_GB[settings.model.size]
    if "train" in stages:
        # The next checkpoint and the model are written before old ones are deleted.
        needed = weights * (3 * (settings.train.keep_checkpoints + 1) + 2)
        yield from _too_small(root / settings.artifacts, needed, "checkpoints and model; see train.keep_checkpoints")
    store = store_folder(tracking_uri())
    if "register" in stages and store:
        yield from _too_small(store, weights, "the registered model; see MLFLOW_TRACKING_URI")


def _too_small(folder: Path, needed: float, what: str) -> Iterator[str]:
    there = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free / GIGABYTE
    if free < needed:
        sizes = f"about {needed:.1f} GB are needed and {free:.1f} are free"
        yield f"no space is left on the disk at {folder}: {sizes} ({what})"


def _compiling(settings: Settings, stages: Collection[str]) -> Iterator[str]:
    if "train" not in stages or not settings.train.compile:
        return
    # Where torch writes compiled code and loads it from.
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()
    if Path(folder).is_dir() and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        yield (
            f"train.compile runs code from {folder}, which is mounted noexec; set TORCHINDUCTOR_CACHE_DIR to another "
            "folder (in a container: --tmpfs /tmp:exec), or train.compile=false"
        )
