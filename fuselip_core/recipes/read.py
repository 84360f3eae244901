"""Recipes, settings files and overrides as nested mappings, and how one corrects the other; checked in config.py."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fuselip_core.errors import FuselipError

RECIPE_FOLDER = Path(__file__).parent
# Keys of params.yaml that steer DVC's templates and are no settings of the run.
TEMPLATE_KEYS = ("settings", "repository")
SIZES = "sizes"  # key of a recipe under which stands what is different at a size
# Two ways to say the same: a correction that uses one of them takes back the other.
ALTERNATIVES = (("steps", "epochs"), ("warmup_steps", "warmup_share"))
WHOLE = ("mixture", "tokens")  # mappings that a correction replaces as a whole


class SettingsError(FuselipError):
    """A recipe, a settings file or an override is wrong; the message says where and what to do."""

    exit_code = 2


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def recipe_title(name: str) -> str:
    """The first sentence of a recipe's own description."""
    with (RECIPE_FOLDER / f"{name}.yaml").open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()


def read_recipe(name: str, size: str | None = None) -> dict[str, Any]:
    """The nested mapping of a recipe at `size`, its own if None; raises SettingsError for an unknown name."""
    path = RECIPE_FOLDER / f"{name}.yaml"
    if path.parent != RECIPE_FOLDER or not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"unknown recipe '{name}'; {hint}there are: {', '.join(recipe_names())}")
    recipe = _read_yaml(path)
    of_sizes = recipe.pop(SIZES, None) or {}
    size = str(size or recipe["model"]["size"])
    return merge(merge(recipe, {"model": {"size": size}}), of_sizes.get(size, {}))


def corrected_recipe(corrections: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that `corrections` name, at the size they name, with all of them made."""
    size = _size_of(corrections)
    return merge(read_recipe(str(corrections["recipe"]), size), corrections)


def _size_of(corrections: Mapping[str, Any]) -> str | None:
    model = corrections.get("model")
    return model.get("size") if isinstance(model, Mapping) else None


def read_corrections(path: Path) -> dict[str, Any]:
    """What a settings file such as params.yaml says about the run, without the keys that steer DVC's templates."""
    content = _read_yaml(path)
    return {key: {} if value is None else value for key, value in content.items() if key not in TEMPLATE_KEYS}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SettingsError(f"no settings file at {path}; give another with --settings") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: other bytes than UTF-8, a date that does not exist
        raise SettingsError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of sections")
    return content


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["train.steps=100"]`` → {"train": {"steps": 100}}; raises SettingsError for one that can't be read."""
    values: dict[str, Any] = {}
    for override in overrides:
        # Overrides of one mapping add up; only against the recipe is a mapping of WHOLE one value.
        values = merge(values, _parse_override(override), whole=())
    return values


def _parse_override(text: str) -> dict[str, Any]:
    """``train.steps=100`` → {"train": {"steps": 100}}; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise SettingsError(f"'{text}' is no override; write it as section.field=value, for example train.steps=100")
    try:
        nested: Any = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"the value of '{text}' is no valid YAML") from error
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return dict(nested)


def merge(base: Mapping[str, Any], top: Mapping[str, Any], whole: Collection[str] = WHOLE) -> dict[str, Any]:
    """Deep merge of mappings; anything else in `top`, and a mapping named in `whole`, replaces what is in `base`."""
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key not in whole:
            merged[key] = merge(merged[key], value, whole)
        else:
            merged[key] = value
    for pair in ALTERNATIVES:
        for used, other in (pair, pair[::-1]):
            if top.get(used) is not None and other in base and other not in top:
                merged[other] = None
    return merged
