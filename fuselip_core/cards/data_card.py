"""The data card of prepared data, in the Hub's format: contents, origin, licences, and rows set aside."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fuselip_core.data.inspect.statistics import UNKNOWN, gather
from fuselip_core.data.shards.reader import PreparedData

TEMPLATE = Path(__file__).with_name("data_card.md.j2")
CREDITS_SHOWN = 20
HUB_LICENCE = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"), (1 << 62, "n>1M"))


def data_card(folder: Path) -> str:
    """Markdown with a metadata block; raises DataError if `folder` holds no prepared data."""
    from huggingface_hub import DatasetCard, DatasetCardData

    prepared = PreparedData(folder)
    manifest, found = prepared.manifest, gather(prepared)
    splits = list(prepared.splits)
    images = sum(manifest["counts"][split]["images"] for split in splits)
    licence, licence_name = licence_of(manifest)
    metadata = DatasetCardData(
        language="en",
        pretty_name=f"{manifest['source']}, prepared for fuselip-rocov2",
        size_categories=next(name for most, name in SIZES if images < most),
        tags=["medical", "radiology", "image-text"],
        license=licence,
        license_name=licence_name,
    )
    licences, credits = _licences(prepared, splits)
    card = DatasetCard.from_template(
        metadata,
        str(TEMPLATE),
        manifest=manifest,
        origin=origin_of(manifest),
        apart=manifest["settings"]["shared_images"] == "drop",
        counts=_counts(manifest["counts"]),
        modalities=_by_split(found.modalities, splits),
        splits=splits,
        licences=licences,
        credits=credits[:CREDITS_SHOWN],
        more_credits=max(0, len(credits) - CREDITS_SHOWN),
        lengths=[
            (
                split,
                kind,
                side.partition("_")[0],
                *(f"{lengths.summary()[part]:,.0f}" for part in ("median", "p95", "most")),
            )
            for (split, kind, side), lengths in found.lengths.items()
        ],
        aside=[(reason.replace("_", " "), f"{count:,}") for reason, count in manifest["quarantine"].items()],
        copies=[(where.replace("_", " "), f"{count:,}") for where, count in manifest["duplicates"].items() if count],
        notes=[cell(note) for note in manifest["notes"]],
    )
    return str(card)


def licence_of(manifest: Mapping[str, Any]) -> tuple[str, str | None]:
    """The licence that the raw data's host states; or "other" and its name if the Hub does not know it."""
    if manifest["source"] == "phantom":  # drawn by this project
        return "cc0-1.0", None
    stated = str(manifest["origin"].get("licence") or "")
    if HUB_LICENCE.fullmatch(stated.lower()):
        return stated.lower(), None
    return "other", stated or "as stated for each image"


def origin_of(manifest: Mapping[str, Any]) -> str:
    """Source and revision of the raw data, if their download recorded them."""
    source, revision = manifest["origin"].get("source"), manifest["origin"].get("revision")
    if not source:
        return "a folder without a record of its download"
    return f"`{source}`" + (f", revision `{revision}`" if revision else "")


def cell(value: Any) -> str:
    """A value as text for a cell of a Markdown table, escaped so that it cannot break the table or become HTML."""
    if isinstance(value, Mapping):  # a share with its interval, from the report
        value = " ".join(filter(None, (value["value"], value.get("interval"))))
    return re.sub(r"([|<\\])", r"\\\1", " ".join(str(value).split()))


def _counts(counts: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    kinds = sorted({kind for part in counts.values() for kind in part["pairs"]})
    head = ["Split", "Images", "Cases", *(f"{kind} pairs" for kind in kinds)]
    return head, [
        [
            split,
            *(
                f"{number:,}"
                for number in (part["images"], part["cases"], *(part["pairs"].get(kind, 0) for kind in kinds))
            ),
        ]
        for split, part in counts.items()
    ]


def _by_split(counts: Mapping[str, Counter[str]], splits: list[str]) -> list[list[str]]:
    """One row a name with its count in every split, most frequent first."""
    total = Counter[str]()
    for split in splits:
        total += counts[split]
    return [[cell(name), *(f"{counts[split][name]:,}" for split in splits)] for name, _ in total.most_common()]


def _licences(prepared: PreparedData, splits: list[str]) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Rows of licence, images and attributions, most frequent first; and the distinct attributions."""
    images, authors = Counter[str](), dict[str, set[str]]()
    for split in splits:
        for batch in prepared.iter_images(split, ["licence", "attribution"], 1 << 16):
            for row in batch.to_pylist():
                licence = row["licence"] or UNKNOWN
                images[licence] += 1
                authors.setdefault(licence, set()).update(filter(None, [row["attribution"]]))
    rows = [(cell(name), f"{count:,}", f"{len(authors[name]):,}") for name, count in images.most_common()]
    return rows, sorted({cell(name) for names in authors.values() for name in names})
