"""Retrieval between images and captions, over the whole pool of a split.

Legend: I distinct images, C captions (one for each pair; equal captions stay in the pool, and all are right), D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.tokens.store import ABSENT, TokenStore
from fuselip_core.evaluation.embed import SideEncoder, embed
from fuselip_core.evaluation.metrics import Array, Relevance, chance, deranged, ranks, recall, recall_in_pools, top
from fuselip_core.evaluation.result import Candidate, EvaluationResult, RetrievalExample

CAPTION = "caption"
KS = (1, 5, 10)
POOLS = (10, 50, 200, 2000)  # sizes reported in papers
SHOWN = 5
WORST = 4


@dataclass(frozen=True)
class CaptionPool:
    """images (I): image rows; texts (C): text rows; and the right candidates in either direction.

    A caption is right for an image if the model reads the same tokens as in one of the image's own captions.
    """

    images: Array
    texts: Array
    image_of_caption: Array
    captions_of_image: Relevance
    images_of_caption: Relevance

    @classmethod
    def of(cls, store: TokenStore, rows: Array, text_length: int | None = None) -> CaptionPool:
        """The pool of the caption pairs `rows` for a model that reads `text_length` tokens of a text (None: all)."""
        images, image_of = np.unique(store.pairs.query_image[rows], return_inverse=True)
        texts = store.pairs.target_text[rows]
        reading = readings(store, texts, text_length)
        edges = np.unique(np.stack([image_of, reading], axis=1), axis=0)
        captions = Relevance.from_groups(edges[:, 1], reading)
        owners = Relevance.from_groups(reading, edges[:, 1])
        return cls(
            images,
            texts,
            image_of,
            Relevance.from_edges(np.repeat(edges[:, 0], captions.counts), captions.items, len(images), len(texts)),
            Relevance.from_edges(
                np.repeat(np.arange(len(texts)), owners.counts), edges[owners.items, 0], len(texts), len(images)
            ),
        )


def readings(store: TokenStore, texts: Array, text_length: int | None) -> Array:
    """Text rows (N) → numbers (N) int64 that are equal if the first `text_length` token ids are."""
    rows, place = np.unique(texts, return_inverse=True)
    known: dict[bytes, int] = {}
    numbers = [
        known.setdefault(
            store.texts[store.text_offsets[row] : store.text_offsets[row + 1]][:text_length].tobytes(), len(known)
        )
        for row in rows
    ]
    return np.array(numbers, np.int64)[place.ravel()]


def caption_rows(store: TokenStore) -> Array:
    """Pairs of an image → a text."""
    if CAPTION not in store.kinds:
        return np.zeros(0, np.int64)
    pairs = store.pairs
    plain = (pairs.query_image >= 0) & (pairs.query_text == ABSENT) & (pairs.target_text >= 0)
    return np.flatnonzero((pairs.kind == store.kinds.index(CAPTION)) & plain & (pairs.target_image == ABSENT))


def measure_retrieval(
    encoder: SideEncoder, store: TokenStore, cases: Array, settings: EvaluateSettings, result: EvaluationResult
) -> None:
    """Adds recall both ways, chance, shuffled pairs and examples; cases (images) int: clusters for intervals."""
    pool = CaptionPool.of(store, caption_rows(store), encoder.text_length)
    image, text = _embed_pool(encoder, store, pool, settings.batch_size)
    result.metrics["retrieval/pool"] = float(len(pool.texts))
    case_of_image = cases[pool.images]
    rank = _measure_direction(
        "image_to_text", image, text, pool.captions_of_image, case_of_image, settings.seed, result
    )
    # Images whose caption was set aside stay in the pool, as wrong candidates.
    bare = np.setdiff1d(np.arange(store.images), pool.images)
    if len(bare):
        image_pool = np.concatenate(
            [image, embed(encoder, store, bare, np.full(len(bare), ABSENT), settings.batch_size)]
        )
    else:
        image_pool = image
    result.metrics["retrieval/pool_images"] = float(len(image_pool))
    owners = replace(pool.images_of_caption, pool=len(image_pool))
    case_of_caption = case_of_image[pool.image_of_caption]
    back = _measure_direction("text_to_image", text, image_pool, owners, case_of_caption, settings.seed, result)
    rng, count = np.random.default_rng(settings.seed), settings.examples
    drawn = np.sort(rng.permutation(len(image))[:count])
    result.retrieval = [_caption_example(store, pool, image, text, row, rank) for row in drawn]
    worst = np.argsort(-rank, kind="stable")[: min(count, WORST)]
    result.worst = [_caption_example(store, pool, image, text, row, rank) for row in worst]
    rows = np.append(pool.images, bare)
    drawn = np.sort(rng.permutation(len(text))[: count // 2])
    result.captions = [_image_example(store, pool, text, image_pool, rows, row, back) for row in drawn]
    result.embeddings = (pool.images, image, text)


def quick_retrieval(encoder: SideEncoder, store: TokenStore, rows: Array, batch_size: int) -> dict[str, float]:
    """Recall at 1 in both directions over the caption pairs `rows`, for validation during training."""
    pool = CaptionPool.of(store, rows, encoder.text_length)
    image, text = _embed_pool(encoder, store, pool, batch_size)
    return {
        "retrieval/image_to_text/recall_at_1": recall(ranks(image, text, pool.captions_of_image), (1,))[1],
        "retrieval/text_to_image/recall_at_1": recall(ranks(text, image, pool.images_of_caption), (1,))[1],
    }


def _embed_pool(encoder: SideEncoder, store: TokenStore, pool: CaptionPool, batch_size: int) -> tuple[Array, Array]:
    image = embed(encoder, store, pool.images, np.full(len(pool.images), ABSENT), batch_size)
    text = embed(encoder, store, np.full(len(pool.texts), ABSENT), pool.texts, batch_size)
    return image, text


def _measure_direction(
    direction: str,
    query: Array,
    target: Array,
    relevance: Relevance,
    cases: Array,
    seed: int,
    result: EvaluationResult,
) -> Array:
    name = f"retrieval/{direction}"
    rank = ranks(query, target, relevance)
    for k in KS:
        result.add_share(f"{name}/recall_at_{k}", rank <= k, cases, seed)
        result.metrics[f"{name}/chance_at_{k}"] = chance(relevance, k)
    result.metrics[f"{name}/median_rank"] = float(np.median(rank))
    at_random = chance(relevance)
    result.metrics[f"{name}/over_chance"] = float(np.mean(rank == 1)) / at_random
    low, high = result.intervals[f"{name}/recall_at_1"]
    result.intervals[f"{name}/over_chance"] = low / at_random, high / at_random
    for pool in POOLS:
        for k in KS:
            if k < pool < relevance.pool:
                inside = recall_in_pools(rank, relevance, pool, k)
                result.add_share(f"retrieval_in_pools_of_{pool}/{direction}/recall_at_{k}", inside, cases, seed)
    # Control: each query gets the embedding of another one, which contains no information about its pair.
    shuffled = ranks(query[deranged(len(query), seed)], target, relevance)
    for k in KS:
        result.add_share(f"retrieval_shuffled/{direction}/recall_at_{k}", shuffled <= k, cases, seed)
        result.add_gain(f"{name}/gain/recall_at_{k}", rank <= k, shuffled <= k, cases, seed)
    result.metrics[f"retrieval_shuffled/{direction}/median_rank"] = float(np.median(shuffled))
    # Recall at 1 may rest on a few hits; reciprocal ranks use every query and so have less variance.
    result.metrics[f"{name}/mean_reciprocal_rank"] = float(np.mean(1 / rank))
    result.metrics[f"retrieval_shuffled/{direction}/mean_reciprocal_rank"] = float(np.mean(1 / shuffled))
    result.add_gain(f"{name}/gain/mean_reciprocal_rank", 1 / rank, 1 / shuffled, cases, seed)
    return rank


def _caption_example(
    store: TokenStore, pool: CaptionPool, image: Array, text: Array, query: int, rank: Array
) -> RetrievalExample:
    """An image with its first distinct captions, and the best right one if it comes later."""
    right = pool.captions_of_image.of(query)
    order, scores = top(image[query : query + 1], text, len(text))
    is_right = np.isin(order[0], right)
    places = [*range(min(SHOWN * 4, len(text))), int(np.argmax(is_right))]
    listed: dict[str, Candidate] = {}
    for place, string in zip(places, store.texts_of(pool.texts[order[0, places]]), strict=True):
        found = bool(is_right[place])
        listed.setdefault(
            string, Candidate(string, float(scores[0, place]), found, int(rank[query]) if found else place + 1)
        )
    shown = list(listed.values())
    best = shown[:SHOWN] + [each for each in shown[SHOWN:] if each.right][:1] * (
        not any(c.right for c in shown[:SHOWN])
    )
    own = dict.fromkeys(store.texts_of(pool.texts[pool.image_of_caption == query]))
    return RetrievalExample(int(pool.images[query]), tuple(own), int(rank[query]), tuple(best))


def _image_example(
    store: TokenStore, pool: CaptionPool, text: Array, image: Array, rows: Array, query: int, rank: Array
) -> RetrievalExample:
    """A caption with its first images, and the best right one if it comes later."""
    order, scores = top(text[query : query + 1], image, len(image))
    is_right = np.isin(order[0], pool.images_of_caption.of(query))
    first = list(range(min(SHOWN, len(image))))
    places = first if is_right[first].any() else [*first, int(np.argmax(is_right))]
    best = tuple(
        Candidate(
            "",
            float(scores[0, p]),
            bool(is_right[p]),
            int(rank[query]) if is_right[p] else p + 1,
            int(rows[order[0, p]]),
        )
        for p in places
    )
    return RetrievalExample(None, tuple(store.texts_of(pool.texts[[query]])), int(rank[query]), best)
