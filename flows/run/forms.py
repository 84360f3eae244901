"""Sections of settings as Prefect's forms show them: every field with its range, choices and meaning, and all empty.

What a form leaves empty is the recipe's. Built from the sections of fuselip_core/config.py, so a field that is added
there appears in the forms; its help says what each recipe has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Optional, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    create_model,
    model_serializer,
)
from pydantic.fields import FieldInfo

from fuselip_core.config import (
    NAME_PATTERN,
    CodebookSettings,
    EvaluateSettings,
    ModelSettings,
    PrepareSettings,
    RegisterSettings,
    Section,
    TokenizeSettings,
    TrainSettings,
    as_yaml,
    read_recipe,
    recipe_names,
)

LONGEST_VALUE = 40

# The form offers and enforces these; elsewhere the settings' own check says what is wrong, with its remedy.
RecipeName = Annotated[str, WithJsonSchema({"type": "string", "enum": recipe_names()})]
RunName = Annotated[str, WithJsonSchema({"type": "string", "pattern": NAME_PATTERN})]


class Form(BaseModel):
    """Base of what a flow is asked for: unknown names are refused, and what is empty is not written down."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_serializer(mode="wrap")
    def _without_empty(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class Corrections(Form):
    """Base of the generated models: fields of one section, each empty unless corrected."""

    def given(self) -> dict[str, Any]:
        """The fields that are not empty, as plain values; a part of which every field is empty is empty too."""
        parts = {name for name in type(self).model_fields if isinstance(getattr(self, name), Corrections)}
        return {name: value for name, value in self.model_dump(mode="json").items() if value or name not in parts}


def corrections_of(section: type[Section], name: str) -> type[Corrections]:
    """A model with the fields of `section`, which stands in recipes as `name`; none is required, none has a default."""
    fields: dict[str, Any] = {
        field_name: (
            Optional[_type_of(field, field_name)],  # noqa: UP045 - `|` can't be used on a value
            Field(None, description=_help(field, name, field_name), json_schema_extra=without_empty),
        )
        for field_name, field in section.model_fields.items()
    }
    docstring = " ".join((section.__doc__ or "").split())
    return create_model(name.capitalize(), __base__=Corrections, __doc__=docstring, **fields)


def _type_of(field: FieldInfo, name: str) -> Any:
    """The field's type with its limits, such as a range or a pattern.

    A section within a section is all empty as well: the form sends the defaults that it shows, given or not.
    """
    match get_args(field.annotation):
        case (type() as part, none) if none is type(None) and issubclass(part, Section):
            return corrections_of(part, name)
    return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation


def _help(field: FieldInfo, section: str, name: str) -> str:
    """The field's meaning and the value of each recipe, which counts while the form leaves it empty."""
    recipes_of: dict[str, list[str]] = {}
    for recipe in recipe_names():
        values = _recipe(recipe).get(section)
        if isinstance(values, Mapping) and name in values:
            text = as_yaml(values[name])
            recipes_of.setdefault(text if len(text) <= LONGEST_VALUE else "a value of its own", []).append(recipe)
    if not recipes_of:
        # Of a part that recipes leave empty.
        known = f" Empty: {as_yaml(field.default)}."
    elif len(recipes_of) == 1:
        known = f" Empty: {next(iter(recipes_of))}, as in all recipes."
    else:
        each = "; ".join(f"{value} in {', '.join(recipes)}" for value, recipes in recipes_of.items())
        known = f" Empty: {each}."
    return f"{field.description or ''}{known}"


@cache
def _recipe(name: str) -> Mapping[str, Any]:
    """Read once: there is a help text for each of a hundred fields."""
    return read_recipe(name)


def without_empty(schema: dict[str, Any]) -> None:
    """Makes a field's schema that of its type alone: the form of a nullable one would first ask if there is a value."""
    schema.pop("default", None)
    variants = [each for each in schema.get("anyOf", []) if each != {"type": "null"}]
    if len(variants) == 1:
        del schema["anyOf"]
        schema.update(variants[0])


# Stated one by one rather than in a loop, so that they can be named in annotations; a type checker sees their base.
if TYPE_CHECKING:
    PrepareCorrections = Corrections
    ModelCorrections = Corrections
    CodebookCorrections = Corrections
    TokenizeCorrections = Corrections
    TrainCorrections = Corrections
    EvaluateCorrections = Corrections
    RegisterCorrections = Corrections
else:
    PrepareCorrections = corrections_of(PrepareSettings, "prepare")
    ModelCorrections = corrections_of(ModelSettings, "model")
    CodebookCorrections = corrections_of(CodebookSettings, "codebook")
    TokenizeCorrections = corrections_of(TokenizeSettings, "tokenize")
    TrainCorrections = corrections_of(TrainSettings, "train")
    EvaluateCorrections = corrections_of(EvaluateSettings, "evaluate")
    RegisterCorrections = corrections_of(RegisterSettings, "register")
