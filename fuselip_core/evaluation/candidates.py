"""Multiple-choice evaluation sets: SugarCrepe, crops of Open Images, MMEB, ImageNet, edits.

A question is right if its right option scores above all others; a tie is wrong. The published evaluation of FuseLIP
lists the right option first and takes the first maximum, so ties are right there; `ties_right` reproduces that. Further
metrics are chance and, for questions with an image and a text, the accuracy with either alone.

Legend: Q questions of a task, S distinct sides (image, text or both), D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.pair import Side
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.evaluation.metrics import Array, rank_answers
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.images import decode
from fuselip_core.progress import track

PREFIX = "candidates"
# MMEB's groups of tasks (arXiv 2410.05160, table 1).
MMEB_GROUPS = {
    "classification": "ImageNet-1K N24News HatefulMemes VOC2007 SUN397 Place365 ImageNet-A ImageNet-R ObjectNet "
    "Country211",
    "vqa": "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W ScienceQA VizWiz GQA TextVQA",
    "retrieval": "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA FashionIQ Wiki-SS-NQ "
    "OVEN EDIS",
    "grounding": "MSCOCO RefCOCO RefCOCO-Matching Visual7W-Pointing",
}


class SideEmbedder(Protocol):
    """The part of an embedder (model/embedder.py) that is needed here."""

    def embed(self, images: Sequence[Image.Image | None], texts: Sequence[str | None], batch_size: int) -> Array:
        """Sides, one a row → embeddings (S, D) float32 of unit norm."""


@dataclass(frozen=True)
class Question:
    """A query, the name of its list of options, and the index of the right one."""

    query: Side
    options: str
    answer: int


def has_candidates(prepared: PreparedData, split: str) -> bool:
    """Whether a split has questions with options."""
    return bool(prepared.manifest["counts"].get(split, {}).get("candidates"))


def measure_candidates(
    embedder: SideEmbedder, prepared: PreparedData, settings: EvaluateSettings, result: EvaluationResult
) -> None:
    """Adds accuracy, chance and controls for every task in every split of `prepared` that has questions."""
    for split in prepared.splits:
        if has_candidates(prepared, split):
            _measure_split(embedder, prepared, split, settings, result)


def _measure_split(
    embedder: SideEmbedder, prepared: PreparedData, split: str, settings: EvaluateSettings, result: EvaluationResult
) -> None:
    tasks = _questions(prepared, split)
    options = prepared.options(split)
    asked = [question.query for questions in tasks.values() for question in questions]
    sides = set(asked).union(*options.values(), *map(_parts, asked))
    rows = {side: row for row, side in enumerate(sorted(sides, key=lambda side: (side.image or "", side.text or "")))}
    embeddings = _embed_all(embedder, prepared, split, rows, settings.batch_size)
    lists = {name: embeddings[[rows[side] for side in listed]] for name, listed in options.items()}
    for task, questions in tasks.items():
        _measure_task(task, questions, rows, embeddings, lists, settings.seed, result)
    _add_means(list(tasks), result)


def _questions(prepared: PreparedData, split: str) -> dict[str, list[Question]]:
    """The questions of each task, in order."""
    tasks: dict[str, list[Question]] = defaultdict(list)
    for row in prepared.candidates(split).to_pylist():
        query = Side(row["query_image"], row["query_text"])
        tasks[row["task"]].append(Question(query, row["options"], row["answer"]))
    return dict(sorted(tasks.items()))


def _parts(side: Side) -> Iterable[Side]:
    """The image alone and the text alone of a side that has both."""
    return (replace(side, text=None), replace(side, image=None)) if side.image and side.text else ()


def _embed_all(
    embedder: SideEmbedder, prepared: PreparedData, split: str, rows: Mapping[Side, int], batch_size: int
) -> Array:
    """Embeddings (S, D) of all sides, a batch of pictures at a time."""
    found: dict[int, Array] = {}
    batches = _batches(prepared, split, rows, batch_size)
    for sides, pictures in track(batches, f"embed candidates of {split}"):
        embedded = embedder.embed(pictures, [side.text for side in sides], batch_size)
        found |= {rows[side]: row for side, row in zip(sides, embedded, strict=True)}
    return np.stack([found[row] for row in range(len(rows))])


def _batches(
    prepared: PreparedData, split: str, rows: Mapping[Side, int], batch_size: int
) -> Iterator[tuple[list[Side], list[Image.Image | None]]]:
    """Sides with their decoded pictures: first those without a picture, then the others in the order of the shards."""
    of_image: dict[str | None, list[Side]] = defaultdict(list)
    for side in rows:
        of_image[side.image].append(side)
    plain = of_image.pop(None, [])
    for start in range(0, len(plain), batch_size):
        part = plain[start : start + batch_size]
        yield part, [None] * len(part)
    sides: list[Side] = []
    pictures: list[Image.Image | None] = []
    for batch in prepared.iter_images(split, columns=["image_id", "bytes"], batch_rows=batch_size):
        for row in batch.to_pylist():
            if here := of_image.get(row["image_id"]):
                picture = decode(row["bytes"])
                sides += here
                pictures += [picture] * len(here)
        if sides:
            yield sides, pictures
            sides, pictures = [], []


def _measure_task(
    task: str,
    questions: Sequence[Question],
    rows: Mapping[Side, int],
    embeddings: Array,
    lists: Mapping[str, Array],
    seed: int,
    result: EvaluationResult,
) -> None:
    name = f"{PREFIX}/{task}"
    # Questions about the same picture are not independent.
    names = [question.query.image or f"question {number}" for number, question in enumerate(questions)]
    pictures = np.unique(np.array(names), return_inverse=True)[1].ravel()
    result.add_share(f"{name}/accuracy", _right(questions, rows, embeddings, lists), pictures, seed)
    tied = _right(questions, rows, embeddings, lists, ties_right=True)
    result.metrics[f"{name}/ties_right"] = float(np.mean(tied))
    result.metrics[f"{name}/chance"] = float(np.mean([1 / len(lists[question.options]) for question in questions]))
    result.metrics[f"{name}/questions"] = float(len(questions))
    if all(question.query.image and question.query.text for question in questions):
        for control, lacking in (("image_only", "text"), ("text_only", "image")):
            alone = [replace(question, query=replace(question.query, **{lacking: None})) for question in questions]
            result.add_share(f"{name}/{control}", _right(alone, rows, embeddings, lists), pictures, seed)


def _add_means(tasks: Sequence[str], result: EvaluationResult) -> None:
    """Adds the unweighted mean over the tasks of a benchmark, and of each group of MMEB, as published."""
    benchmarks: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        benchmark, _, part = task.partition("/")
        benchmarks[benchmark].append(task)
        if benchmark == "mmeb":
            for group in (group for group, names in MMEB_GROUPS.items() if part in names.split()):
                benchmarks[f"mmeb/{group}"].append(task)
    for benchmark, parts in benchmarks.items():
        if len(parts) > 1:
            for what in ("accuracy", "ties_right", "chance"):
                values = [result.metrics[f"{PREFIX}/{task}/{what}"] for task in parts]
                result.metrics[f"{PREFIX}/{benchmark}/mean_{what}"] = float(np.mean(values))


def _right(
    questions: Sequence[Question],
    rows: Mapping[Side, int],
    embeddings: Array,
    lists: Mapping[str, Array],
    ties_right: bool = False,
) -> Array:
    """(Q) bool: whether the right option scores above all others. Questions that share a list are ranked together."""
    by_list: dict[str, list[int]] = defaultdict(list)
    for number, question in enumerate(questions):
        by_list[question.options].append(number)
    right = np.zeros(len(questions), dtype=bool)
    for name, numbers in by_list.items():
        queries = embeddings[[rows[questions[number].query] for number in numbers]]
        correct = np.array([questions[number].answer for number in numbers])
        if ties_right:
            scores = queries.astype(np.float32) @ lists[name].T.astype(np.float32)
            right[numbers] = scores[np.arange(len(numbers)), correct] >= scores.max(axis=1)
        else:
            right[numbers] = rank_answers(queries, lists[name], correct) == 1
    return right
