"""Request bodies in OpenAI's, vLLM's and MLflow's formats → rows of image and text."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from fuselip_core.request_rules import Refusal
from fuselip_core.serving.limits import WrongType

RawRow = tuple[Any, Any]  # image (base64, data URI, URL or bytes), text
Body = TypeVar("Body", bound=BaseModel)
SIDES = {"image", "text"}
WRONG_COLUMNS = "the columns of the input are not image, text or both, once each; rename or drop the others"


async def read_body(request: Request, model: type[Body]) -> Body:
    """The body as `model`: JSON, or a multipart form whose files are bytes. Raises Refusal or WrongType."""
    kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    try:
        if kind == "multipart/form-data":
            return model.model_validate(await _read_form(request))
        if kind != "application/json":
            raise WrongType("the content type is not supported; send application/json or multipart/form-data")
        return model.model_validate_json(await request.body())
    except pydantic.ValidationError as error:
        raise Refusal(_first_fault(error)) from None


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object. Raises Refusal."""
    try:
        return pydantic.TypeAdapter(dict[str, Any]).validate_json(await request.body())
    except pydantic.ValidationError:
        raise Refusal("the body is not a JSON object") from None


def _first_fault(error: pydantic.ValidationError) -> str:
    """Field and fault, without the value or any name that the sender chose."""
    fault = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if fault["type"] in ("json_invalid", "model_type"):
        return "the body is not a valid JSON object"
    if fault["type"] == "extra_forbidden":
        return "the body has an unknown field; /docs lists the known ones"
    place = ".".join(str(part) for part in fault["loc"])
    said = fault["msg"].removeprefix("Value error, ")
    return f"{place}: {said[:1].lower()}{said[1:]}"


async def _read_form(request: Request) -> dict[str, Any]:
    """Fields by name. Lists are repeated fields or JSON; filters are JSON."""
    try:
        form = await request.form(max_files=1, max_fields=1000)
    except (MultiPartException, HTTPException):
        raise Refusal("the form can't be read; send multipart/form-data with at most one file") from None
    values: dict[str, Any] = {}
    for name in form:
        given = [await value.read() if isinstance(value, UploadFile) else value for value in form.getlist(name)]
        value = given[0] if len(given) == 1 else given
        if isinstance(value, str) and value[:1] in ("[", "{") and name in ("filters", "answers", "id"):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                raise Refusal(f"{name}: the field is not valid JSON") from None
        values[name] = [value] if name == "answers" and isinstance(value, str) else value
    return values


def rows_of_input(given: Any) -> list[RawRow]:
    """Rows of an OpenAI request's `input`. Raises Refusal."""
    rows = given if isinstance(given, list) else [given]
    if not rows or given is None:
        raise Refusal("the input is empty; give a text, a row or a list of them")
    found: list[RawRow] = []
    for number, row in enumerate(rows):
        if isinstance(row, str):
            found.append((None, row))
        elif isinstance(row, dict) and set(row) <= SIDES:
            found.append((row.get("image"), row.get("text")))
        else:
            raise Refusal(f"row {number} is neither a text nor an object with text, image or both (no token ids)")
    return found


def row_of_messages(messages: Sequence[Mapping[str, Any]]) -> RawRow:
    """One row from chat messages: all their texts, and their image. Raises Refusal."""
    images, texts = [], []
    for message in messages:
        content = message.get("content")
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content or ():
            kind = part.get("type") if isinstance(part, dict) else None
            value = part.get(kind) if kind else None
            if kind == "text" and isinstance(value, str):
                texts.append(value)
            elif kind == "image_url" and isinstance(
                value := value.get("url") if isinstance(value, dict) else value, str
            ):
                images.append(value)
            else:
                raise Refusal("messages: a part is neither text nor image_url; send only these two")
    if len(images) > 1:
        raise Refusal(f"messages: there are {len(images)} images; send one")
    return (images[0] if images else None), " ".join(texts)


def rows_of_table(body: Mapping[str, Any]) -> list[RawRow]:
    """Rows of MLflow's request: dataframe_records, dataframe_split, inputs or instances. Raises Refusal."""
    kinds = [name for name in ("dataframe_records", "dataframe_split", "inputs", "instances") if name in body]
    if len(kinds) != 1:
        raise Refusal("send exactly one of dataframe_records, dataframe_split, inputs and instances")
    given = body[kinds[0]]
    if kinds[0] == "dataframe_split":
        given = _records_of_split(given)
    elif isinstance(given, dict):
        columns = {name: value if isinstance(value, list) else [value] for name, value in given.items()}
        if len({len(values) for values in columns.values()}) > 1:
            raise Refusal("the columns of the input differ in length; fill them up")
        count = len(next(iter(columns.values()), []))
        given = [{name: values[row] for name, values in columns.items()} for row in range(count)]
    if not isinstance(given, list) or not all(isinstance(record, dict) for record in given):
        raise Refusal("the input is not a table; send dataframe_records or dataframe_split")
    if not all(record.keys() <= SIDES for record in given):
        raise Refusal(WRONG_COLUMNS)
    if not given:
        raise Refusal("the input has no rows; send at least one")
    return [(record.get("image"), record.get("text")) for record in given]


def _records_of_split(given: Any) -> Any:
    columns = given.get("columns") if isinstance(given, dict) else None
    data = given.get("data") if isinstance(given, dict) else None
    if not isinstance(columns, list) or not isinstance(data, list):
        raise Refusal("dataframe_split is not an object with columns and data; send both")
    if not all(isinstance(name, str) for name in columns) or len(set(columns)) != len(columns):
        raise Refusal(WRONG_COLUMNS)
    if not all(isinstance(row, list) and len(row) == len(columns) for row in data):
        raise Refusal("a row of dataframe_split is not as long as its columns; send a value for each")
    return [dict(zip(columns, row, strict=True)) for row in data]
