"""Runs stages in the training image, which has no DVC, and skips those whose data and settings have not changed.

A finished stage leaves ``done/<stage>.json`` with a hash of its data and settings and those of all earlier stages.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fuselip_core import config, stages
from fuselip_core.data.prepare.prepare import tool_version
from fuselip_core.data.shards.reader import MANIFEST, PreparedData
from fuselip_core.files import find_json, write_json

OUTPUT = {"prepare": "prepared", "codebook": "codebook", "tokenize": "tokens", "train": "model", "evaluate": "report"}

logger = logging.getLogger("fuselip")


def run_stages(
    settings: config.Settings,
    names: Sequence[str],
    fit: Callable[[config.Settings], config.Settings] = lambda settings: settings,
    deliver: Callable[[str, Any], None] = lambda stage, summary: None,
    force: bool = False,
) -> None:
    """Runs the stages `names` in order, except those whose data and settings have not changed since their last run.

    fit: called with the settings after `prepare`, returns those for the other stages. deliver: called with the name and
    summary of each stage when its output exists. force: run finished stages again.
    """
    before = config.STAGES[: config.STAGES.index(names[0])]
    key = _key_in(settings, before[-1]) if before else fingerprint(settings.prepare.root)
    for stage in names:
        key = _key(settings, stage, key)
        marker = _marker(settings, stage)
        # Always run `register`: it adds no second version of a model, and the store may have been emptied since.
        is_done = stage != "register" and (settings.artifacts / OUTPUT[stage]).exists()
        if is_done and not force and _key_in(settings, stage) == key:
            logger.info("%s: nothing has changed", stage)
        else:
            marker.unlink(missing_ok=True)
            logger.info("%s: starting", stage)
            taken = stage == "prepare" and take_prepared(settings)
            summary = None if taken else getattr(stages, stage)(settings)
            write_json(marker, {"key": key, "summary": json.loads(json.dumps(summary, default=str))})
        deliver(stage, find_json(marker)["summary"])
        if stage == "prepare":
            settings = fit(settings)


def take_prepared(settings: config.Settings) -> bool:
    """Uses prepared shards in the mounted folder as the output of `prepare`; False if there are none."""
    target, found = settings.artifacts / "prepared", own_shards(settings.prepare.root)
    if found is None:
        return False
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    target.symlink_to(found.resolve(), target_is_directory=True)
    logger.info("prepare: using the prepared shards in %s", found)
    return True


def own_shards(root: Path) -> Path | None:
    """The folder of prepared shards in or below the mounted one; None if it has another layout.

    Raises DataError if shards are missing. A manifest.json of another program is ignored.
    """
    ours = (folder for folder in (root, root / "prepared") if "data_version" in find_json(folder / MANIFEST))
    return PreparedData(found).folder if (found := next(ours, None)) else None


def fingerprint(folder: Path) -> str:
    """Hash of names, sizes and times of all files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            state = path.stat()
            digest.update(f"{path.relative_to(folder)}\0{state.st_size}\0{state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _key(settings: config.Settings, stage: str, before: str) -> str:
    values = settings.model_dump(mode="json", by_alias=True)
    sections = [values[name] for name in ("model", stage) if stage != "prepare" or name == stage]
    return hashlib.sha256(repr((tool_version(), before, stage, sections)).encode()).hexdigest()


def _key_in(settings: config.Settings, stage: str) -> str:
    """The key of the stage's last run; empty if there is none."""
    return str(find_json(_marker(settings, stage)).get("key", ""))


def _marker(settings: config.Settings, stage: str) -> Path:
    return settings.artifacts / "done" / f"{stage}.json"
