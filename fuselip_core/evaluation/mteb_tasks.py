"""Adapters of models and prepared data for MTEB (its multimodal part: arXiv 2504.10471).

    import mteb
    from fuselip_core.evaluation.mteb_tasks import MtebModel, tasks_of

    model = MtebModel(Embedder.from_pretrained("models:/fuselip-rocov2-small@champion"))
    mteb.evaluate(model, tasks_of(PreparedData("artifacts/prepared"), "test"))

Three tasks: image → caption, caption → image, and image with question → answer, with a fused query. Pools and right
answers are those of `fuselip evaluate`, so hit_rate_at_k here equals recall_at_k there, with one exception: `evaluate`
treats captions as equal if the model cuts them to the same tokens.

Needs the extra `mteb`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol

import datasets  # type: ignore[import-untyped]
import numpy as np
import pyarrow.compute as pc
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from numpy.typing import NDArray

from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.answers import QUESTION, answer_key
from fuselip_core.evaluation.retrieval import CAPTION

BATCH = 64
CATEGORIES = {"i2t": "its captions", "t2i": "its images", "it2t": "the answer to a question about an image"}


class PairEmbedder(Protocol):
    """The interface of Embedder and TwoTowers that is needed here."""

    name: str

    def embed(self, images: Sequence[Any], texts: Sequence[str | None], batch_size: int) -> NDArray[np.float32]:
        """Rows of pictures, texts or both → unit-norm embeddings (N, W) float32."""


class MtebModel(AbsEncoder):
    """An MTEB encoder. A row with a picture and a text becomes one fused vector; instructions are ignored."""

    def __init__(self, embedder: PairEmbedder) -> None:
        self.embedder = embedder
        # MTEB requires owner/name, and names the folder of results after it.
        name = re.sub(r"[^\w.-]+", "-", embedder.name or "model").strip("-.")
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": f"fuselip/{name}", "revision": "1", "modalities": ["image", "text"]}
        )

    def encode(self, inputs: Any, **_: Any) -> NDArray[np.float32]:
        """Batches with the columns `image`, `text` or both → unit-norm embeddings (N, W) float32."""
        parts = []
        for batch in inputs:
            images, texts = batch.get("image"), batch.get("text")
            count = len(images if texts is None else texts)
            parts.append(self.embedder.embed(images or [None] * count, texts or [None] * count, BATCH))
        return np.concatenate(parts)


class PreparedRetrieval(AbsTaskRetrieval):
    """Retrieval over a split of prepared data; `category` is MTEB's i2t, t2i or it2t."""

    prepared: PreparedData
    split: str
    category: str

    def load_data(self, *_: Any, **__: Any) -> None:
        """Reads queries, corpus and right answers from the shards; raises FuselipError if there are no such pairs."""
        if self.data_loaded:
            return
        make = self._answers if self.category == "it2t" else self._captions
        queries, corpus, right = make()
        if not queries:
            raise FuselipError(f"{self.prepared.folder} has no pairs for {self.metadata.name} in split '{self.split}'")
        part: RetrievalSplitData = {
            "queries": _table(queries),
            "corpus": _table(corpus),
            "relevant_docs": {query: dict.fromkeys(documents, 1) for query, documents in right.items()},
            "top_ranked": None,
        }
        self.dataset, self.data_loaded = {"default": {self.split: part}}, True

    def _pairs(self, kind: str) -> list[dict[str, Any]]:
        table = self.prepared.pairs(self.split)
        return table.filter(pc.equal(table["kind"], kind)).to_pylist()

    def _captions(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[str]]]:
        """One caption for each pair, one row for each image; all captions equal to a right one are right."""
        pairs = self._pairs(CAPTION)
        owners: dict[str, list[str]] = {}
        readers: dict[str, list[str]] = {}
        for pair in pairs:
            owners.setdefault(pair["target_text"], []).append(pair["query_image"])
            readers.setdefault(pair["target_text"], []).append(pair["pair_id"])
        captions = [{"id": pair["pair_id"], "text": pair["target_text"]} for pair in pairs]
        images = [{"id": name, "image": content} for name, content in self._images().items()]
        if self.category == "t2i":
            return captions, images, {pair["pair_id"]: owners[pair["target_text"]] for pair in pairs}
        right: dict[str, list[str]] = {}
        for pair in pairs:
            right.setdefault(pair["query_image"], []).extend(readers[pair["target_text"]])
        return [image for image in images if image["id"] in right], captions, right

    def _answers(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[str]]]:
        """Queries are questions with their images; the corpus is the distinct answers of the split."""
        pairs, images = self._pairs(QUESTION), self._images()
        texts: dict[str, str] = {}
        for pair in pairs:
            texts.setdefault(answer_key(pair["target_text"]), pair["target_text"])
        queries = [
            {"id": pair["pair_id"], "image": images[pair["query_image"]], "text": pair["query_text"]} for pair in pairs
        ]
        right = {pair["pair_id"]: [answer_key(pair["target_text"])] for pair in pairs}
        return queries, [{"id": key, "text": text} for key, text in texts.items()], right

    def _images(self) -> dict[str, dict[str, bytes]]:
        return {
            row["image_id"]: {"bytes": row["bytes"]}
            for batch in self.prepared.iter_images(self.split, ["image_id", "bytes"])
            for row in batch.to_pylist()
        }


def tasks_of(prepared: PreparedData, split: str, name: str = "ROCOv2") -> list[PreparedRetrieval]:
    """The tasks that a split has pairs for, named after the data set, such as NAMEI2TRetrieval."""
    kinds = set(pc.unique(prepared.pairs(split)["kind"]).to_pylist())
    categories = ["i2t", "t2i"] * (CAPTION in kinds) + ["it2t"] * (QUESTION in kinds)
    return [_task(prepared, split, category, name) for category in categories]


def _task(prepared: PreparedData, split: str, category: str, name: str) -> PreparedRetrieval:
    """A task with its own class, because MTEB stores metadata on the class and clears the instance after use."""
    metadata = TaskMetadata(
        name=f"{name}{category.upper()}Retrieval",
        description=f"Find {CATEGORIES[category]} in {name}.",
        dataset={"path": str(prepared.folder), "revision": prepared.data_version},
        type="Any2AnyRetrieval",
        category=category,
        modalities=["text", "image"],
        eval_splits=[split],
        eval_langs=["eng-Latn"],
        main_score="hit_rate_at_1" if category == "it2t" else "hit_rate_at_10",
        domains=["Medical"],
        task_subtypes=["Image Text Retrieval"],
    )
    told = {"metadata": metadata, "prepared": prepared, "split": split, "category": category}
    return type(metadata.name, (PreparedRetrieval,), told)()


def _table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    fields = {key: datasets.Image() if key == "image" else datasets.Value("string") for key in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(fields))
