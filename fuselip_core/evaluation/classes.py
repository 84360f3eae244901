"""Zero-shot classification: which of the captions in `evaluate.classes`, one a class, is nearest to an image?

An image belongs to a class if it has that class's concept; images with none of the concepts, or several, are left out.
Controls: always predicting the class most frequent in training, and classifying another image instead.

Legend: N images, C classes, D width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.tokens.store import ABSENT, TokenStore
from fuselip_core.errors import FuselipError
from fuselip_core.evaluation.candidates import SideEmbedder
from fuselip_core.evaluation.embed import SideEncoder, embed
from fuselip_core.evaluation.metrics import Array, deranged, rank_answers
from fuselip_core.evaluation.result import EvaluationResult

PREFIX = "classes"


def measure_classes(
    embedder: SideEmbedder,
    encoder: SideEncoder,
    store: TokenStore,
    prepared: PreparedData,
    settings: EvaluateSettings,
    result: EvaluationResult,
) -> None:
    """Adds accuracy and controls for the images of the split `store`; does nothing without `evaluate.classes`.

    Raises FuselipError unless at least two images belong to exactly one class.
    """
    if not settings.classes:
        return
    codes, captions = list(settings.classes), list(settings.classes.values())
    classes, cases = _classes_of(prepared, store.split, codes)
    rows = np.flatnonzero(classes >= 0)
    if len(rows) < 2:
        raise FuselipError(
            f"{len(rows)} images of split '{store.split}' have exactly one of the concepts {', '.join(codes)}; "
            "name concepts of this data set in evaluate.classes, or leave it empty"
        )
    right, clusters = classes[rows], np.unique(cases[rows], return_inverse=True)[1].ravel()
    image = embed(encoder, store, rows, np.full(len(rows), ABSENT), settings.batch_size)
    text = embedder.embed([None] * len(captions), captions, settings.batch_size)
    hits = {
        "zero_shot": rank_answers(image, text, right) == 1,
        "other_image": rank_answers(image[deranged(len(image), settings.seed)], text, right) == 1,
        "most_frequent": right == _most_frequent(prepared, codes, right),
    }
    for name, hit in hits.items():
        result.add_share(f"{PREFIX}/{name}/accuracy", hit, clusters, settings.seed)
        if name != "zero_shot":
            result.add_gain(f"{PREFIX}/gain/{name}/accuracy", hits["zero_shot"], hit, clusters, settings.seed)
    by_class = [float(hits["zero_shot"][right == each].mean()) for each in np.unique(right)]
    result.metrics |= {
        f"{PREFIX}/zero_shot/balanced_accuracy": float(np.mean(by_class)),
        f"{PREFIX}/chance": 1 / len(codes),
        f"{PREFIX}/images": float(len(rows)),
    }


def _classes_of(prepared: PreparedData, split: str, codes: Sequence[str]) -> tuple[Array, Array]:
    """Index in `codes` of each image's class (N) int64, or -1 unless it has exactly one; and its case (N) of str."""
    classes, cases = [], []
    for batch in prepared.iter_images(split, columns=["image_id", "case", "concepts"], batch_rows=4096):
        for row in batch.to_pylist():
            found = [place for place, code in enumerate(codes) if code in (row["concepts"] or ())]
            classes.append(found[0] if len(found) == 1 else -1)
            cases.append(row["case"] or f"image {row['image_id']}")
    return np.array(classes, np.int64), np.array(cases)


def _most_frequent(prepared: PreparedData, codes: Sequence[str], right: Array) -> int:
    """The most frequent class in training or, without training data, in the evaluated images (harder to beat)."""
    known = _classes_of(prepared, "train", codes)[0] if "train" in prepared.splits else right[:0]
    counts = Counter((known[known >= 0] if (known >= 0).any() else right).tolist())
    return min(counts, key=lambda place: (-counts[place], place))
