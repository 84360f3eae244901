"""Removes from a recipe what the mounted data set cannot provide, so that the image trains on every layout.

Folders of JPEG and text files and the Hub's Parquet files have no concept names; prepared shards have only the pairs
that they were prepared with. Only values of the recipe are removed, each with a log line. Values from the command line
stay, and fail if the data lack them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any

from fuselip_core.config import Settings
from fuselip_core.data.prepare.extra_pairs import NAMES
from fuselip_core.data.shards.reader import PreparedData

logger = logging.getLogger("fuselip")


def without_nameless_concepts(settings: Settings, asked: Collection[str]) -> Settings:
    """Removes concept pairs if the data folder has no concept names. asked: fields set on the command line."""
    prepare = settings.prepare
    if "prepare.extra_pairs" in asked or "concepts" not in prepare.extra_pairs or (prepare.root / NAMES).is_file():
        return settings
    logger.info("%s has no %s with concept names: training without concept pairs", prepare.root, NAMES)
    kept = [kind for kind in prepare.extra_pairs if kind != "concepts"]
    return _changed(settings, "prepare", extra_pairs=kept)


def without_missing_kinds(settings: Settings, asked: Collection[str]) -> Settings:
    """Removes kinds of pairs from the mixture that the prepared training split does not have."""
    if "train.mixture" in asked:
        return settings
    there = PreparedData(settings.artifacts / "prepared").manifest["counts"].get("train", {}).get("pairs", {})
    # A name with a colon is a kind in another store, named in train.tokens.
    kept = {kind: share for kind, share in settings.train.mixture.items() if ":" in kind or there.get(kind)}
    missing = sorted(set(settings.train.mixture) - set(kept))
    if not missing or not kept:
        return settings
    logger.info("the data set has no pairs of kind %s: removed from the mixture", ", ".join(missing))
    return _changed(settings, "train", mixture=kept)


def _changed(settings: Settings, section: str, **values: Any) -> Settings:
    """A copy with other values in one section, validated."""
    part = getattr(settings, section)
    checked = type(part).model_validate({**part.model_dump(by_alias=True), **values})
    return settings.model_copy(update={section: checked})
