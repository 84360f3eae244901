"""Requests and answers of the API, as in its OpenAPI document."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

MOST_ANSWERS = 200
NOTE = "Says so if a thumbnail was used because the original picture could not be read; otherwise empty."


def _text_or_bytes(value: Any) -> Any:
    if value is not None and not isinstance(value, str | bytes):
        raise ValueError("give base64 of an image file, or a data URI")
    return value


# A string in JSON, bytes in an upload.
Image = Annotated[
    Any,
    BeforeValidator(_text_or_bytes),
    WithJsonSchema({"type": "string", "description": "Base64 of an image or DICOM file; a data URI is allowed."}),
]
Words = Annotated[tuple[str, ...], BeforeValidator(lambda value: (value,) if isinstance(value, str) else value)]


class Request(BaseModel):
    """Base of all requests: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = Field(None, description="Name of the server's model; any other is refused.")


ROW = {
    "type": "object",
    "additionalProperties": False,
    "properties": {
        "text": {"type": "string"},
        "image": {"type": "string", "description": "Base64 of an image or DICOM file; a data URI is allowed."},
    },
}
ROWS = {"anyOf": [{"type": "string"}, ROW, {"type": "array", "items": {"anyOf": [{"type": "string"}, ROW]}}]}


class EmbeddingsRequest(Request):
    """OpenAI's format, extended by images: rows in `input`, or vLLM's `messages` for one row."""

    input: Annotated[Any, WithJsonSchema(ROWS)] = Field(
        None, description="A text, an object with text, image or both (one fused vector), or a list of them."
    )
    messages: list[dict[str, Any]] | None = Field(None, description="Chat messages with image_url and text: one row.")
    encoding_format: Literal["float", "base64"] = Field("float", description="base64: little-endian float32.")
    dimensions: int | None = Field(None, description="Refused unless it is the model's width.")
    truncate: bool = Field(False, description="Cut texts that are too long for the model instead of refusing them.")
    user: str | None = Field(None, description="Ignored.")


class Embedding(BaseModel):
    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class FilterFields(BaseModel):
    """Restricts the hits; several values of a field mean any of them."""

    model_config = ConfigDict(extra="forbid")

    modality: Words = ()
    concept: Words = ()
    split: Words = ()
    source: Words = ()
    indexed_after: datetime | None = None
    indexed_before: datetime | None = None


class SearchRequest(Request):
    """A query by text, image, both (one fused vector), or pictures of the index (`id`)."""

    text: str | None = Field(None, description="Words to search for; with an image, a question or a change.")
    image: Image = None
    id: Words = Field((), description="Search for similar pictures; with a text, for the first one changed by it.")
    filters: FilterFields = FilterFields()
    limit: int = Field(10, ge=1, le=200)
    offset: int = Field(0, ge=0, le=10_000)
    threshold: float | None = Field(None, ge=-1, le=1, allow_inf_nan=False, description="Minimum cosine of a hit.")
    hybrid: bool = Field(False, description="Also search captions for the words, and fuse both rankings.")
    fold: bool = Field(True, description="List nearly equal pictures once.")
    truncate: bool = Field(False, description="Cut a text that is too long for the model.")


class Found(BaseModel):
    """A picture of the index. `thumbnail`: its address on this server. `place`: where the original is."""

    rank: int
    id: str
    score: float
    caption: str
    concepts: list[str]
    modality: str
    case: str
    split: str
    source: str
    licence: str
    place: str
    thumbnail: str
    indexed_at: datetime
    folded: int


class SearchAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[Found]
    model: str
    note: str = Field("", description=NOTE)


class AnswersRequest(Request):
    """A question about an image, and answers to rank."""

    image: Image = None
    id: str | None = Field(None, description="A picture of the index instead of an image.")
    question: str = Field(min_length=1)
    answers: list[str] = Field(min_length=1, max_length=MOST_ANSWERS)
    truncate: bool = False


class RankedAnswer(BaseModel):
    rank: int
    answer: str
    score: float
    index: int


class AnswersAnswer(BaseModel):
    object: Literal["list"] = "list"
    data: list[RankedAnswer]
    model: str
    note: str = Field("", description=NOTE)


class Fault(BaseModel):
    message: str
    type: str
    code: int


class FaultAnswer(BaseModel):
    """One sentence about what is wrong, in OpenAI's format."""

    error: Fault
