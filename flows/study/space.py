"""Which fields of a recipe a sweep varies: ``train.learning_rate=1e-4..1e-2 log``, ``train.batch_size=64..256``, or
choices such as ``model.family=fuselip,siglip-sf``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from optuna import Trial

from fuselip_core.config import SECTIONS, STAGES, SettingsError, parse_overrides

NUMBER = r"[-+]?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
RANGE = re.compile(rf"(?P<low>{NUMBER})\.\.(?P<high>{NUMBER})(?P<log>\s+log)?")


@dataclass(frozen=True)
class SweptField:
    """A field of a section with its choices, or with the ends of its range: whole numbers if both ends are."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    def suggest(self, trial: Trial) -> Any:
        """The value that the study tries next."""
        if self.choices:
            return yaml.safe_load(trial.suggest_categorical(self.name, [_as_yaml(each) for each in self.choices]))
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(self.name, self.low, self.high, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values that must all be allowed, or no trial should start."""
        return self.choices or (self.low, self.high)


def read_space(texts: Sequence[str]) -> list[SweptField]:
    """The fields that `texts` name; raises SettingsError for what is no range and no choice."""
    fields = [_field(text) for text in texts]
    if not fields:
        raise SettingsError('search is empty; name at least one field, such as "train.learning_rate=1e-4..1e-2 log"')
    if doubled := {field.name for field in fields if [each.name for each in fields].count(field.name) > 1}:
        raise SettingsError(f"search names {min(doubled)} twice; leave one out")
    return fields


def first_stage(fields: Sequence[SweptField]) -> str:
    """The first stage that depends on a field: those before it run once. Seeds vary training, so it is never later."""
    sections = {field.name.partition(".")[0] for field in fields} | {"train"}
    # The section `model` has no stage of its own: the codebook is the first that reads it.
    return min(({"model": "codebook"}.get(section, section) for section in sections), key=STAGES.index)


def _field(text: str) -> SweptField:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals or name.partition(".")[0] not in SECTIONS or name.startswith("register."):
        raise SettingsError(f"search: '{text}' names no field; write section.field=LOW..HIGH or section.field=A,B")
    if found := RANGE.fullmatch(value):
        low, high = _number(found["low"]), _number(found["high"])
        if low >= high or (found["log"] and low <= 0):
            raise SettingsError(f"search: the range of {name} must rise, and start above 0 for log; not {value}")
        return SweptField(name, low=low, high=high, log=bool(found["log"]))
    choices = tuple(parse_overrides([f"choices=[{value}]"])["choices"])
    if len(choices) < 2:
        raise SettingsError(f"search: {name} needs a range LOW..HIGH or at least two choices A,B; not '{value}'")
    return SweptField(name, choices)


def _number(text: str) -> float:
    """A number as it is written: whole without a point or an exponent."""
    return int(text) if re.fullmatch(r"[-+]?\d+", text) else float(text)


def _as_yaml(value: Any) -> str:
    """Optuna keeps plain values only, and its plots mix no types: each choice is kept as it is written."""
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
