"""One self-contained page about a prepared data set, and a sheet of samples: what to look at before training on it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from fuselip_core.data.inspect.contact_sheet import data_uri, thumbnail, write_sheet
from fuselip_core.data.inspect.statistics import Statistics, bytes_of, draw_pairs, draw_questions, gather
from fuselip_core.data.pair import SPLITS
from fuselip_core.data.shards.reader import PreparedData
from fuselip_core.files import atomic_write
from fuselip_core.images import quiet_decoders

PAGE, SHEET = "index.html", "contact-sheet.png"
STYLE = Path(__file__).with_name("inspection.css")
ORIGIN = {"downloaded from": "source", "revision": "revision", "licence of the whole": "licence"}
QUARANTINE_SHOWN, SHARES_SHOWN, LETTERS_SHOWN = 8, 12, 220
CHART_WIDTH, CHART_HEIGHT, BARS = 300, 110, 30


def inspect_data(folder: Path, out: Path, samples: int = 12, seed: int = 0) -> dict[str, Any]:
    """Writes index.html and contact-sheet.png into `out` and returns the counts; raises DataError."""
    prepared = PreparedData(folder)
    with quiet_decoders():
        return _inspect(prepared, out, samples, seed)


def _inspect(prepared: PreparedData, out: Path, samples: int, seed: int) -> dict[str, Any]:
    found = gather(prepared)
    drawn = {
        split: draw_pairs(prepared, split, samples, seed) + draw_questions(prepared, split, samples, seed)
        for split in prepared.splits
    }
    pictures: dict[str, dict[str, bytes]] = {}
    for split, pairs in drawn.items():
        names = {pair[side] for pair in pairs for side in ("query_image", "target_image") if pair[side]}
        pictures[split] = bytes_of(prepared, split, names)
    shown = {split: (drawn[split], pictures[split]) for split in prepared.splits if drawn[split]}
    if shown:
        write_sheet(out / SHEET, shown)
    parts = [
        _header(prepared),
        _counts(prepared),
        _lengths(found),
        _shares("Modality", found.modalities),
        _shares("Licence", found.licences),
        _sizes(found),
        _set_aside(prepared),
        *(_samples(split, *parts) for split, parts in shown.items()),
    ]
    with atomic_write(out / PAGE) as partial:
        partial.write_text(_page(f"{prepared.manifest['source']} · prepared data", parts), encoding="utf-8")
    lengths = {"/".join(key): value.summary() for key, value in sorted(found.lengths.items())}
    modalities = {split: dict(counts.most_common()) for split, counts in found.modalities.items()}
    counts = {key: prepared.manifest[key] for key in ("counts", "quarantine", "duplicates")}
    return {**counts, "words": lengths, "modalities": modalities, "page": str(out / PAGE)}


def _page(title: str, parts: Iterable[str]) -> str:
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{style}</style></head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def _header(prepared: PreparedData) -> str:
    manifest = prepared.manifest
    notes = "".join(f"<li>{escape(note)}</li>" for note in manifest["notes"])
    size = sum((prepared.folder / shard["path"]).stat().st_size for shard in manifest["shards"])
    origin = manifest["origin"]
    came = " · ".join(f"{name} {origin[key]}" for name, key in ORIGIN.items() if origin.get(key))
    facts = (
        f"data version <code>{manifest['data_version'][:16]}</code> · {len(manifest['shards'])} shards, "
        f"{size / 1e6:,.1f} MB · tool {escape(manifest['tool_version'])} · root {escape(manifest['settings']['root'])}"
        + (f"<br>{escape(came)}" if came else "")
    )
    kinds = f"<ul class='notes'>{notes}</ul>" if notes else ""
    return f"<header><h1>{escape(manifest['source'])}</h1><p class='soft'>{facts}</p>{kinds}</header>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def cell(value: object) -> str:
        return (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:,.1f}"
            if isinstance(value, float)
            else escape(str(value))
        )

    body = "".join(f"<tr>{''.join(f'<td>{cell(value)}</td>' for value in row)}</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<div class='scroll'><table><thead><tr>{names}</tr></thead><tbody>{body}</tbody></table></div>"


def _counts(prepared: PreparedData) -> str:
    counts = prepared.manifest["counts"]
    kinds = sorted({kind for part in counts.values() for kind in part["pairs"]})
    tasks = sorted({task for part in counts.values() for task in part.get("candidates", ())})
    head = ["Split", "Images", "Cases", *(f"Pairs: {kind}" for kind in kinds)]
    rows = [
        [split, part["images"], part["cases"], *(part["pairs"].get(kind, 0) for kind in kinds)]
        for split, part in counts.items()
    ]
    text = _table(head, rows)
    if tasks:
        asked = [[task, *(part.get("candidates", {}).get(task, 0) for part in counts.values())] for task in tasks]
        text += f"<h3>Questions with candidates</h3>{_table(['Task', *counts], asked)}"
    duplicates = prepared.manifest["duplicates"]
    said = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in duplicates.items())
    return f"<section><h2>Counts</h2>{text}<p class='soft'>Images that are the same: {said}.</p></section>"


def _lengths(found: Statistics) -> str:
    if not found.lengths:
        return ""
    charts: list[str] = []
    rows: list[list[object]] = []
    shared = max(_most(lengths.counts) for lengths in found.lengths.values())
    for (split, kind, side), lengths in sorted(
        found.lengths.items(), key=lambda item: (item[0][1:], SPLITS.index(item[0][0]))
    ):
        name = f"{kind}: {side.removesuffix('_text')}"
        charts.append(_histogram(f"{name}, {split}", lengths.counts, shared, "words"))
        rows.append([name, split, *lengths.summary().values()])
    head = ("Texts", "Split", "Number", "Least", "Median", "Mean", "95 %", "Most")
    return f"<section><h2>Words a text</h2><div class='charts'>{''.join(charts)}</div>{_table(head, rows)}</section>"


def _most(counts: Counter[int]) -> int:
    """A bound that all but one in a hundred stay below."""
    values = np.repeat(*np.array(sorted(counts.items())).T)
    return max(1, int(np.quantile(values, 0.99)))


def _sizes(found: Statistics) -> str:
    shared = max(_most(counts) for counts in found.sizes.values())
    charts = [_histogram(f"longer side, {split}", counts, shared, "pixels") for split, counts in found.sizes.items()]
    for split, counts in found.shapes.items():
        tenths = Counter({round(10 * shape): count for shape, count in counts.items()})
        charts.append(_histogram(f"width / height, {split}", tenths, max(20, _most(tenths)), "", 10))
    return f"<section><h2>Sizes and shapes</h2><div class='charts'>{''.join(charts)}</div></section>"


def _histogram(title: str, counts: Counter[int], most: int, unit: str, divisor: int = 1) -> str:
    """An SVG of at most BARS bars from 0 to `most`; the last one holds all that is beyond."""
    width = max(1, -(-most // BARS))
    bars = Counter[int]()
    for value, count in counts.items():
        bars[min(value, most) // width] += count
    places = most // width + 1
    step, highest, total = CHART_WIDTH / places, max(bars.values()), counts.total()
    marks = []
    for place in sorted(bars):
        height = bars[place] / highest * CHART_HEIGHT
        low, high = place * width / divisor, ((place + 1) * width - 1) / divisor
        label = f"{low:g}" if low == high else f"{low:g} to {high:g}"
        label = f"{low:g} or more" if place == places - 1 else label
        marks.append(
            f"<rect x='{place * step:.1f}' y='{CHART_HEIGHT - height:.1f}' width='{max(1.0, step - 1):.1f}' "
            f"height='{height:.1f}'><title>{label} {unit}: {bars[place]:,} ({bars[place] / total:.1%})</title></rect>"
        )
    ends = f"<text x='0' y='{CHART_HEIGHT + 16}'>0</text>" + (
        f"<text x='{CHART_WIDTH}' y='{CHART_HEIGHT + 16}' text-anchor='end'>{most / divisor:g}+ {unit}</text>"
    )
    top = f"<text class='soft' x='{CHART_WIDTH}' y='-6' text-anchor='end'>tallest bar {highest / total:.1%}</text>"
    return (
        f"<figure><figcaption>{escape(title)} <span class='soft'>({total:,})</span></figcaption>"
        f"<svg viewBox='0 -20 {CHART_WIDTH} {CHART_HEIGHT + 40}' role='img' aria-label='{escape(title)}'>"
        f"{top}{''.join(marks)}<line x1='0' x2='{CHART_WIDTH}' y1='{CHART_HEIGHT}' y2='{CHART_HEIGHT}'/>{ends}"
        "</svg></figure>"
    )


def _shares(title: str, parts: Mapping[str, Counter[str]]) -> str:
    total = sum(parts.values(), Counter[str]())
    names = [name for name, _ in total.most_common(SHARES_SHOWN)]
    head = "".join(f"<th>{escape(split)}</th>" for split in parts)
    rows = []
    for name in names:
        cells = []
        for counts in parts.values():
            share = counts[name] / max(1, counts.total())
            bar = f"<i style='width:{share:.1%}'></i>"
            cells.append(f"<td class='bar'>{bar}<span>{counts[name]:,} <small>{share:.1%}</small></span></td>")
        rows.append(f"<tr><td>{escape(name)}</td>{''.join(cells)}</tr>")
    table = f"<table class='shares'><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    rest = len(total) - len(names)
    more = f"<p class='soft'>And {rest:,} more.</p>" if rest else ""
    return f"<section><h2>{escape(title)}</h2><div class='scroll'>{table}</div>{more}</section>"


def _set_aside(prepared: PreparedData) -> str:
    reasons = prepared.manifest["quarantine"]
    if not reasons:
        return "<section><h2>Set aside</h2><p>Nothing: every sample is used.</p></section>"
    examples: dict[str, list[str]] = {reason: [] for reason in reasons}
    with (prepared.folder / "quarantine.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            item = json.loads(line)
            if len(examples[item["reason"]]) < QUARANTINE_SHOWN:
                examples[item["reason"]].append(f"{item['id']} ({item['split']}) {item['detail']}".strip())
    rows = "".join(
        f"<tr><td>{escape(reason.replace('_', ' '))}</td><td>{count:,}</td>"
        f"<td class='text'>{_folded([escape(example) for example in examples[reason]])}</td></tr>"
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1])
    )
    head = "<tr><th>Reason</th><th>Samples</th><th class='text'>Examples</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f"<section><h2>Set aside</h2><div class='scroll'>{table}</div></section>"


def _folded(lines: Sequence[str]) -> str:
    """The first line, and the others folded away behind it."""
    first, *rest = lines
    return f"<details><summary>{first}</summary>{'<br>'.join(rest)}</details>" if rest else first


def _samples(split: str, pairs: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> str:
    cards = "".join(_card(pair, pictures) for pair in islice(pairs, 200))
    return f"<section><h2>Samples of {escape(split)}</h2><div class='cards'>{cards}</div></section>"


def _text(text: str) -> str:
    """A text whole, its end folded away where it is long."""
    if len(text) <= LETTERS_SHOWN + 40:
        return f"<p>{escape(text)}</p>" if text else ""
    cut = text.rfind(" ", 0, LETTERS_SHOWN)
    cut = cut if cut > LETTERS_SHOWN // 2 else LETTERS_SHOWN
    begin, rest = escape(text[:cut]), escape(text[cut:].strip())
    return f"<details><summary>{begin} …</summary><p>{rest}</p></details>"


def _card(pair: Mapping[str, Any], pictures: Mapping[str, bytes]) -> str:
    sides = []
    for side in ("query", "target"):
        small = thumbnail(pictures.get(pair[f"{side}_image"] or ""), 280)
        name = escape(pair[f"{side}_image"] or "", quote=True)
        picture = f"<img src='{data_uri(small)}' alt='{name}' title='{name}'>" if small else ""
        sides.append(f"<div class='{side}'>{picture}{_text(pair[f'{side}_text'] or '')}</div>")
    return (
        f"<article><h4>{escape(pair['kind'])} <small>{escape(pair['pair_id'])}</small></h4>{''.join(sides)}</article>"
    )
