"""Answer ranking: image and question against all distinct answers of the split, with controls that need no fusion.

Legend: Q questions, A distinct answers, D width.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.pair import answer_text
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import ABSENT, ANSWER_TYPES, TokenStore
from fuselip_core.evaluation.embed import SideEncoder, embed
from fuselip_core.evaluation.metrics import Array, deranged, rank_answers, ratio_interval, top
from fuselip_core.evaluation.result import AnswerExample, Candidate, EvaluationResult

QUESTION = "vqa"
CLOSED, OPEN = ANSWER_TYPES.index("closed"), ANSWER_TYPES.index("open")
SHOWN = 5
WORST = 4
MOST_QUESTIONS = 20  # up to this many distinct questions are also reported one by one


@dataclass(frozen=True)
class AnswerPool:
    """images, questions (Q): rows. answers (A): a text row of each distinct answer, names (A). correct (Q): indices."""

    images: Array
    questions: Array
    types: Array
    answers: Array
    names: tuple[str, ...]
    correct: Array

    @classmethod
    def of(cls, store: TokenStore, rows: Array) -> AnswerPool:
        """The pool of the question pairs `rows`."""
        targets, place = np.unique(store.pairs.target_text[rows], return_inverse=True)
        names = [answer_key(text) for text in store.texts_of(targets)]
        first: dict[str, int] = {}
        for number, name in enumerate(names):
            first.setdefault(name, number)
        index = {name: number for number, name in enumerate(first)}
        return cls(
            images=store.pairs.query_image[rows],
            questions=store.pairs.query_text[rows],
            types=store.pairs.answer_type[rows],
            answers=targets[list(first.values())],
            names=tuple(first),
            correct=np.array([index[name] for name in names], np.int64)[place.ravel()],
        )


def answer_key(text: str) -> str:
    """Normalises an answer: differences in case, spaces or a final full stop do not count."""
    return answer_text(text).rstrip(" .")


def question_rows(store: TokenStore) -> Array:
    """Pairs of an image with a question → a text."""
    if QUESTION not in store.kinds:
        return np.zeros(0, np.int64)
    pairs = store.pairs
    whole = (pairs.query_image >= 0) & (pairs.query_text >= 0) & (pairs.target_text >= 0)
    return np.flatnonzero((pairs.kind == store.kinds.index(QUESTION)) & whole & (pairs.target_image == ABSENT))


def measure_answers(
    encoder: SideEncoder,
    store: TokenStore,
    prepared: PreparedData,
    cases: Array,
    settings: EvaluateSettings,
    result: EvaluationResult,
) -> None:
    """Adds accuracy of the fused query and every control, for all, closed and open questions, and examples."""
    pool = AnswerPool.of(store, question_rows(store))
    answers = _embed_answers(encoder, store, pool, settings.batch_size)
    absent = np.full(len(pool.images), ABSENT)
    images, other = np.unique(pool.images, return_inverse=True)
    shuffled = images[deranged(len(images), settings.seed)][other.ravel()]
    queries = {
        "fused": (pool.images, pool.questions, False),
        "question_only": (absent, pool.questions, False),
        "image_only": (pool.images, absent, False),
        "blank_image": (pool.images, pool.questions, True),
        "shuffled_image": (shuffled, pool.questions, False),
    }
    clusters = cases[pool.images]
    rights, ranks, asked = {}, {}, {}
    for name, (image_rows, text_rows, blank) in queries.items():
        query = embed(encoder, store, image_rows, text_rows, settings.batch_size, blank=blank)
        ranks[name] = rank_answers(query, answers, pool.correct)
        rights[name] = ranks[name] == 1
        asked[name] = query
    for name, guesses in _majority_guesses(store, prepared, pool).items():
        rights[name] = np.array([pool.names[place] for place in pool.correct]) == np.array(guesses)
    for name, right in rights.items():
        _add_accuracy(name, right, pool, clusters, settings.seed, result)
    _add_each_question(rights, store.texts_of(pool.questions), clusters, settings.seed, result)
    _add_gains(rights, ranks, clusters, settings.seed, result)
    _add_summary(pool, result)
    drawn = np.sort(np.random.default_rng(settings.seed).permutation(len(pool.images))[: settings.examples])
    worst = np.argsort(-ranks["fused"], kind="stable")[: min(settings.examples, WORST)]
    result.answers, result.worst_answers = (
        _examples(store, pool, rows, asked["fused"], asked["shuffled_image"], answers, ranks["fused"], shuffled)
        for rows in (drawn, worst)
    )
    # Chance is a control too, so that the ratio is finite even if no other control is ever right.
    chance, controls = result.metrics["answers/chance"], [right for name, right in rights.items() if name != "fused"]
    best = max(chance, *(float(np.mean(right)) for right in controls))
    result.metrics["answers/fused/over_best_control"] = float(np.mean(rights["fused"])) / best
    result.intervals["answers/fused/over_best_control"] = ratio_interval(
        rights["fused"], controls, chance, settings.seed, clusters
    )


def quick_answers(encoder: SideEncoder, store: TokenStore, rows: Array, batch_size: int) -> dict[str, float]:
    """Accuracy of the fused query on the question pairs `rows`, for validation during training."""
    pool = AnswerPool.of(store, rows)
    query = embed(encoder, store, pool.images, pool.questions, batch_size)
    rank = rank_answers(query, _embed_answers(encoder, store, pool, batch_size), pool.correct)
    return {"answers/accuracy": float(np.mean(rank == 1))}


def _embed_answers(encoder: SideEncoder, store: TokenStore, pool: AnswerPool, batch_size: int) -> Array:
    return embed(encoder, store, np.full(len(pool.answers), ABSENT), pool.answers, batch_size)


def _add_accuracy(
    name: str, right: Array, pool: AnswerPool, clusters: Array, seed: int, result: EvaluationResult
) -> None:
    chosen = {"accuracy": np.ones(len(right), bool), "accuracy_closed": pool.types == CLOSED}
    chosen["accuracy_open"] = pool.types == OPEN
    for part, rows in chosen.items():
        if rows.any():
            result.add_share(f"answers/{name}/{part}", right[rows], clusters[rows], seed)


def _add_each_question(
    rights: Mapping[str, Array], asked: Sequence[str], clusters: Array, seed: int, result: EvaluationResult
) -> None:
    """Adds accuracy by question, if the split repeats a small number of questions."""
    names = np.array(["-".join(re.findall(r"\w+", text.lower())) for text in asked])
    different = np.unique(names)
    if len(different) > MOST_QUESTIONS or len(names) < 2 * len(different):
        return
    for question in different:
        rows = names == question
        for name, right in rights.items():
            result.add_share(f"answers/{name}/accuracy/{question}", right[rows], clusters[rows], seed)


def _add_gains(
    rights: Mapping[str, Array], ranks: Mapping[str, Array], clusters: Array, seed: int, result: EvaluationResult
) -> None:
    """Adds the paired difference between the fused query and each control, and mean reciprocal ranks.

    Reciprocal ranks also show answers that move up without becoming first.
    """
    gains = {name: f"answers/gain/{name}/accuracy" for name in rights if name != "fused"}
    for name, metric in gains.items():
        result.add_gain(metric, rights["fused"], rights[name], clusters, seed)
    result.metrics["answers/gain/smallest"] = min(result.metrics[metric] for metric in gains.values())
    # Better than the strongest control means better than each, so the smallest lower bound counts.
    bounds = [result.intervals[metric] for metric in gains.values()]
    result.intervals["answers/gain/smallest"] = min(low for low, _ in bounds), min(high for _, high in bounds)
    for name, rank in ranks.items():
        result.metrics[f"answers/{name}/mean_reciprocal_rank"] = float(np.mean(1 / rank))
        if name != "fused":
            metric = f"answers/gain/{name}/mean_reciprocal_rank"
            result.add_gain(metric, 1 / ranks["fused"], 1 / rank, clusters, seed)


def _add_summary(pool: AnswerPool, result: EvaluationResult) -> None:
    metrics = result.metrics
    metrics["answers/pool"] = float(len(pool.names))
    metrics["answers/questions"] = float(len(pool.correct))
    metrics["answers/questions_closed"] = float(np.sum(pool.types == CLOSED))
    metrics["answers/questions_open"] = float(np.sum(pool.types == OPEN))
    metrics["answers/chance"] = 1.0 / len(pool.names)


def _majority_guesses(store: TokenStore, prepared: PreparedData, pool: AnswerPool) -> dict[str, list[str]]:
    """The most frequent training answer to questions of the same type, and to the same question if training has it."""
    if "train" not in prepared.splits:
        return {}
    table = prepared.pairs("train")
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    columns = [table.column(name).to_pylist() for name in ("kind", "query_text", "target_text", "answer_type")]
    for kind, question, answer, answer_type in zip(*columns, strict=True):
        if kind == QUESTION:
            for key in (answer_type or "", "any"):
                by_type[key][answer_key(answer)] += 1
            by_question[answer_key(question)][answer_key(answer)] += 1
    if not by_type:
        return {}
    types = [ANSWER_TYPES[code] for code in pool.types]
    plain = [_most_frequent(by_type.get(name) or by_type["any"]) for name in types]
    questions = [answer_key(text) for text in store.texts_of(pool.questions)]
    seen = [
        _most_frequent(by_question[question]) if question in by_question else guess
        for question, guess in zip(questions, plain, strict=True)
    ]
    return {"majority": plain, "majority_by_question": seen}


def _most_frequent(counts: Counter[str]) -> str:
    """The most frequent answer, and of equally frequent ones the alphabetically first."""
    return min(counts, key=lambda answer: (-counts[answer], answer))


def _examples(
    store: TokenStore,
    pool: AnswerPool,
    rows: Array,
    query: Array,
    swapped: Array,
    answers: Array,
    rank: Array,
    others: Array,
) -> list[AnswerExample]:
    """Examples of the questions `rows`: top candidates, the right one, and the answer given another image."""
    if not len(rows):
        return []
    order, scores = top(query[rows], answers, len(answers))
    instead, _ = top(swapped[rows], answers, 1)
    questions: Sequence[str] = store.texts_of(pool.questions[rows])
    examples = []
    for place, row in enumerate(rows):
        correct = int(pool.correct[row])
        first = list(range(min(SHOWN, len(answers))))
        at = int(np.argmax(order[place] == correct))
        candidates = tuple(
            Candidate(
                pool.names[order[place, p]], float(scores[place, p]), p == at, int(rank[row]) if p == at else p + 1
            )
            for p in (first if at in first else [*first, at])
        )
        kind = ANSWER_TYPES[pool.types[row]]
        image, answer = int(pool.images[row]), pool.names[correct]
        other, seen = int(others[row]), pool.names[instead[place, 0]]
        examples.append(AnswerExample(image, questions[place], answer, kind, int(rank[row]), candidates, other, seen))
    return examples
