"""The result of an evaluation: flat metrics with their intervals, and examples."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fuselip_core.evaluation.metrics import Array, interval, paired_interval


@dataclass(frozen=True)
class Candidate:
    """A ranked caption, answer or image (`image`: its row in the split); `score`: cosine similarity."""

    text: str
    score: float
    right: bool
    rank: int = 0
    image: int | None = None


@dataclass(frozen=True)
class RetrievalExample:
    """A query: an image (its row in the split) with its own captions or, if `image` is None, a caption.

    rank: of the best right candidate. top: the first candidates, and the best right one if it comes later.
    """

    image: int | None
    captions: tuple[str, ...]
    rank: int
    top: tuple[Candidate, ...]


@dataclass(frozen=True)
class AnswerExample:
    """A question about an image (its row in the split), its answer and rank, the first candidates and the right one.

    swapped: the first answer when the image is replaced by `other`.
    """

    image: int
    question: str
    answer: str
    answer_type: str
    rank: int
    top: tuple[Candidate, ...]
    other: int | None = None
    swapped: str = ""


@dataclass(frozen=True)
class Concept:
    """A concept with its numbers of images in the split and in training (None: not used), and the AUC by method."""

    code: str
    name: str
    images: int
    training_images: int | None
    auc: dict[str, float]


@dataclass
class EvaluationResult:
    """metrics: name → value. intervals: name → 95 % interval. The rest are examples, random or the worst by rank.

    retrieval: image → caption, captions: caption → image. concepts: most frequent first. embeddings: rows of images
    (I), their embeddings (I, D) and those of captions (C, D).
    """

    split: str
    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    retrieval: list[RetrievalExample] = field(default_factory=list)
    captions: list[RetrievalExample] = field(default_factory=list)
    answers: list[AnswerExample] = field(default_factory=list)
    worst: list[RetrievalExample] = field(default_factory=list)
    worst_answers: list[AnswerExample] = field(default_factory=list)
    concepts: list[Concept] = field(default_factory=list)
    embeddings: tuple[Array, Array, Array] | None = None

    def numbers(self) -> dict[str, float]:
        """The content of metrics.json: metrics, and their intervals as ``<metric>/low`` and ``<metric>/high``."""
        bounds = {
            f"{name}/{end}": bound
            for name, interval in self.intervals.items()
            for end, bound in zip(("low", "high"), interval, strict=True)
        }
        return dict(sorted((self.metrics | bounds).items()))

    def add_share(self, name: str, hits: Array, clusters: Array, seed: int) -> None:
        """Adds the mean of `hits` (N), bool or in 0..1, under `name`, with its interval over whole `clusters` (N)."""
        self.metrics[name] = float(hits.mean())
        self.intervals[name] = interval(hits, seed, clusters)

    def add_gain(self, name: str, first: Array, second: Array, clusters: Array, seed: int) -> None:
        """Adds the difference of the means of `first` and `second`, scores (N) of the same items, with its interval."""
        self.metrics[name] = float(np.mean(first) - np.mean(second))
        self.intervals[name] = paired_interval(first, second, seed, clusters)
