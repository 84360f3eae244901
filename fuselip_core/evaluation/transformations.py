"""Transformation retrieval on the run's own images: finding the variant of an image that an instruction describes.

The query is a held-out image with an instruction ("rotate 30 degrees clockwise"). The options are variants of that
image by one family of transformations, so that the answer depends on image and instruction together. As published
(arXiv 2506.03096, TGIT), but on the images of this run. A tie is wrong.

Legend: N images, V variants of an image, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from fuselip_core.config import EvaluateSettings
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.data.transforms import FAMILIES, Pixels, edited_pixels
from fuselip_core.evaluation.candidates import SideEmbedder
from fuselip_core.evaluation.metrics import Array, rank_answers
from fuselip_core.evaluation.result import EvaluationResult
from fuselip_core.images import decode
from fuselip_core.progress import track

PREFIX = "transformations"
MOST_IMAGES = 64
SIDE = 256  # pixels; larger variants would only be slower
QUERIES = ("accuracy", "image_only", "text_only")  # image and instruction, and either alone


def measure_transformations(
    embedder: SideEmbedder, prepared: PreparedData, settings: EvaluateSettings, result: EvaluationResult
) -> None:
    """Adds accuracy, controls and chance for each family in `settings.transformations`, and their means.

    Uses at most MOST_IMAGES evenly spaced images of the split. Equal variants, such as grey ones of a grey picture,
    are one option.
    """
    families = settings.transformations
    if not families:
        return
    right: dict[str, list[Array]] = {f"{family}/{query}": [] for family in families for query in QUERIES}
    owners: dict[str, list[int]] = {family: [] for family in families}
    chances: dict[str, list[float]] = {family: [] for family in families}
    pictures = _pictures(prepared, result.split)
    for number, picture in enumerate(track(pictures, "transformation retrieval")):
        for family in families:
            rng = np.random.default_rng([settings.seed, number])
            hits, count = _ask(embedder, picture, family, rng, settings.batch_size)
            for query, found in hits.items():
                right[f"{family}/{query}"].append(found)
            owners[family] += [number] * len(hits["accuracy"])
            chances[family] += [1 / count] * len(hits["accuracy"])
    for family in families:
        for query in QUERIES:
            hit = np.concatenate(right[f"{family}/{query}"])
            result.add_share(f"{PREFIX}/{family}/{query}", hit, np.array(owners[family]), settings.seed)
        result.metrics[f"{PREFIX}/{family}/chance"] = float(np.mean(chances[family]))
    for what in (*QUERIES, "chance"):
        values = [result.metrics[f"{PREFIX}/{family}/{what}"] for family in families]
        result.metrics[f"{PREFIX}/mean_{what}"] = float(np.mean(values))


def _pictures(prepared: PreparedData, split: str) -> list[Image.Image]:
    """Images of a split, resized to SIDE x SIDE."""
    count = prepared.image_count(split)
    chosen = set(np.linspace(0, count - 1, min(count, MOST_IMAGES)).astype(int).tolist())
    found, row = [], 0
    for batch in prepared.iter_images(split, columns=["bytes"]):
        for blob in batch.column("bytes").to_pylist():
            if row in chosen:
                picture = decode(blob).convert("RGB")
                found.append(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            row += 1
    return found


def _ask(
    embedder: SideEmbedder, picture: Image.Image, family: str, rng: np.random.Generator, batch_size: int
) -> tuple[dict[str, Array], int]:
    """Hits (Q) bool of each kind of query over the variants of one image, and the number of options."""
    drawn = edited_pixels(np.array(picture), rng, family, FAMILIES[family].evaluation)
    sources, of_query = _distinct([edit.query for edit in drawn])
    variants, correct = _distinct([edit.target for edit in drawn])
    texts = [edit.instruction for edit in drawn]
    nothing: Sequence[None] = [None] * len(drawn)
    targets = embedder.embed(variants, [None] * len(variants), batch_size)
    queries = {
        "accuracy": embedder.embed([sources[number] for number in of_query], texts, batch_size),
        "image_only": embedder.embed(sources, [None] * len(sources), batch_size)[of_query],
        "text_only": embedder.embed(nothing, texts, batch_size),
    }
    return {name: rank_answers(query, targets, correct) == 1 for name, query in queries.items()}, len(variants)


def _distinct(images: Sequence[Pixels]) -> tuple[list[Image.Image], Array]:
    """The distinct pictures among `images` (uint8 (H, W, 3)), and the index of each image among them."""
    found: dict[bytes, int] = {}
    numbers = np.array([found.setdefault(image.tobytes(), len(found)) for image in images])
    _, first = np.unique(numbers, return_index=True)
    return [Image.fromarray(images[place]) for place in first], numbers
