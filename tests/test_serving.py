"""The server through its real app: what clients send, what they get, and what it declines with one sentence."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import schemathesis
import torch
import uvicorn
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from make_dicom import picture, save
from PIL import Image

from fuselip_core import Embedder
from fuselip_core.config import Settings
from fuselip_core.errors import FuselipError
from fuselip_core.files import write_json
from fuselip_core.model.weights import CheckpointError
from fuselip_core.request_rules import Refusal
from fuselip_core.search import build
from fuselip_core.search.index import Index
from fuselip_core.serving import urls
from fuselip_core.serving.api import create_app
from fuselip_core.serving.batching import Batcher
from fuselip_core.serving.engine import Engine, open_engine
from fuselip_core.serving.limits import Limits, TooBusy
from fuselip_core.serving.run import read_key

NAME = "Mr Smith"  # must come back in no sentence and no line of the log
LOCAL = "http://127.0.0.1"
SCHEMA_SECONDS = 20.0


@pytest.fixture(scope="module")
def embedder(finished_run: Settings) -> Embedder:
    return Embedder.from_pretrained(finished_run.artifacts / "model", "cpu")


@pytest.fixture(scope="module")
def index_folder(finished_run: Settings, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("index") / "index"
    build.build(finished_run.artifacts / "prepared", folder, embedder)
    return folder


@pytest.fixture(scope="module")
def engine(embedder: Embedder, index_folder: Path) -> Engine:
    return engine_of(embedder, index_folder)


def engine_of(embedder: Embedder, index: Path) -> Engine:
    """An engine serves one app."""
    return Engine("tiny", embedder, Index.open(index, in_memory=True), Limits(body_mb=2, megapixels=1, rows=8))


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[TestClient]:
    with TestClient(create_app(engine), base_url=LOCAL, raise_server_exceptions=True) as client:
        yield client


def png(level: int = 100, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("L", (side, side), level).save(stream, "PNG")
    return stream.getvalue()


def bright(half: str) -> bytes:
    """A picture as the model was trained on."""
    pixels = np.full((32, 32), 20, np.uint8)
    pixels[(slice(16), slice(None)) if half == "top" else (slice(None), slice(16))] = 200
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def dicom(folder: Path) -> bytes:
    return save(picture(np.arange(64, dtype=np.uint8).reshape(8, 8)), folder / "a.dcm").read_bytes()


def vectors_of(answer: httpx.Response) -> np.ndarray:
    assert answer.status_code == 200, answer.text
    return np.array([row["embedding"] for row in answer.json()["data"]], np.float32)


def sentence(answer: httpx.Response) -> str:
    """The one sentence of an error, which names nobody."""
    assert NAME not in answer.text
    said = answer.json()["error"]
    assert said["code"] == answer.status_code and "\n" not in said["message"]
    return str(said["message"])


# ---- embeddings ------------------------------------------------------------------------------------------------------


def test_every_form_of_input_gives_the_vectors_of_the_model(client: TestClient, embedder: Embedder) -> None:
    image, uri = Image.open(io.BytesIO(bright("top"))), f"data:image/png;base64,{encoded(bright('top'))}"
    wanted = embedder.embed([None, image, image], ["left", None, "left"])
    rows = ["left", {"image": uri}, {"image": encoded(bright("top")), "text": "left"}]
    answer = client.post("/v1/embeddings", json={"input": rows})
    np.testing.assert_allclose(vectors_of(answer), wanted, atol=1e-6)
    assert [row["index"] for row in answer.json()["data"]] == [0, 1, 2]
    assert answer.json()["usage"] == {"prompt_tokens": 2, "total_tokens": 2}
    np.testing.assert_allclose(vectors_of(client.post("/v1/embeddings", json={"input": "left"})), wanted[:1], atol=1e-6)
    content = [{"type": "image_url", "image_url": {"url": uri}}, {"type": "text", "text": "left"}]
    chat = client.post("/v1/embeddings", json={"messages": [{"role": "user", "content": content}]})
    np.testing.assert_allclose(vectors_of(chat), wanted[2:], atol=1e-6)
    table = {"columns": ["text", "image"], "data": [["left", None], [None, uri], ["left", uri]]}
    invoked = client.post("/invocations", json={"dataframe_split": table})
    np.testing.assert_allclose(np.array(invoked.json()["predictions"]), wanted, atol=1e-6)


def test_dicom_is_taken_where_an_image_is(client: TestClient, tmp_path: Path) -> None:
    data = dicom(tmp_path)
    pixels = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) * 4)
    assert pixels.size == (8, 8)
    rows = [{"image": encoded(data)}, {"image": encoded(data), "text": "left"}]
    vectors = vectors_of(client.post("/v1/embeddings", json={"input": rows}))
    assert np.isfinite(vectors).all() and not np.allclose(vectors[0], vectors[1])
    for upload in (data, bright("top")):
        found = client.post("/v1/search", files={"image": ("x.dcm", upload)}, data={"limit": "2"})
        assert len(found.json()["data"]) == 2, found.text
    asked = {"question": "Which half is bright?", "answers": json.dumps(["left", "right"])}
    assert len(client.post("/v1/answers", files={"image": ("x.dcm", data)}, data=asked).json()["data"]) == 2
    with_header_alone = save(picture(np.zeros((4, 4), np.uint8)), tmp_path / "b.dcm")
    broken = with_header_alone.read_bytes()[:400]
    said = sentence(client.post("/v1/search", files={"image": ("x.dcm", broken)}))
    assert said.startswith("row 0: image can't be read (")


def test_the_openai_client_works(client: TestClient, embedder: Embedder) -> None:
    ours = openai.OpenAI(base_url=f"{LOCAL}/v1", api_key="none", http_client=client, max_retries=0)
    assert [model.id for model in ours.models.list()] == ["tiny"]
    wanted = embedder.embed(None, ["left", "the top half"])
    for form in ("float", "base64"):  # without a form the client asks for base64
        answer = ours.embeddings.create(model="tiny", input=["left", "the top half"], encoding_format=form)
        got = [row.embedding for row in answer.data]
        if form == "base64":
            got = [np.frombuffer(base64.b64decode(row), "<f4") if isinstance(row, str) else row for row in got]
        np.testing.assert_allclose(np.array(got), wanted, atol=1e-6)
    plain = ours.embeddings.create(model="tiny", input="left")
    np.testing.assert_allclose(plain.data[0].embedding, wanted[0], atol=1e-6)
    with pytest.raises(openai.NotFoundError, match="has the model tiny and no other"):
        ours.embeddings.create(model="other", input="left")
    with pytest.raises(openai.UnprocessableEntityError, match="row 0"):
        ours.embeddings.create(model="tiny", input=[""])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": []}, "the input is empty"),
        ({}, "either input or messages"),
        ({"input": ["a", 5]}, "row 1 is neither a text nor an object"),
        ({"input": [[1, 2]]}, "row 0 is neither a text nor an object"),
        ({"input": ["a", " "]}, "row 1 has neither image nor text"),
        ({"input": [{"text": NAME, "image": NAME}]}, "row 0: image is not base64"),
        ({"input": [{NAME: "a"}]}, "row 0 is neither"),
        ({"input": "a", NAME: 1}, "an unknown field"),
        ({"input": [{"image": "eA=="}]}, "row 0: image can't be read (not an image)"),
        ({"input": [{"image": "http://127.0.0.1/x.png"}]}, "row 0: this server does not fetch URLs"),
        ({"input": [{"image": encoded(png(side=1001))}]}, "row 0: image can't be read (too large)"),
        ({"input": "a", "dimensions": 5}, "leave dimensions out"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format: input should be 'float' or 'base64'"),
        ({"input": ["a"] * 9}, "9 rows are more than the 8"),
        ({"input": " ".join(["word"] * 500)}, "row 0: the text has more than 2000 characters"),
        ({"input": " ".join(["word"] * 200)}, "row 0: the text has 200 tokens and the model reads"),
        ({"messages": [{"role": "user", "content": [{"type": "audio", "audio": NAME}]}]}, "neither text nor image_url"),
        ({"messages": []}, "row 0 has neither"),
    ],
)
def test_a_wrong_request_is_one_sentence(client: TestClient, body: dict[str, Any], words: str) -> None:
    answer = client.post("/v1/embeddings", json=body)
    assert answer.status_code == 422 and words in sentence(answer)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'{"input": "\\ud800"}', b"\xff", b"[" * 5000, b"NaN"])
def test_a_body_that_is_no_json_object_is_one_sentence(client: TestClient, body: bytes) -> None:
    for route in ("/v1/embeddings", "/v1/search", "/v1/answers"):
        answer = client.post(route, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422 and sentence(answer)
    assert client.post("/invocations", content=body).status_code == 400


def test_truncate_cuts_instead_of_refusing(client: TestClient) -> None:
    long = " ".join(["word"] * 500)
    cut = vectors_of(client.post("/v1/embeddings", json={"input": long, "truncate": True}))
    assert cut.shape[0] == 1 and np.isfinite(cut).all()


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"dataframe_records": [{"text": "a"}, {"text": 5}]}, "row 1: text is not a string"),
        ({"dataframe_records": [{"caption": NAME}]}, "are not image, text or both"),
        ({"dataframe_records": []}, "no rows"),
        ({"inputs": {"text": ["a"], "image": [None, None]}}, "differ in length"),
        ({"instances": ["a"]}, "not a table"),
        ({"dataframe_split": {"columns": ["text"], "data": [["a", "b"]]}}, "not as long as its columns"),
        ({"dataframe_split": {"columns": ["text", "text"], "data": []}}, "are not image, text or both"),
        ({"predict": 1}, "exactly one of"),
    ],
)
def test_invocations_decline_as_mlflow_does(client: TestClient, body: dict[str, Any], words: str) -> None:
    answer = client.post("/invocations", json=body)
    assert answer.status_code == 400 and words in answer.json()["message"] and NAME not in answer.text


# ---- search and answers ----------------------------------------------------------------------------------------------


def search(client: TestClient, **query: Any) -> list[dict[str, Any]]:
    answer = client.post("/v1/search", json=query)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["data"])


def test_search_by_text_picture_both_and_id(client: TestClient, engine: Engine, embedder: Embedder) -> None:
    assert engine.index is not None
    picture = Image.open(io.BytesIO(bright("top")))
    for query, row in (
        ({"text": "the top half"}, (None, "the top half")),
        ({"image": encoded(bright("top"))}, (picture, None)),
        ({"image": encoded(bright("top")), "text": "the left half"}, (picture, "the left half")),
    ):
        found = search(client, limit=3, fold=False, **query)
        wanted = engine.index.search(embedder.embed([row[0]], [row[1]])[0], limit=3, fold=False)
        assert [hit["id"] for hit in found] == [hit.id for hit in wanted]
        assert [hit["rank"] for hit in found] == [1, 2, 3]
        np.testing.assert_allclose([hit["score"] for hit in found], [hit.score for hit in wanted], atol=1e-5)
        assert found[0]["caption"] and found[0]["thumbnail"].endswith("/thumbnail")
    first = found[0]["id"]
    like = search(client, id=first, limit=5, fold=False)
    assert len(like) == 5 and first not in [hit["id"] for hit in like]
    several = search(client, id=[first, like[0]["id"]], limit=5, fold=False)
    assert not {first, like[0]["id"]} & {hit["id"] for hit in several}
    changed = search(client, id=first, text="the same, but the left half", limit=5, fold=False)
    assert [hit["id"] for hit in changed] != [hit["id"] for hit in like]


def test_pages_of_hits_follow_each_other(client: TestClient) -> None:
    for query in ({"text": "left half"}, {"id": search(client, text="left half")[3]["id"]}):
        whole = [hit["id"] for hit in search(client, limit=9, fold=False, **query)]
        parts = [search(client, limit=3, offset=offset, fold=False, **query) for offset in (0, 3, 6)]
        assert [hit["id"] for part in parts for hit in part] == whole
        assert [hit["rank"] for part in parts for hit in part] == list(range(1, 10))


def test_filters_and_threshold_hold(client: TestClient) -> None:
    found = search(client, text="left", filters={"split": "test"}, limit=50, fold=False)
    assert {hit["split"] for hit in found} == {"test"} and len(found) == 16
    assert search(client, text="left", filters={"split": ["nothing", "' OR 1=1 --"]}) == []
    assert search(client, text="left", filters={"indexed_before": "2000-01-01T00:00:00"}) == []
    least = found[3]["score"]
    above = search(client, text="left", filters={"split": "test"}, threshold=least, limit=50, fold=False)
    assert [hit["id"] for hit in above] == [hit["id"] for hit in found if hit["score"] >= least]


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, "neither words nor a picture"),
        ({"text": "  "}, 422, "neither words nor a picture"),
        ({"text": "?!"}, 422, "no letter and no digit"),
        ({"id": NAME}, 404, "no picture with that id"),
        ({"id": ["' OR 1=1 --"]}, 404, "no picture with that id"),
        ({"id": NAME, "image": "eA=="}, 422, "both an image and an id"),
        ({"text": "a", "limit": 0}, 422, "limit: "),
        ({"text": "a", "limit": "many"}, 422, "limit: "),
        ({"text": "a", "filters": {NAME: 1}}, 422, "unknown field"),
        ({"text": "a", "filters": {"indexed_after": "soon"}}, 422, "filters.indexed_after"),
        ({"image": 5}, 422, "image: "),
    ],
)
def test_a_wrong_query_is_one_sentence(client: TestClient, body: dict[str, Any], status: int, words: str) -> None:
    answer = client.post("/v1/search", json=body)
    assert answer.status_code == status and words in sentence(answer)


def test_pictures_of_the_index_are_served_by_id_only(client: TestClient) -> None:
    first = search(client, text="left half")[0]
    small = client.get(first["thumbnail"])
    assert small.headers["content-type"] == "image/jpeg" and Image.open(io.BytesIO(small.content)).size
    assert client.get(first["thumbnail"].removesuffix("/thumbnail")).json()["caption"] == first["caption"]
    for name in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "x"):
        assert client.get(f"/v1/pictures/{name}/thumbnail").status_code == 404


def test_answers_are_ranked_by_the_fused_vector(client: TestClient, embedder: Embedder) -> None:
    names = ["Left", "right", "top"]
    question = "Which half is bright?"
    query = embedder.embed([Image.open(io.BytesIO(bright("top")))], [question])[0]
    scores = embedder.embed(None, [name.lower() for name in names]) @ query
    body = {"image": encoded(bright("top")), "question": question, "answers": names}
    ranked = client.post("/v1/answers", json=body).json()["data"]
    assert [row["index"] for row in ranked] == list(np.argsort(-scores))
    assert [row["answer"] for row in ranked] == [names[row["index"]] for row in ranked]
    np.testing.assert_allclose([row["score"] for row in ranked], np.sort(scores)[::-1], atol=1e-5)
    first = search(client, text="left half")[0]["id"]
    by_id = client.post("/v1/answers", json={"id": first, "question": question, "answers": names})
    assert len(by_id.json()["data"]) == 3
    for wrong, words in (
        ({"answers": []}, "answers: "),
        ({"answers": ["a", " "]}, "answer 1 is empty"),
        ({"question": " "}, "the question is empty"),
        ({"image": None}, "give one picture"),
    ):
        answer = client.post("/v1/answers", json=body | wrong)
        assert answer.status_code == 422 and words in sentence(answer)


def test_without_an_index_search_says_how_to_get_one(embedder: Embedder) -> None:
    with TestClient(create_app(Engine("tiny", embedder, None, Limits())), base_url=LOCAL) as client:
        answer = client.post("/v1/search", json={"text": "a"})
        assert answer.status_code == 404 and "fuselip index build" in sentence(answer)
        assert client.get("/ready").json() == {"status": "ready", "index_rows": None}


def test_the_same_but_takes_the_original_or_says_that_it_is_gone(
    embedder: Embedder, finished_run: Settings, tmp_path: Path
) -> None:
    data = bright("top")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "top.png").write_bytes(data)
    (tmp_path / "in" / "left.png").write_bytes(bright("left"))
    build.build(tmp_path / "in", tmp_path / "index", embedder)
    wanted = embedder.embed([Image.open(io.BytesIO(data))], ["left"])[0]
    with TestClient(create_app(engine_of(embedder, tmp_path / "index")), base_url=LOCAL) as client:

        def ask() -> Any:
            return client.post("/v1/search", json={"id": "in/top.png", "text": "left"}).json()

        found = ask()
        assert [hit["id"] for hit in found["data"]] == ["in/left.png"] and found["note"] == ""
        assert found["data"][0]["score"] == pytest.approx(float(wanted @ vector_at(tmp_path, "in/left.png")), abs=1e-5)
        (tmp_path / "in" / "top.png").unlink()
        assert "its thumbnail was used" in ask()["note"]
        asked = {"id": "in/top.png", "question": "Which half is bright?", "answers": ["left", "top"]}
        assert "its thumbnail was used" in client.post("/v1/answers", json=asked).json()["note"]


def vector_at(folder: Path, name: str) -> np.ndarray:
    return Index.open(folder / "index").vectors([name])[0]


# ---- batching --------------------------------------------------------------------------------------------------------


def test_requests_that_arrive_together_run_together_and_stay_apart(engine: Engine, embedder: Embedder) -> None:
    pictures = [Image.open(io.BytesIO(bright("top"))), None]
    asked = [[(pictures[n % 2], f"row {n} {k}") for k in range(1 + n % 3)] for n in range(12)]
    batches: list[int] = []

    def embed(rows: Any) -> np.ndarray:
        batches.append(len(rows))
        return embedder.embed([image for image, _ in rows], [text for _, text in rows])

    async def run() -> list[np.ndarray]:
        batcher = Batcher(embed, Limits(batch_wait_ms=100), lambda _: None)
        batcher.start()
        found = await asyncio.gather(*(batcher.embed(rows) for rows in asked))
        await batcher.stop()
        return found

    found = asyncio.run(run())
    assert batches == [24]
    for rows, vectors in zip(asked, found, strict=True):
        alone = np.concatenate([embedder.embed([image], [text]) for image, text in rows])
        np.testing.assert_allclose(vectors, alone, atol=1e-6)


def test_a_batch_waits_for_requests_that_are_being_read_and_for_no_others() -> None:
    batches: list[int] = []

    def embed(rows: Any) -> np.ndarray:
        batches.append(len(rows))
        return np.ones((len(rows), 2), np.float32)

    async def run() -> None:
        batcher = Batcher(embed, Limits(batch_wait_ms=60_000), lambda _: None)
        batcher.start()

        async def read_slowly() -> None:
            with batcher.reading():
                await asyncio.sleep(0.1)
            await batcher.embed([(None, "read later")])

        await asyncio.gather(batcher.embed([(None, "there")]), read_slowly(), batcher.embed([(None, "too")]))
        await batcher.embed([(None, "alone")])
        await batcher.stop()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert batches == [3, 1]


def test_the_engine_says_what_it_reads(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow row is waited for; a refused request is not, afterwards."""
    engine = Engine("tiny", embedder, None, Limits(batch_wait_ms=60_000))
    batches: list[int] = []
    embed, prepare = engine.batcher._embed, engine._prepare

    def noted(rows: Any) -> np.ndarray:
        batches.append(len(rows))
        return embed(rows)

    def slow(row: int, image: Any, text: Any, truncate: bool) -> Any:
        time.sleep(0.2 * (text == "slow"))
        return prepare(row, image, text, truncate)

    monkeypatch.setattr(engine.batcher, "_embed", noted)
    monkeypatch.setattr(engine, "_prepare", slow)

    async def run() -> None:
        engine.start()
        await asyncio.gather(engine.embed([(None, "quick")]), engine.embed([(None, "slow")]))
        with pytest.raises(Refusal):
            await engine.embed([(None, "")])
        await engine.embed([(None, "alone")])
        await engine.stop()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert batches == [2, 1]


def test_one_bad_request_takes_no_other_along(client: TestClient) -> None:
    answers: dict[int, httpx.Response] = {}

    def ask(number: int) -> None:
        body = {"input": [{"image": "eA=="} if number % 2 else "left half"]}
        answers[number] = client.post("/v1/embeddings", json=body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[number].status_code for number in range(8)] == [200, 422] * 4


def test_a_batch_that_fails_is_run_again_request_by_request() -> None:
    def embed(rows: Any) -> np.ndarray:
        if any(text == "bad" for _, text in rows):
            raise ValueError("bad")
        return np.array([[len(text)] for _, text in rows], np.float32)

    async def run() -> list[Any]:
        batcher = Batcher(embed, Limits(batch_wait_ms=100), lambda _: None)
        batcher.start()
        asked = [batcher.embed([(None, text)]) for text in ("a", "bad", "abc")]
        found = await asyncio.gather(*asked, return_exceptions=True)
        await batcher.stop()
        return found

    first, second, third = asyncio.run(run())
    assert first == [[1]] and third == [[3]] and isinstance(second, ValueError)


def test_too_much_waiting_is_declined_and_given_up_requests_leave() -> None:
    release = threading.Event()

    def embed(rows: Any) -> np.ndarray:
        release.wait(10)
        return np.zeros((len(rows), 2), np.float32)

    async def run() -> None:
        batcher = Batcher(embed, Limits(waiting_rows=3, batch_rows=1, batch_wait_ms=0), lambda _: None)
        batcher.start()
        row = (None, "a")
        first = asyncio.create_task(batcher.embed([row]))
        second = asyncio.create_task(batcher.embed([row, row]))
        await asyncio.sleep(0.05)
        with pytest.raises(TooBusy, match="3 rows are waiting already"):
            await batcher.embed([row])
        second.cancel()
        await asyncio.sleep(0)
        assert batcher.waiting == 1
        release.set()
        assert (await first).shape == (1, 2)
        assert (await batcher.embed([row])).shape == (1, 2)
        await batcher.stop()
        assert not batcher.runs

    asyncio.run(run())


class Slow:
    """An embedder that takes its time, or whose vectors are damaged."""

    width = 4

    def __init__(self, real: Embedder, seconds: float = 0, is_broken: bool = False) -> None:
        self.model, self.processor, self.pixels, self.digest = real.model, real.processor, real.pixels, real.digest
        self._seconds, self._is_broken = seconds, is_broken

    def embed(self, images: list[Any], texts: list[Any]) -> np.ndarray:
        time.sleep(self._seconds)
        if self._is_broken:
            raise FuselipError("row 0: its embedding is not finite")  # as `Embedder.embed`
        return np.full((len(images), 4), 0.5, np.float32)


def test_a_request_that_takes_too_long_and_one_too_many(embedder: Embedder) -> None:
    slow = Engine("slow", Slow(embedder, 1.0), None, Limits(seconds=0.3))  # type: ignore[arg-type]
    with TestClient(create_app(slow), base_url=LOCAL) as client:
        answer = client.post("/v1/embeddings", json={"input": "a"})
        assert answer.status_code == 503 and "took too long" in sentence(answer)
    narrow = Engine("narrow", Slow(embedder), None, Limits(waiting_rows=1))  # type: ignore[arg-type]
    with TestClient(create_app(narrow), base_url=LOCAL) as client:
        answer = client.post("/v1/embeddings", json={"input": ["a", "b"]})
        assert (
            answer.status_code == 429 and answer.headers["retry-after"] == "1" and "waiting already" in sentence(answer)
        )
    broken = Engine("broken", Slow(embedder, is_broken=True), None, Limits())  # type: ignore[arg-type]
    with TestClient(create_app(broken), base_url=LOCAL) as client:
        for form in ("float", "base64"):
            answer = client.post("/v1/embeddings", json={"input": "a", "encoding_format": form})
            assert answer.status_code == 503 and "damaged" in sentence(answer)
        assert client.post("/invocations", json={"instances": [{"text": "a"}]}).status_code == 503


# ---- who may ask, how much, and what is kept of it -------------------------------------------------------------------


def test_a_large_body_is_declined_before_and_while_it_is_read(client: TestClient) -> None:
    def parts() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100_000

    for route in ("/v1/embeddings", "/v1/search", "/invocations"):
        for content in (b" " * 2_000_001, parts()):
            answer = client.post(route, content=content, headers={"Content-Type": "application/json"})
            assert answer.status_code == 413 and "more than 2 MB" in sentence(answer)
    answer = client.post("/v1/search", files={"image": ("x.png", b" " * 2_000_001)})
    assert answer.status_code == 413
    answer = client.post("/v1/search", content=b"a=b", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == 415 and "application/json" in sentence(answer)


def test_a_key_opens_everything_but_health(embedder: Embedder, index_folder: Path, tmp_path: Path) -> None:
    engine = engine_of(embedder, index_folder)
    path = tmp_path / "key"
    path.write_text("0123456789abcdef\n")
    path.chmod(0o600)
    with TestClient(create_app(engine, read_key(path)), base_url=LOCAL) as client:
        for route in ("/health", "/ready", "/ping"):
            assert client.get(route).status_code == 200
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic !"}, {"Authorization": "x"}):
            for route in ("/info", "/metrics", "/docs", "/openapi.json", "/v1/models"):
                assert client.get(route, headers=header).status_code == 401
            assert client.post("/v1/embeddings", json={"input": "a"}, headers=header).status_code == 401
        basic = base64.b64encode(b"me:0123456789abcdef").decode()
        for header in ({"Authorization": "Bearer 0123456789abcdef"}, {"Authorization": f"Basic {basic}"}):
            assert client.get("/info", headers=header).status_code == 200
    path.chmod(0o644)
    with pytest.raises(FuselipError, match="chmod 600"):
        read_key(path)
    for short in ("short", ""):
        path.write_text(short)
        with pytest.raises(FuselipError, match="16 characters"):
            read_key(path)


def test_pages_of_others_and_other_names_of_this_machine_are_declined(
    client: TestClient, embedder: Embedder, index_folder: Path
) -> None:
    engine = engine_of(embedder, index_folder)
    for headers in ({"Origin": "http://elsewhere"}, {"Origin": "null"}, {"Host": "rebound.example"}):
        answer = client.post("/v1/search", json={"text": "a"}, headers=headers)
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    assert client.get("/health", headers={"Origin": LOCAL}).status_code == 200
    with TestClient(create_app(engine, local=False), base_url="http://archive.example") as other:
        assert other.get("/health").status_code == 200


def test_nothing_of_a_request_is_logged_or_counted(
    client: TestClient, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, engine: Engine
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError(NAME)

    with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "fuselip"):
        client.post("/v1/embeddings", json={"input": [NAME, {"image": NAME}]})
        client.get("/v1/pictures/Smith/thumbnail", params={"q": NAME})
        client.get("/Smith")
        monkeypatch.setattr(engine, "embed", fail)
        unforeseen = client.post("/v1/embeddings", json={"input": NAME})
    assert unforeseen.status_code == 503 and "RuntimeError" in sentence(unforeseen)
    # What the client logs of its own is not the server's.
    logged = "\n".join(record.getMessage() for record in caplog.records if not record.name.startswith("httpx"))
    assert "POST /v1/embeddings 422" in logged and "unexpected RuntimeError" in logged
    assert "Smith" not in logged
    counted = client.get("/metrics").text
    assert "Smith" not in counted and 'route="/v1/embeddings",status="422"' in counted
    assert re.search(r"fuselip_index_rows 80", counted)


def test_urls_are_fetched_only_if_allowed_and_public(
    engine: Engine, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    willing = Engine("tiny", embedder, None, Limits(), allow_urls=True)
    with TestClient(create_app(willing), base_url=LOCAL) as client:
        private = ("127.0.0.1", "localhost", "10.0.0.1", "169.254.169.254", "[::1]", "0.0.0.0", "[::ffff:127.0.0.1]")
        for host in private:
            answer = client.post("/v1/embeddings", json={"input": [{"image": f"http://{host}:1/{NAME}.png"}]})
            assert answer.status_code == 422 and "private address" in sentence(answer), host

        async def fetched(url: str, row: int, most: int) -> bytes:
            return bright("top")

        monkeypatch.setattr("fuselip_core.serving.engine.fetch_image", fetched)
        answer = client.post("/v1/embeddings", json={"input": [{"image": "https://public.example/a.png"}]})
        wanted = embedder.embed([Image.open(io.BytesIO(bright("top")))])
        np.testing.assert_allclose(vectors_of(answer), wanted, atol=1e-6)
    assert urls.is_url("HTTPS://x") and not urls.is_url("data:image/png;base64,eA==")


# ---- state, documents, start -----------------------------------------------------------------------------------------


def test_state_and_documents(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "alive"}
    assert client.get("/ready").json() == {"status": "ready", "index_rows": 80}
    assert client.get("/ping").status_code == 200
    info = client.get("/info").json()
    assert info["model"] == "tiny" and info["index"]["rows"] == 80 and info["limits"]["rows"] == 8
    document = client.get("/openapi.json").json()
    assert {"/v1/embeddings", "/v1/search", "/v1/answers", "/invocations"} <= set(document["paths"])
    assert "multipart/form-data" in document["paths"]["/v1/search"]["post"]["requestBody"]["content"]
    page = client.get("/docs").text
    assert "POST /v1/search" in page and "threshold" in page
    assert not re.search(r"(src|href)=.?(https?:)?//", page)
    assert "default-src 'self'" in client.get("/docs").headers["content-security-policy"]


def test_an_index_of_another_model_and_damaged_weights_are_refused_at_start(
    finished_run: Settings, index_folder: Path, tmp_path: Path
) -> None:
    embedder = Embedder.from_pretrained(finished_run.artifacts / "model", "cpu")
    with torch.no_grad():
        next(embedder.model.parameters()).add_(0.01)
    embedder.model.save_pretrained(tmp_path / "other")
    with pytest.raises(FuselipError, match="not with the model in use"):
        open_engine(str(tmp_path / "other"), index_folder, Limits())
    state = {name: value.clone() for name, value in embedder.model.state_dict().items()}
    name = next(name for name, value in state.items() if value.is_floating_point())
    state[name].view(-1)[0] = float("nan")
    from safetensors.torch import save_file

    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "other" / "model.safetensors")
    from fuselip_core.registry.served_model import FuselipEmbedding

    context = type("Context", (), {"artifacts": {"model": str(tmp_path / "other")}})
    for load in (
        lambda: open_engine(str(tmp_path / "other"), None, Limits()),
        lambda: FuselipEmbedding().load_context(context),
    ):
        with pytest.raises(CheckpointError, match="NaN or infinite"):
            load()
    with pytest.raises(FuselipError, match="neither a model nor an index"):
        open_engine(None, None, Limits())
    write_json(tmp_path / "empty" / "x.json", {})
    with pytest.raises(FuselipError, match="there is no index"):
        open_engine(None, tmp_path / "empty", Limits())


@pytest.fixture
def address(embedder: Embedder, index_folder: Path) -> Iterator[str]:
    """Address of a real server in a thread."""
    config = uvicorn.Config(create_app(engine_of(embedder, index_folder)), port=0, log_level="error", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"{LOCAL}:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


@pytest.mark.long
def test_no_request_that_the_document_allows_or_forbids_ends_in_a_500(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    late, made = time.monotonic() + SCHEMA_SECONDS, set()
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) >= 11
    while time.monotonic() < late:
        for operation in operations:

            @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
            @given(case=operation.as_strategy())
            def ask(case: Any) -> None:
                answer = case.call()
                assert answer.status_code < 500, case.as_curl_command()
                if answer.status_code == 200 and "json" in answer.headers.get("content-type", ""):
                    assert "NaN" not in answer.text and "Infinity" not in answer.text
                elif answer.status_code >= 400:
                    assert answer.json()
                made.add((case.operation.path, answer.status_code))

            ask()
    assert {("/v1/embeddings", 200), ("/v1/search", 422), ("/v1/answers", 422), ("/health", 200)} <= made
