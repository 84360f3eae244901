"""Recipes, settings files and overrides as nested mappings, and how one corrects the other; checked in config.py.

A recipe states only its differences from its parent (`parent: NAME`), or from base.yaml where it names none.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fuselip_core.errors import FuselipError, one_line

RECIPE_FOLDER = Path(__file__).parent
BASE = "base"  # parent of all recipes, and none itself
PARENT = "parent"  # key of a recipe that names the recipe it differs from
SIZES = "sizes"  # key of a recipe for what differs at a size
# Keys of params.yaml that only DVC's templates use.
TEMPLATE_KEYS = ("settings", "repository")
# Two ways to state the same quantity: a correction that uses one of them empties the other.
ALTERNATIVES = (("steps", "epochs"), ("warmup_steps", "warmup_share"))
WHOLE = ("mixture", "tokens")  # mappings that a correction replaces as a whole
# Plain scalars that YAML 1.1 and 1.2 read as the same value.
UNAMBIGUOUS = re.compile(
    r"true|false|[-+]?(0|[1-9]\d*)|[-+]?\.inf|\.nan|(?P<real>[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?)", re.I
)


class SettingsError(FuselipError):
    """A recipe, a settings file or an override is wrong; the message says where and what to do."""

    exit_code = 2


class Layer(NamedTuple):
    """The values that one source of settings states; `origin` is what `fuselip recipes show` calls the source."""

    origin: str
    values: Mapping[str, Any]


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml") if path.stem != BASE)


def recipe_title(name: str) -> str:
    """The first sentence of a recipe's own description."""
    with (RECIPE_FOLDER / f"{name}.yaml").open(encoding="utf-8") as stream:
        return stream.readline().lstrip("# ").strip()


def recipe_layers(name: str, size: str | None = None) -> list[Layer]:
    """What base.yaml, the recipe's parents and the recipe itself state, in the order in which they apply.

    `size` selects what each of them states for a size; the recipe's own if None. Raises SettingsError for an unknown
    recipe.
    """
    files: list[tuple[str, dict[str, Any]]] = []
    parent: str | None = name
    while parent:
        stated = _read_recipe_file(parent)
        files.insert(0, (parent, stated))
        parent = stated.pop(PARENT, None if parent == BASE else BASE)
    of_sizes = [stated.pop(SIZES, {}) for _, stated in files]
    if size is None:
        size = next(stated["model"]["size"] for _, stated in files[::-1] if "size" in stated.get("model", {}))
    layers = []
    for (file, stated), at_size in zip(files, of_sizes, strict=True):
        layers.append(Layer(file, stated))
        layers.append(Layer(f"{file} at size {size}", at_size.get(str(size), {})))
    return layers


def _read_recipe_file(name: str) -> dict[str, Any]:
    path = RECIPE_FOLDER / f"{name}.yaml"
    if path.parent != RECIPE_FOLDER or not path.is_file():
        near = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise SettingsError(f"unknown recipe '{name}'; {hint}there are: {', '.join(recipe_names())}")
    return read_yaml(path)


def read_corrections(path: Path) -> dict[str, Any]:
    """What a settings file such as params.yaml says about the run, without the keys that only DVC's templates use."""
    content = read_yaml(path)
    return {key: {} if value is None else value for key, value in content.items() if key not in TEMPLATE_KEYS}


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises SettingsError for a file that is missing, no mapping, or ambiguous."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise SettingsError(f"no settings file at {path}; give another with --settings") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: other bytes than UTF-8
        raise SettingsError(f"{path} is no valid YAML: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} must hold a mapping of sections")
    return content


class _Loader(yaml.SafeLoader):
    """Refuses what a reader may take for something else: keys given twice, and scalars such as 010, 1_000, no, 1:30.

    YAML 1.1, which PyYAML reads, takes these for 8, 1000, false and 90; YAML 1.2, which DVC reads, does not.
    """

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        tag = super().resolve(kind, value, implicit)
        if kind is not yaml.ScalarNode or not implicit[0] or not value:
            return tag
        plain = UNAMBIGUOUS.fullmatch(value)
        if plain and plain["real"]:
            return "tag:yaml.org,2002:float"  # YAML 1.1 takes 1e-3 for text
        if not plain and tag.rpartition(":")[2] in ("int", "float", "bool", "timestamp"):
            raise yaml.YAMLError(
                f"'{value}' can be read in two ways; write a plain number, true or false, or put text in quotes"
            )
        return tag

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"'{key.value}' is given twice, again in line {key.start_mark.line + 1}")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


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
        nested: Any = yaml.load(value, _Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"the value of '{text}' is no valid YAML: {one_line(error)}") from error
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
