"""Parameters of the flows, shown as a form in Prefect and as options of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from prefect.runtime import deployment
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    model_serializer,
)

from fuselip_core.config import NAME_PATTERN, SettingsError, Size, SourceName, merge, recipe_names

# The form offers and enforces these; elsewhere the settings' own check says what is wrong, with its remedy.
RecipeName = Annotated[str, WithJsonSchema({"type": "string", "enum": recipe_names()})]
RunName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]
Split = Literal["dev", "valid", "test"]


class Form(BaseModel):
    """Base of all requests: unknown fields are refused, empty ones are not sent."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


def empty(description: str, **limits: Any) -> Any:
    """A field that may stay empty. Its schema has no null: Prefect's form would first ask if there is a value."""

    def without_null(schema: dict[str, Any]) -> None:
        schema.pop("default", None)
        variants = [each for each in schema.pop("anyOf", []) if each != {"type": "null"}]
        schema.update(variants[0])

    return Field(None, description=description, json_schema_extra=without_null, **limits)


def nested(given: dict[str, Any]) -> dict[str, Any]:
    """``{"train.steps": 5}`` and ``{"train": {"steps": 5}}`` mean the same."""
    whole: dict[str, Any] = {}
    for name, value in given.items():
        *sections, field = name.split(".")
        part: Any = {field: value}
        for section in reversed(sections):
            part = {section: part}
        whole = merge(whole, part, whole=())
    return whole


AnySettings = Annotated[
    dict[str, Any],
    AfterValidator(nested),
    Field(
        description='Any other settings, such as {"train.batch_size": 64, "prepare.limit": 1000}; these win. '
        "`fuselip recipes show NAME` lists them."
    ),
]


class Request(Form):
    """Base of what is asked of a run: how it differs from its recipe, or from what it was."""

    def corrections(self) -> dict[str, Any]:
        """Settings that the request changes, by section."""
        return dict(getattr(self, "overrides", {}))


class RunRequest(Request):
    """What to train, on which data. An empty form means the pipeline of params.yaml in the repository's root."""

    recipe: RecipeName | None = empty("Recipe to start from. Empty: the one meant for the source.")
    size: Size | None = empty("Size of the encoder. Empty: the recipe's.")
    source: SourceName | None = empty("Kind of data set. Empty: the recipe's, or the one in params.yaml.")
    root: Path | None = empty("Folder of the raw data set. Empty: the recipe's.")
    name: RunName | None = empty(
        "Name of the run, a folder below runs/: letters a-z, digits, dots, dashes, underscores. "
        "Empty: source (or recipe) and size."
    )
    steps: int | None = empty("Optimiser steps of the training. Empty: the recipe's length.", ge=1)
    epochs: float | None = empty(
        "Length of the training in epochs, instead of steps. Empty: the recipe's length.", gt=0
    )
    split: Split | None = empty("Split to evaluate on. Empty: the recipe's.")
    overrides: AnySettings = {}
    dry_run: bool = Field(
        False, description="Only check the request, and show all settings with an estimate of memory and time."
    )

    def corrections(self) -> dict[str, Any]:
        """Settings that the request changes, by section; raises SettingsError for a length that is given twice."""
        if self.steps and self.epochs:
            raise SettingsError("steps and epochs are both given; leave one empty")
        values: dict[str, Any] = {"model": {"size": self.size}} if self.size else {}
        if self.steps or self.epochs:
            values["train"] = {"steps": self.steps} if self.steps else {"epochs": self.epochs}
        if self.split:
            values["evaluate"] = {"split": self.split}
        return merge(values, self.overrides)


class StageRequest(Request):
    """A run that exists, and what to change for the stage that runs again."""

    run: RunName | None = empty("Name of the run, a folder below runs/. Empty: the pipeline in the repository's root.")
    overrides: AnySettings = {}


def field_of(name: str) -> str:
    """What a user calls the field `name` where they filled it in: on Prefect's form or on the command line."""
    return f"the field {name.capitalize()}" if deployment.id else f"--{name}"
