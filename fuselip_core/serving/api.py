"""The HTTP API: OpenAI's embeddings, search, ranked answers, MLflow's and SageMaker's routes, health and metrics."""

from __future__ import annotations

import base64
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fuselip_core.errors import FuselipError
from fuselip_core.request_rules import Refusal
from fuselip_core.search.index import Filters, Hit
from fuselip_core.serving import schemas
from fuselip_core.serving.docs_page import render_docs
from fuselip_core.serving.engine import Engine, Query
from fuselip_core.serving.guard import Guard, answer_to, fault_answer
from fuselip_core.serving.limits import NotFound, ServingError
from fuselip_core.serving.rows import read_body, read_json, row_of_messages, rows_of_input, rows_of_table

FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.FaultAnswer, "description": words}
    for status, words in {
        400: "The request is malformed.",
        401: "The API key is missing or wrong.",
        403: "The request comes from another site's page.",
        404: "There is no such model, picture or index.",
        413: "The body is too large.",
        415: "The content type is not supported.",
        422: "The request is invalid.",
        429: "The queue is full.",
        503: "The request took too long, or the model is damaged.",
    }.items()
}


def create_app(
    engine: Engine, api_key: str | None = None, local: bool = True, compared: Engine | None = None
) -> FastAPI:
    """The server of `engine`. `local`: answer only to 127.0.0.1 and localhost. `compared`: second model of the page."""
    engines = [engine, *([compared] if compared else [])]

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        for each in engines:
            each.start()
        gc.collect()
        gc.freeze()  # or each full collection walks through all libraries, 0.3 s in which nobody is answered
        yield
        for each in engines:
            await each.stop()

    app = FastAPI(
        title="fuselip",
        version=version("fuselip-rocov2"),
        summary="Embeddings of images, texts, and images with text; search and ranked answers over an archive.",
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        separate_input_output_schemas=False,
        responses=FAULTS,
    )
    app.add_middleware(Guard, limits=engine.limits, metrics=engine.metrics, api_key=api_key, local=local)
    app.add_exception_handler(FuselipError, _fault)
    app.add_exception_handler(HTTPException, _http_fault)
    _add_models(app, engine)
    _add_search(app, engine)
    _add_mlflow(app, engine)
    _add_state(app, engine)
    return app


async def _fault(_: Request, error: Any) -> JSONResponse:
    return answer_to(error)


async def _http_fault(_: Request, error: Any) -> JSONResponse:
    sentences = {
        404: "there is nothing at this address; see /docs",
        405: "this address takes another method; see /docs",
    }
    return fault_answer(error.status_code, sentences.get(error.status_code, "the request is malformed; see /docs"))


def _body_of(model: type[BaseModel], upload: bool = False) -> dict[str, Any]:
    """The OpenAPI entry of a body that `read_body` reads; `_add_state` adds the schemas it refers to."""
    content: dict[str, Any] = {"application/json": {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}}
    if upload:
        content["multipart/form-data"] = {}  # filled in by `_describe_uploads`
    return {"requestBody": {"required": True, "content": content}}


def _check_model(engine: Engine, wanted: str | None) -> None:
    if wanted not in (None, engine.name):
        raise NotFound(f"this server has the model {engine.name} and no other; leave model out, or give that name")


def _add_models(app: FastAPI, engine: Engine) -> None:
    @app.get("/v1/models", tags=["embeddings"])
    async def models() -> dict[str, Any]:
        """The model of this server."""
        return {"object": "list", "data": [{"id": engine.name, "object": "model", "created": 0, "owned_by": "fuselip"}]}

    @app.post("/v1/embeddings", tags=["embeddings"], openapi_extra=_body_of(schemas.EmbeddingsRequest))
    async def embeddings(request: Request) -> schemas.EmbeddingsAnswer:
        """One unit-norm vector for each row of input, in the same order."""
        asked = await read_body(request, schemas.EmbeddingsRequest)
        _check_model(engine, asked.model)
        if (asked.input is None) == (asked.messages is None):
            raise Refusal("give either input or messages")
        if asked.dimensions not in (None, engine.embedder.width):
            raise Refusal(f"the model's vectors have {engine.embedder.width} dimensions; leave dimensions out")
        rows = rows_of_input(asked.input) if asked.messages is None else [row_of_messages(asked.messages)]
        vectors, tokens = await engine.embed(rows, asked.truncate)
        data = [
            schemas.Embedding(index=place, embedding=_base64(vector) if asked.encoding_format == "base64" else vector)
            for place, vector in enumerate(vectors if asked.encoding_format == "base64" else vectors.tolist())
        ]
        usage = schemas.Usage(prompt_tokens=tokens, total_tokens=tokens)
        return schemas.EmbeddingsAnswer(data=data, model=engine.name, usage=usage)


def _base64(vector: np.ndarray) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _add_search(app: FastAPI, engine: Engine) -> None:
    @app.post("/v1/search", tags=["search"], openapi_extra=_body_of(schemas.SearchRequest, upload=True))
    async def search(request: Request) -> schemas.SearchAnswer:
        """Pictures of the index nearest to a text, an image, both as one vector, or other pictures of the index."""
        asked = await read_body(request, schemas.SearchRequest)
        _check_model(engine, asked.model)
        fields = {name: getattr(asked, name) for name in ("text", "image", "limit", "offset", "threshold", "hybrid")}
        filters = Filters(**dict(asked.filters))
        query = Query(**fields, ids=asked.id, filters=filters, fold=asked.fold, truncate=asked.truncate)
        hits, note = await engine.search(query)
        return schemas.SearchAnswer(data=found(hits, asked.offset), model=engine.name, note=note)

    @app.post("/v1/answers", tags=["search"], openapi_extra=_body_of(schemas.AnswersRequest, upload=True))
    async def answers(request: Request) -> schemas.AnswersAnswer:
        """Ranks possible answers to a question about a picture, most likely first."""
        asked = await read_body(request, schemas.AnswersRequest)
        _check_model(engine, asked.model)
        ranked, note = await engine.answers(asked.image, asked.id, asked.question, asked.answers, asked.truncate)
        data = [
            schemas.RankedAnswer(rank=rank, answer=asked.answers[place], score=score, index=place)
            for rank, (place, score) in enumerate(ranked, 1)
        ]
        return schemas.AnswersAnswer(data=data, model=engine.name, note=note)

    @app.get("/v1/pictures/{name:path}/thumbnail", tags=["search"], response_class=Response)
    async def thumbnail(name: str) -> Response:
        """The thumbnail of a picture, as JPEG."""
        return Response((await engine.item(name)).thumbnail, media_type="image/jpeg")

    @app.get("/v1/pictures/{name:path}", tags=["search"])
    async def picture(name: str) -> schemas.Found:
        """The index entry of a picture."""
        return found([await engine.item(name)])[0]


def found(hits: Sequence[Hit], offset: int = 0) -> list[schemas.Found]:
    """Hits in the API's format."""
    return [
        schemas.Found(
            **{name: value for name, value in vars(hit).items() if name not in ("thumbnail", "concepts")},
            rank=rank,
            concepts=list(hit.concepts),
            thumbnail=thumbnail_of(hit.id),
        )
        for rank, hit in enumerate(hits, offset + 1)
    ]


def thumbnail_of(name: str) -> str:
    """The API's address of a picture's thumbnail."""
    return f"/v1/pictures/{quote(name)}/thumbnail"


def _add_mlflow(app: FastAPI, engine: Engine) -> None:
    @app.post("/invocations", tags=["MLflow and SageMaker"])
    async def invocations(request: Request) -> JSONResponse:
        """Embeds the columns image and text, in the format of a model served by MLflow."""
        try:
            body = await read_json(request)
            params = body.get("params")
            truncate = bool(params.get("truncate")) if isinstance(params, dict) else False
            vectors, _ = await engine.embed(rows_of_table(body), truncate)
        except FuselipError as error:
            if isinstance(error, ServingError):
                raise
            return JSONResponse({"error_code": "BAD_REQUEST", "message": str(error)}, 400)
        return JSONResponse({"predictions": vectors.tolist()})

    @app.get("/ping", tags=["MLflow and SageMaker"], response_class=Response)
    async def ping() -> Response:
        """200 while the server answers requests."""
        return Response(status_code=200 if engine.batcher.runs else 503)


def _add_state(app: FastAPI, engine: Engine) -> None:
    @app.get("/health", tags=["state"])
    async def health() -> dict[str, str]:
        """The process is alive."""
        return {"status": "alive"}

    @app.get("/ready", tags=["state"])
    async def ready() -> JSONResponse:
        """Model and index are ready."""
        try:
            rows = None if engine.index is None else len(engine.index)
        except Exception:
            return fault_answer(503, "the index can't be read; check its folder")
        if not engine.batcher.runs:
            return fault_answer(503, "the server is starting or stopping; try again in a moment")
        return JSONResponse({"status": "ready", "index_rows": rows})

    @app.get("/info", tags=["state"])
    async def info() -> dict[str, Any]:
        """Model, index and limits."""
        return {"version": app.version, **engine.info()}

    @app.get("/metrics", tags=["state"], response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        engine.metrics.waiting_rows.set(engine.batcher.waiting)
        engine.metrics.index_rows.set(0 if engine.index is None else len(engine.index))
        return Response(generate_latest(engine.metrics.registry), media_type="text/plain; version=0.0.4")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(render_docs(app.openapi()))

    schema_of = app.openapi

    def openapi() -> dict[str, Any]:
        document = schema_of()
        known = document["components"]["schemas"]
        for model in (schemas.EmbeddingsRequest, schemas.SearchRequest, schemas.AnswersRequest):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            known.update(schema.pop("$defs", {}))
            known[model.__name__] = schema
        _describe_uploads(document)
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _describe_uploads(document: dict[str, Any]) -> None:
    """Gives multipart forms the fields of the JSON body, with a file as the image."""
    for path in document["paths"].values():
        content = path.get("post", {}).get("requestBody", {}).get("content", {})
        if "multipart/form-data" in content:
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            fields = document["components"]["schemas"][name]
            file = {"type": "string", "format": "binary", "description": "An image or DICOM file."}
            schema = {**fields, "properties": {**fields["properties"], "image": file}}
            content["multipart/form-data"] = {"schema": schema}
