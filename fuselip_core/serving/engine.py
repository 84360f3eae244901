"""The work behind the API and the page: embed, search, rank answers."""

from __future__ import annotations

import asyncio
import io
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from fuselip_core.data.pair import answer_text
from fuselip_core.errors import FuselipError
from fuselip_core.monitoring.seen import Seen
from fuselip_core.request_rules import Refusal, UnreadablePicture, fit_text, read_row
from fuselip_core.search.index import Filters, Hit, Index, ReplacedIndex
from fuselip_core.search.query import require
from fuselip_core.serving.batching import Batcher, Row, Vectors
from fuselip_core.serving.limits import Limits, NotFound, ServingError
from fuselip_core.serving.metrics import Metrics
from fuselip_core.serving.rows import RawRow
from fuselip_core.serving.urls import fetch_image, is_url

if TYPE_CHECKING:
    from fuselip_core.model.embedder import Embedder

FOLLOW_SECONDS = 10.0  # between checks whether the index was rebuilt with another model
logger = logging.getLogger("fuselip")


@dataclass(frozen=True)
class Query:
    """A search by words, by a picture, by both, or by pictures of the index (`ids`)."""

    text: str | None = None
    image: Any = None
    ids: tuple[str, ...] = ()
    filters: Filters = field(default_factory=Filters)
    limit: int = 10
    offset: int = 0
    threshold: float | None = None
    hybrid: bool = False
    fold: bool = True
    truncate: bool = False


class Engine:
    """A model, an optional index, and their worker threads. Clients know the model as `name`.

    If the index is rebuilt with another model, the engine loads that model.
    """

    def __init__(
        self, name: str, embedder: Embedder, index: Index | None, limits: Limits, allow_urls: bool = False
    ) -> None:
        self.name, self.limits, self.allow_urls, self.metrics = name, limits, allow_urls, Metrics()
        self.seen: Seen | None = None
        self._take(embedder, index)
        self.batcher = Batcher(self._embed_batch, limits, self.metrics.batch_rows.observe)
        self._decoders = ThreadPoolExecutor(limits.decoders, thread_name_prefix="decode")
        self._searchers = ThreadPoolExecutor(2, thread_name_prefix="search")
        self._follower: asyncio.Task[None] | None = None

    def _take(self, embedder: Embedder, index: Index | None) -> None:
        self.embedder, self.index = embedder, index
        self._tokenizer = embedder.processor.text_tokenizer
        self._facets: tuple[int, Mapping[str, Mapping[str, int]]] | None = None

    def start(self) -> None:
        """Starts the workers; call it in the running event loop."""
        self.batcher.start()
        self._follower = asyncio.get_running_loop().create_task(self._follow())

    async def stop(self) -> None:
        """Stops after the current batch."""
        if self._follower is not None:
            self._follower.cancel()
        await self.batcher.stop()
        if self.seen:
            self.seen.close()

    async def _follow(self) -> None:
        said = ""
        while True:
            await asyncio.sleep(FOLLOW_SECONDS)
            try:
                await asyncio.to_thread(self.follow)
            except Exception as error:
                if str(error) != said:
                    logger.error("the index was rebuilt with another model, which cannot be loaded: %s", error)
                said = str(error)

    def follow(self) -> None:
        """Loads index and model again if the index was rebuilt with another model; raises FuselipError."""
        if self.index is None:
            return
        try:
            self.index.require_same_model()
        except ReplacedIndex:
            logger.info("%s was rebuilt with another model, which is now loaded", self.index.folder)
            embedder, index = open_pair(self.name, self.index.folder)
            warm_up(embedder)
            self._take(embedder, index)

    def _embed_batch(self, rows: Sequence[Row]) -> Vectors:
        try:
            vectors = self.embedder.embed([pixels for pixels, _ in rows], [text for _, text in rows])
        except FuselipError as error:  # the rows were checked before, so the model is at fault
            raise ServingError("an embedding is not finite; the model is damaged, load it again") from error
        return np.asarray(vectors, np.float32)

    async def embed(self, rows: Sequence[RawRow], truncate: bool = False) -> tuple[Vectors, int]:
        """Rows (N) → unit-norm embeddings (N, W) float32, and the number of tokens; raises Refusal or TooBusy."""
        if len(rows) > self.limits.rows:
            raise Refusal(f"{len(rows)} rows are more than the {self.limits.rows} that this server takes; send fewer")
        with self.batcher.reading():
            ready = await self._read(rows, truncate)
        vectors = await self.batcher.embed([(pixels, text) for pixels, text, _ in ready])
        if self.seen:
            noted = [(pixels is not None, text) for pixels, text, _ in ready]
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._decoders, self.seen.add, noted, vectors, self.embedder.digest)
        return vectors, sum(tokens for _, _, tokens in ready)

    async def _read(self, rows: Sequence[RawRow], truncate: bool) -> list[Any]:
        """Rows as `_prepare` makes them, each in a decoder's thread."""
        loop = asyncio.get_running_loop()
        fetched = [(await self._fetched(image, row), text) for row, (image, text) in enumerate(rows)]
        work = [
            loop.run_in_executor(self._decoders, self._prepare, row, image, text, truncate)
            for row, (image, text) in enumerate(fetched)
        ]
        try:
            return [await each for each in work]
        except UnreadablePicture:
            if self.seen:
                self.seen.add_unreadable()
            raise
        finally:
            for each in work:
                each.cancel()  # those not yet started, if the request failed or was cancelled

    async def _fetched(self, image: Any, row: int) -> Any:
        if not is_url(image):
            return image
        if not self.allow_urls:
            raise Refusal(f"row {row}: this server does not fetch URLs; send the image as a data URI")
        return await fetch_image(image, row, int(self.limits.body_mb * 1e6))

    def _prepare(self, row: int, image: Any, text: Any, truncate: bool) -> tuple[Tensor | None, str | None, int]:
        picture, words = read_row(row, image, text, self.limits.megapixels)
        tokens = 0
        if words is not None:
            words = fit_text(self._tokenizer, row, words, truncate)
            tokens = min(len(self._tokenizer.encode(words)), self._tokenizer.context_length - 2)
        return None if picture is None else self.embedder.pixels(picture), words, tokens

    async def search(self, query: Query) -> tuple[list[Hit], str]:
        """The nearest pictures, best first, and a note about the query; raises FuselipError for a bad query."""
        index = self._index()
        text = query.text if query.text and query.text.strip() else None
        require(text, query.image is not None or bool(query.ids))
        image, note = query.image, ""
        if query.ids and image is not None:
            raise Refusal("the query has both an image and an id; give one of them")
        if query.ids and text:
            image, note = await self.picture(query.ids[0])  # which the words modify
        if image is None and text is None:
            vector = await self._mean_of(index, query.ids)
        else:
            vector = (await self.embed([(image, text)], query.truncate))[0][0]
        words = text if query.hybrid and image is None else None
        # The pictures of the query are removed from its hits, so as many more are needed, from the first on.
        first, wanted = (0, query.offset + query.limit + len(query.ids)) if query.ids else (query.offset, query.limit)
        try:
            hits = await self._in_index(
                index.search, vector, words, wanted, first, query.filters, query.threshold, query.fold
            )
        except ReplacedIndex:
            sentence = "the index was rebuilt with another model, which is being loaded; try again in a moment"
            raise ServingError(sentence) from None
        if query.ids:
            hits = [hit for hit in hits if hit.id not in query.ids][query.offset :]
        return list(hits[: query.limit]), note

    async def _mean_of(self, index: Index, ids: tuple[str, ...]) -> Vectors:
        try:
            vectors = await self._in_index(index.vectors, list(ids))
        except FuselipError:
            raise NotFound("the index has no picture with that id") from None
        mean = vectors.mean(axis=0)
        length = float(np.linalg.norm(mean))
        if length < 1e-6:
            raise Refusal("the vectors of these pictures cancel each other out; give fewer ids")
        return np.asarray(mean / length, np.float32)

    async def item(self, name: str) -> Hit:
        """The picture with that id; raises NotFound."""
        try:
            return await self._in_index(self._index().get, name)
        except FuselipError:
            raise NotFound("the index has no picture with that id") from None

    async def picture(self, name: str) -> tuple[bytes, str]:
        """The original of a picture and "", or its thumbnail and a note that says why; raises NotFound."""
        small = (await self.item(name)).thumbnail
        original = await self._in_index(self._index().original, name)
        if original is None:
            return small, "The original picture could not be read; its thumbnail was used."
        if math.prod(Image.open(io.BytesIO(original)).size) > self.limits.megapixels * 1e6:
            return small, "The original picture is too large for this server; its thumbnail was used."
        return original, ""

    async def answers(
        self, image: Any, name: str | None, question: str, candidates: Sequence[str], truncate: bool = False
    ) -> tuple[list[tuple[int, float]], str]:
        """Positions in `candidates` with their cosine to image and question, best first, and a note as of `picture`.

        Raises Refusal or NotFound.
        """
        if (image is None) == (name is None):
            raise Refusal("give one picture to ask about, either as an image or as an id of the index")
        if not question.strip():
            raise Refusal("the question is empty; write one")
        if not candidates:
            raise Refusal("there are no answers to rank; write some, one a line")
        for row, candidate in enumerate(candidates):
            if not candidate.strip():
                raise Refusal(f"answer {row} is empty; write one or leave it out")
        picture, note = (image, "") if name is None else await self.picture(name)
        # Answers in lower case on one line, as in training.
        rows = [(picture, question), *((None, answer_text(candidate)) for candidate in candidates)]
        vectors, _ = await self.embed(rows, truncate)
        scores = vectors[1:] @ vectors[0]
        return [(int(place), float(scores[place])) for place in np.argsort(-scores, kind="stable")], note

    async def facets(self) -> Mapping[str, Mapping[str, int]]:
        """Counts by modality, concept, split and source, cached until the number of pictures changes."""
        index = self._index()
        rows = await self._in_index(len, index)
        if self._facets is None or self._facets[0] != rows:
            self._facets = rows, await self._in_index(index.facets)
        return self._facets[1]

    async def map(self) -> tuple[list[str], Vectors, list[str]]:
        """Ids, coordinates (N, 2) and modalities of the pictures on the map."""
        index = self._index()
        ids, places = await self._in_index(index.map)
        return ids, places, await self._in_index(index.modalities, ids)

    def _index(self) -> Index:
        if self.index is None:
            raise NotFound("this server has no index; start it with --index, after `fuselip index build`")
        return self.index

    async def _in_index(self, work: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._searchers, work, *arguments)

    def info(self) -> dict[str, Any]:
        """Model, index and limits."""
        config = self.embedder.model.config
        return {
            "model": self.name,
            "family": config.model_type,
            "width": self.embedder.width,
            "image_size": self.embedder.processor.size,
            "text_tokens": self._tokenizer.context_length - 2,
            "device": str(self.embedder.model.device),
            "index": None if self.index is None else self.index.info(),
            "limits": vars(self.limits),
            "allow_urls": self.allow_urls,
        }


def open_engine(model: str | None, index: str | Path | None, limits: Limits, allow_urls: bool = False) -> Engine:
    """The engine of a model (folder, hub id or models:/ address) and an index; raises FuselipError.

    Without `model`, the one that built the index.
    """
    name = Index.open(index).model_name if model is None and index is not None else model
    if name is None:
        raise FuselipError("there is neither a model nor an index to serve; give --model, --index or both")
    embedder, opened = open_pair(name, index)
    warm_up(embedder)
    return Engine(name, embedder, opened, limits, allow_urls)


def open_pair(model: str, index: str | Path | None) -> tuple[Embedder, Index | None]:
    """The model and the index; raises FuselipError if the index was built with another model.

    A registry alias means the version that it pointed to when the index was built.
    """
    from fuselip_core import Embedder

    opened = None if index is None else Index.open(index, in_memory=True)
    embedder = Embedder.from_pretrained(opened.model_address if opened and model == opened.model_name else model)
    if opened is not None:
        opened.check_model(embedder.digest)
    return embedder, opened


def warm_up(embedder: Embedder) -> None:
    """Embeds a few rows, so that the first request need not wait for the tokenizer's tables and torch's kernels."""
    side = embedder.processor.size
    picture = embedder.pixels(Image.new("RGB", (side, side)))
    embedder.embed([picture, None, picture], [None, "warm up", "warm up"])
