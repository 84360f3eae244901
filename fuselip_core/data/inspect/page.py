"""Inspection of a prepared data set: one self-contained HTML page and a contact sheet."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.data.inspect.contact_sheet import write_sheet
from fuselip_core.data.inspect.statistics import Statistics, bytes_of, draw_pairs, draw_questions, gather
from fuselip_core.data.pair import SPLITS
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.files import atomic_write
from fuselip_core.html import picture_uri, render
from fuselip_core.images import UnreadableImage, decode, quiet_decoders

PAGE, SHEET = "index.html", "contact-sheet.png"
TEMPLATE = Path(__file__).with_name("page.html.j2")
QUARANTINE_SHOWN, SHARES_SHOWN, LETTERS_SHOWN, PAIRS_SHOWN = 8, 12, 220, 200
CHART_WIDTH, CHART_HEIGHT, BARS = 300, 110, 30

Samples = Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, bytes]]]


def inspect_data(folder: Path, out: Path, samples: int = 12, seed: int = 0) -> dict[str, Any]:
    """Writes index.html and contact-sheet.png into `out` and returns the counts; raises DataError."""
    prepared = PreparedData(folder)
    with quiet_decoders():
        found, drawn = gather(prepared), _draw_samples(prepared, samples, seed)
        if drawn:
            write_sheet(out / SHEET, drawn)
        cards = [
            (split, [_card(pair, files) for pair in pairs[:PAIRS_SHOWN]]) for split, (pairs, files) in drawn.items()
        ]
    page = render(
        TEMPLATE,
        number=_number,
        percent=lambda share: f"{share:.1%}",
        width=CHART_WIDTH,
        height=CHART_HEIGHT,
        title=prepared.manifest["source"],
        facts=_facts(prepared),
        notes=prepared.manifest["notes"],
        counts=_counts(prepared),
        set_aside=_set_aside(prepared),
        lengths=_lengths(found),
        parts=[_shares("Modality", found.modalities), _shares("Licence", found.licences)],
        sizes=_sizes(found),
        samples=cards,
    )
    with atomic_write(out / PAGE) as partial:
        partial.write_text(page, encoding="utf-8")
    lengths = {"/".join(key): value.summary() for key, value in sorted(found.lengths.items())}
    modalities = {split: dict(counts.most_common()) for split, counts in found.modalities.items()}
    counts = {key: prepared.manifest[key] for key in ("counts", "quarantine", "duplicates")}
    return {**counts, "words": lengths, "modalities": modalities, "page": str(out / PAGE)}


def _draw_samples(prepared: PreparedData, count: int, seed: int) -> Samples:
    """Split → sample pairs and questions, and the files of their images by id."""
    samples = {}
    for split in prepared.splits:
        pairs = draw_pairs(prepared, split, count, seed) + draw_questions(prepared, split, count, seed)
        names = {pair[side] for pair in pairs for side in ("query_image", "target_image") if pair[side]}
        if pairs:
            samples[split] = pairs, bytes_of(prepared, split, names)
    return samples


def _number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}" if isinstance(value, float) else str(value)


def _facts(prepared: PreparedData) -> list[str]:
    manifest, origin = prepared.manifest, prepared.manifest["origin"]
    size = sum((prepared.folder / shard["path"]).stat().st_size for shard in manifest["shards"])
    facts = [
        f"data version {manifest['data_version'][:16]}",
        f"{len(manifest['shards'])} shards, {size / 1e6:,.1f} MB",
        f"tool {manifest['tool_version']}",
        f"root {manifest['settings']['root']}",
    ]
    named = {"downloaded from": "source", "revision": "revision", "licence of the whole": "licence"}
    return facts + [f"{name} {origin[key]}" for name, key in named.items() if origin.get(key)]


def _counts(prepared: PreparedData) -> dict[str, Any]:
    counts, duplicates = prepared.manifest["counts"], prepared.manifest["duplicates"]
    kinds = sorted({kind for part in counts.values() for kind in part["pairs"]})
    tasks = sorted({task for part in counts.values() for task in part.get("candidates", ())})
    said = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in duplicates.items() if count)
    return {
        "head": ["", *counts],
        "rows": [
            ["images", *(part["images"] for part in counts.values())],
            ["cases", *(part["cases"] for part in counts.values())],
            *([f"{kind} pairs", *(part["pairs"].get(kind, 0) for part in counts.values())] for kind in kinds),
        ],
        "task_head": ["Task", *counts],
        "tasks": [[task, *(part.get("candidates", {}).get(task, 0) for part in counts.values())] for task in tasks],
        "duplicates": f"Images that are the same: {said or 'none'}.",
    }


def _set_aside(prepared: PreparedData) -> list[tuple[str, int, str, list[str]]]:
    """Rows of reason, number, first example and further examples."""
    examples: dict[str, list[str]] = {reason: [] for reason in prepared.manifest["quarantine"]}
    with (prepared.folder / "quarantine.jsonl").open(encoding="utf-8") as stream:
        for item in map(json.loads, stream):
            if len(examples[item["reason"]]) < QUARANTINE_SHOWN:
                examples[item["reason"]].append(f"{item['id']} ({item['split']}) {item['detail']}".strip())
    ordered = sorted(prepared.manifest["quarantine"].items(), key=lambda item: -item[1])
    return [(reason.replace("_", " "), count, examples[reason][0], examples[reason][1:]) for reason, count in ordered]


def _lengths(found: Statistics) -> dict[str, Any] | None:
    if not found.lengths:
        return None
    shared: dict[tuple[str, str], int] = {}  # splits share the scale of a kind of text
    for (_, *text), lengths in found.lengths.items():
        shared[text[0], text[1]] = max(shared.get((text[0], text[1]), 0), _most(lengths.counts))
    charts, rows = [], []
    for (split, kind, side), lengths in sorted(
        found.lengths.items(), key=lambda item: (item[0][1:], SPLITS.index(item[0][0]))
    ):
        name = f"{kind}: {side.removesuffix('_text')}"
        charts.append(_histogram(f"{name}, {split}", lengths.counts, shared[kind, side], "words"))
        rows.append([name, split, *lengths.summary().values()])
    head = ("Texts", "Split", "Number", "Least", "Median", "Mean", "95 %", "Most")
    return {"charts": charts, "head": head, "rows": rows}


def _most(counts: Counter[int]) -> int:
    """The 99th percentile."""
    values = np.repeat(*np.array(sorted(counts.items())).T)
    return max(1, int(np.quantile(values, 0.99)))


def _sizes(found: Statistics) -> list[dict[str, Any]]:
    shared = max(_most(counts) for counts in found.sizes.values())
    charts = [_histogram(f"longer side, {split}", counts, shared, "pixels") for split, counts in found.sizes.items()]
    for split, counts in found.shapes.items():
        tenths = Counter({round(10 * shape): count for shape, count in counts.items()})
        charts.append(_histogram(f"width / height, {split}", tenths, max(20, _most(tenths)), "", 10))
    return charts


def _histogram(title: str, counts: Counter[int], most: int, unit: str, divisor: int = 1) -> dict[str, Any]:
    """At most BARS bars from 0 to `most`; the last one holds all larger values."""
    width = max(1, -(-most // BARS))
    binned = Counter[int]()
    for value, count in counts.items():
        binned[min(value, most) // width] += count
    places = most // width + 1
    step, highest, total = CHART_WIDTH / places, max(binned.values()), counts.total()
    bars = []
    for place in sorted(binned):
        low, high = place * width / divisor, ((place + 1) * width - 1) / divisor
        label = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        label = f"{low:g} or more" if place == places - 1 else label
        bars.append(
            {
                "left": place * step,
                "width": max(1.0, step - 1),
                "height": binned[place] / highest * CHART_HEIGHT,
                "title": f"{label} {unit}: {binned[place]:,} ({binned[place] / total:.1%})",
            }
        )
    end = f"{most / divisor:g}+ {unit}".strip()
    return {"title": title, "total": total, "highest": highest / total, "bars": bars, "end": end}


def _shares(title: str, parts: Mapping[str, Counter[str]]) -> dict[str, Any]:
    total = sum(parts.values(), Counter[str]())
    names = [name for name, _ in total.most_common(SHARES_SHOWN)]
    rows = [
        (name, [(counts[name], counts[name] / max(1, counts.total())) for counts in parts.values()]) for name in names
    ]
    return {"title": title, "splits": list(parts), "rows": rows, "more": len(total) - len(names)}


def _card(pair: Mapping[str, Any], files: Mapping[str, bytes]) -> dict[str, Any]:
    """Both sides of a pair: side, image id, thumbnail, and the text as beginning and rest."""
    sides = []
    for side in ("query", "target"):
        name, source = pair[f"{side}_image"] or "", ""
        with contextlib.suppress(UnreadableImage):
            source = picture_uri(decode(files.get(name, b"")))
        sides.append((side, name, source, _folded(pair[f"{side}_text"] or "")))
    return {"kind": pair["kind"], "name": pair["pair_id"], "sides": sides}


def _folded(text: str) -> tuple[str, str]:
    """The beginning of a text, and its rest if it is long."""
    if len(text) <= LETTERS_SHOWN + 40:
        return text, ""
    cut = text.rfind(" ", 0, LETTERS_SHOWN)
    cut = cut if cut > LETTERS_SHOWN // 2 else LETTERS_SHOWN
    return text[:cut], text[cut:].strip()
