"""Concept detection (UMLS codes, as in ROCOv2): zero-shot, and with frozen embeddings.

Zero-shot, the names of all concepts are ranked by similarity to the image. A linear probe and nearest neighbours learn
from the embeddings of training images; they are scored like ImageCLEFmedical's concept detection. Controls: always
predicting the most frequent concepts, and the zero-shot ranking of another image.

Legend: N images, M training images, C concepts, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import ABSENT, TokenStore
from fuselip_core.evaluation.candidates import SideEmbedder
from fuselip_core.evaluation.embed import SideEncoder, embed
from fuselip_core.evaluation.metrics import TIE, Array, deranged
from fuselip_core.evaluation.result import Concept, EvaluationResult

PREFIX = "concepts"
PENALTIES = (1.0, 10.0, 100.0)  # L2, of the probe; chosen on held-out training cases
NEIGHBOURS = 20
HELD_OUT = 0.25  # share of the training cases for choosing threshold and penalty
THRESHOLDS = 100
# Number of random training images for probe and neighbours: per evaluated image, and bounds.
TRAINING_PER_IMAGE, FEWEST_TRAINING, MOST_TRAINING = 5, 2_000, 20_000
LEARNED = ("probe", "neighbours")


@dataclass(frozen=True)
class Labels:
    """right (N, C) bool of the concepts `codes` (C); counts (N): all concepts of an image; cases (N) of str."""

    codes: tuple[str, ...]
    right: Array
    counts: Array
    cases: Array

    @classmethod
    def of(cls, prepared: PreparedData, split: str, codes: tuple[str, ...] | None = None) -> Labels:
        """Labels of a split's images for the concepts `codes`, or for all concepts of the split."""
        names: list[set[str]] = []
        cases: list[str] = []
        for batch in prepared.iter_images(split, columns=["image_id", "case", "concepts"], batch_rows=4096):
            for row in batch.to_pylist():
                names.append(set(row["concepts"] or ()))
                cases.append(row["case"] or f"image {row['image_id']}")
        codes = codes or tuple(sorted(set().union(*names)))
        place = {code: number for number, code in enumerate(codes)}
        right = np.zeros((len(names), len(codes)), bool)
        for number, found in enumerate(names):
            right[number, [place[code] for code in found if code in place]] = True
        return cls(codes, right, np.array([len(found) for found in names]), np.array(cases))

    def part(self, rows: Array) -> Labels:
        """The images `rows`."""
        return Labels(self.codes, self.right[rows], self.counts[rows], self.cases[rows])


def has_concepts(prepared: PreparedData, split: str) -> bool:
    """Whether any image of a split has concepts."""
    batches = prepared.iter_images(split, columns=["concepts"], batch_rows=4096)
    return any(any(batch.column("concepts").to_pylist()) for batch in batches)


def measure_concepts(
    embedder: SideEmbedder,
    own: tuple[SideEncoder, TokenStore],
    training: tuple[SideEncoder, TokenStore] | None,
    prepared: PreparedData,
    settings: EvaluateSettings,
    result: EvaluationResult,
) -> None:
    """Adds F1, average precision and AUC for the images of `own`; does nothing if they have no concepts.

    `embedder` embeds concept names. Without `training` there is neither probe nor neighbours. Images without concepts
    are left out.
    """
    if not has_concepts(prepared, result.split):
        return
    known = Labels.of(prepared, "train") if training else Labels.of(prepared, result.split)
    truth = Labels.of(prepared, result.split, known.codes)
    rows = np.flatnonzero(truth.counts)
    truth, image = truth.part(rows), _images(own, rows, settings)
    result.metrics |= {f"{PREFIX}/images": float(len(rows)), f"{PREFIX}/candidates": float(len(known.codes))}
    scores: dict[str, Array] = {}
    names: Mapping[str, str] = prepared.manifest.get("concept_names", {})
    if names:
        scores["zero_shot"] = _measure_names(embedder, image, truth, names, settings, result)
    if training:
        most = min(MOST_TRAINING, max(FEWEST_TRAINING, TRAINING_PER_IMAGE * len(rows)))
        chosen = np.random.default_rng(settings.seed).permutation(np.flatnonzero(known.counts))[:most]
        chosen.sort()
        known = known.part(chosen)
        result.metrics[f"{PREFIX}/training_images"] = float(len(chosen))
        scores |= _measure_learned(_images(training, chosen, settings), known, image, truth, settings, result)
    areas = {name: auc(truth.right, score) for name, score in scores.items()}
    for name, each in areas.items():
        if not np.isnan(each).all():
            result.metrics[f"{PREFIX}/{name}/auc"] = float(np.nanmean(each))
    result.concepts = [
        Concept(
            code,
            names.get(code, code),
            int(truth.right[:, place].sum()),
            int(known.right[:, place].sum()) if training else None,
            {name: float(each[place]) for name, each in areas.items() if not np.isnan(each[place])},
        )
        for place, code in enumerate(known.codes)
        if truth.right[:, place].any()
    ]
    result.concepts.sort(key=lambda concept: (-concept.images, concept.code))


def _images(split: tuple[SideEncoder, TokenStore], rows: Array, settings: EvaluateSettings) -> Array:
    encoder, store = split
    return embed(encoder, store, rows, np.full(len(rows), ABSENT), settings.batch_size)


def _measure_names(
    embedder: SideEmbedder,
    image: Array,
    truth: Labels,
    names: Mapping[str, str],
    settings: EvaluateSettings,
    result: EvaluationResult,
) -> Array:
    """Similarities (N, C) of images and names; adds their average precision, and that of another image as control."""
    text = embedder.embed([None] * len(truth.codes), [names.get(code, code) for code in truth.codes], 64)
    scores: Array = image @ text.T
    other = scores[deranged(len(scores), settings.seed)]
    known = truth.right.any(axis=1)
    own, swapped = (average_precision(truth.right[known], each[known]) for each in (scores, other))
    for name, values in (("zero_shot", own), ("zero_shot_other_image", swapped)):
        result.add_share(f"{PREFIX}/{name}/average_precision", values, truth.cases[known], settings.seed)
    result.add_gain(f"{PREFIX}/gain/zero_shot/average_precision", own, swapped, truth.cases[known], settings.seed)
    return scores


def _measure_learned(
    train: Array, known: Labels, image: Array, truth: Labels, settings: EvaluateSettings, result: EvaluationResult
) -> dict[str, Array]:
    """Scores (N, C) of probe and neighbours, trained on embeddings (M, D); adds their F1 and the control's."""
    held = _held_out(known.cases, settings.seed)
    fit = ~held
    penalty = max(
        PENALTIES, key=lambda each: _choose(_probe(train[fit], known.right[fit], train[held], each), known, held)[1]
    )
    learned = {
        "probe": (
            _probe(train[fit], known.right[fit], train[held], penalty),
            _probe(train, known.right, image, penalty),
        ),
        "neighbours": (
            _neighbours(train[fit], known.right[fit], train[held]),
            _neighbours(train, known.right, image),
        ),
        "most_frequent": (
            np.tile(known.right[fit].mean(axis=0), (int(held.sum()), 1)),
            np.tile(known.right.mean(axis=0), (len(image), 1)),
        ),
    }
    reached = {}
    for name, (trial, scores) in learned.items():
        threshold, _ = _choose(trial, known, held)
        reached[name] = f1(named(scores, threshold), truth.right, truth.counts)
        result.add_share(f"{PREFIX}/{name}/f1", reached[name], truth.cases, settings.seed)
    for name in LEARNED:
        result.add_gain(f"{PREFIX}/gain/{name}/f1", reached[name], reached["most_frequent"], truth.cases, settings.seed)
    return {name: learned[name][1] for name in LEARNED}


def _held_out(cases: Array, seed: int) -> Array:
    """(M) bool: the images of a random quarter of the cases, or a quarter of the images if there is only one case."""
    owner = np.unique(cases, return_inverse=True)[1].ravel()
    if not owner.any():
        owner = np.arange(len(cases))
    drawn = np.random.default_rng(seed).permutation(owner.max() + 1)
    return np.isin(owner, drawn[: max(1, round(HELD_OUT * len(drawn)))])


def _probe(train: Array, right: Array, image: Array, penalty: float) -> Array:
    """Scores (N, C) of a ridge regression from standardised embeddings to all concepts."""
    spread = np.maximum(train.std(axis=0), 1e-6)
    model = Ridge(alpha=penalty).fit((train - train.mean(axis=0)) / spread, right.astype(np.float32))
    predicted: Array = model.predict((image - train.mean(axis=0)) / spread)
    return predicted.reshape(len(image), right.shape[1])


def _neighbours(train: Array, right: Array, image: Array) -> Array:
    """Share (N, C) of the nearest training images that have each concept."""
    search = NearestNeighbors(n_neighbors=min(NEIGHBOURS, len(train)), metric="cosine", algorithm="brute").fit(train)
    shares: Array = right[search.kneighbors(image, return_distance=False)].mean(axis=1)
    return shares


def _choose(scores: Array, known: Labels, held: Array) -> tuple[float, float]:
    """The threshold with the best F1 on the held-out training images, and that F1."""
    tried = np.unique(np.quantile(scores, np.linspace(0, 1, THRESHOLDS)))
    right, counts = known.right[held], known.counts[held]
    reached = [float(np.mean(f1(named(scores, threshold), right, counts))) for threshold in tried]
    return float(tried[int(np.argmax(reached))]), max(reached)


def named(scores: Array, threshold: float) -> Array:
    """(N, C) bool: concepts at or above the threshold, and in any case the best one of each image."""
    chosen: Array = scores >= threshold
    chosen[np.arange(len(scores)), scores.argmax(axis=1)] = True
    return chosen


def f1(chosen: Array, right: Array, counts: Array) -> Array:
    """F1 (N) of the concepts `chosen` (N, C) against `right` (N, C); `counts` (N): all true concepts of each image.

    As in ImageCLEFmedical's concept detection: F1 by image, to be averaged over images. Concepts that do not occur in
    training count as missed.
    """
    hits = np.count_nonzero(chosen & right, axis=1)
    return 2 * hits / np.maximum(np.count_nonzero(chosen, axis=1) + counts, 1)


def average_precision(right: Array, scores: Array) -> Array:
    """Average precision (N) of the ranking of concepts for each image, ties wrong; every image has a concept."""
    found = np.empty(len(scores))
    for number, (score, is_right) in enumerate(zip(scores, right, strict=True)):
        own, wrong = np.sort(score[is_right]), np.sort(score[~is_right])
        own_above = len(own) - np.searchsorted(own, own, "left")
        wrong_above = len(wrong) - np.searchsorted(wrong, own - TIE, "left")
        found[number] = np.mean(own_above / (own_above + wrong_above))
    return found


def auc(right: Array, scores: Array) -> Array:
    """Area under the ROC curve (C) for each concept; NaN if all images have it or none."""
    found = np.full(right.shape[1], np.nan)
    share = right.mean(axis=0)
    usable = np.flatnonzero((share > 0) & (share < 1))
    if len(usable):
        found[usable] = roc_auc_score(right[:, usable], scores[:, usable], average=None)
    return found
