"""Stages one after the other where DVC is not there to say what is stale: in the training image.

A stage that ended leaves ``done/<stage>.json`` with a key of its data and settings, and of those before it.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fuselip_core import config
from fuselip_core.data.prepare.prepare import tool_version
from fuselip_core.files import write_json

# Settings that change what a stage writes, and its output.
STAGE_SECTIONS = {
    "prepare": ("prepare",),
    "codebook": ("model", "codebook"),
    "tokenize": ("model", "tokenize"),
    "train": ("model", "train"),
    "evaluate": ("evaluate",),
    "register": ("register_",),
}
OUTPUT = {"prepare": "prepared", "codebook": "codebook", "tokenize": "tokens", "train": "model", "evaluate": "report"}

logger = logging.getLogger("fuselip")


def run_stages(
    settings: config.Settings,
    stages: Sequence[str],
    fit: Callable[[config.Settings], config.Settings] = lambda settings: settings,
) -> dict[str, Any]:
    """Runs `stages` in order but for those whose data and settings are those of their last run; returns summaries.

    `fit` gets the settings when the data are prepared, and returns those that the other stages are to have.
    """
    functions = importlib.import_module("fuselip_core.stages")
    done: dict[str, Any] = {}
    key = fingerprint(settings.prepare.root) if "prepare" in stages else ""
    for stage in stages:
        key = _key(settings, stage, key)
        marker = settings.artifacts / "done" / f"{stage}.json"
        if _is_done(marker, key, settings.artifacts, stage):
            logger.info("%s: nothing has changed", stage)
            done[stage] = json.loads(marker.read_text(encoding="utf-8"))["summary"]
        else:
            marker.unlink(missing_ok=True)
            logger.info("%s: starting", stage)
            if stage != "prepare" or not take_prepared(settings):
                done[stage] = getattr(functions, stage)(settings)
            write_json(marker, {"key": key, "summary": json.loads(json.dumps(done.get(stage), default=str))})
        if stage == "prepare":
            settings = fit(settings)
    return done


def take_prepared(settings: config.Settings) -> bool:
    """Whether the mounted folder holds this project's own shards, which then stand for the prepare stage's output."""
    target, found = settings.artifacts / "prepared", own_shards(settings.prepare.root)
    if found is None:
        return False
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    target.symlink_to(found.resolve(), target_is_directory=True)
    logger.info("prepare: %s holds prepared shards, which are used as they are", found)
    return True


def own_shards(root: Path) -> Path | None:
    """The folder of this project's own shards in or below the mounted one; None if it holds another layout."""
    found = next((folder for folder in (root, root / "prepared") if (folder / "manifest.json").is_file()), None)
    return found if found and list(found.glob("images-*.parquet")) else None


def fingerprint(folder: Path) -> str:
    """Hash of names, sizes and times of all files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _key(settings: config.Settings, stage: str, before: str) -> str:
    sections = [getattr(settings, name).model_dump_json() for name in STAGE_SECTIONS[stage]]
    return hashlib.sha256(repr((tool_version(), before, stage, sections)).encode()).hexdigest()


def _is_done(marker: Path, key: str, artifacts: Path, stage: str) -> bool:
    # Registering the same model twice makes no second version, and a store may have been emptied since.
    if stage == "register" or not (artifacts / OUTPUT[stage]).exists():
        return False
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8"))["key"] == key)
    except (OSError, ValueError, KeyError):
        return False
