"""A small way to write HTML in which every string is escaped unless it was made here."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import jinja2
from PIL import Image

VOID = frozenset({"img", "meta", "br"})
PICTURE_SIZE = 320  # pixels of the longer side

STYLE = """
:root { color-scheme: light; --ink: #1f2933; --soft: #52606d; --rule: #e1e6ea; --paper: #ffffff; --wash: #f5f7f8;
  --accent: #0b6e99; --good: #1d6b3f; --goodwash: #e8f4ec; --warn: #8a4b0f; --warnwash: #fdf1e3; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--wash); color: var(--ink); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
.wrap { max-width: 1080px; margin: 0 auto; padding: 0 20px; }
header { background: var(--paper); border-bottom: 1px solid var(--rule); padding: 32px 0 20px; }
h1 { margin: 0 0 6px; font-size: 1.75rem; line-height: 1.25; letter-spacing: -0.01em; }
h2 { margin: 0 0 4px; font-size: 1.25rem; line-height: 1.3; }
h3 { margin: 24px 0 8px; font-size: 1rem; }
p { margin: 0 0 12px; max-width: 72ch; }
.soft { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin-top: 14px; font-size: 0.9375rem; }
a { color: var(--accent); }
section { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; padding: 24px; margin: 20px 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(230px, 1fr)); gap: 16px; margin: 20px 0; }
.tile { background: var(--paper); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px; }
.tile .name { font-weight: 600; }
.tile .value { font-size: 2.25rem; font-weight: 650; line-height: 1.2; letter-spacing: -0.02em; }
.tile .value small { font-size: 0.9375rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
.tile ul { list-style: none; margin: 8px 0 12px; padding: 0; font-size: 0.9375rem; color: var(--soft); }
.verdict { display: inline-block; border-radius: 99px; padding: 2px 12px; font-size: 0.875rem; font-weight: 600; }
.verdict.good { background: var(--goodwash); color: var(--good); }
.verdict.warn { background: var(--warnwash); color: var(--warn); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.9375rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 7px 10px; border-bottom: 1px solid var(--rule); vertical-align: baseline; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--rule); }
tbody th { font-weight: 500; }
table.facts { width: auto; }
tr.main th, tr.main td { font-weight: 650; }
td small { color: var(--soft); white-space: nowrap; font-weight: 400; }
.chart { display: block; width: 100%; max-width: 960px; height: auto; margin: 16px 0; }
.examples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 460px), 1fr)); gap: 16px;
  margin-top: 16px; }
.example { display: grid; grid-template-columns: 150px 1fr; gap: 16px; border: 1px solid var(--rule);
  border-radius: 8px; padding: 14px; align-items: start; }
.example figure { margin: 0; }
.example img { width: 150px; max-height: 220px; object-fit: contain; background: #000; border-radius: 4px;
  display: block; }
.example figcaption { font-size: 0.75rem; line-height: 1.35; color: var(--soft); margin-top: 6px;
  overflow-wrap: anywhere; }
.example p { margin: 0 0 8px; overflow-wrap: anywhere; }
.example ol { margin: 0; padding: 0; list-style: none; font-size: 0.9375rem; }
.example li { display: grid; grid-template-columns: 1.4em 1fr auto; gap: 6px; padding: 4px 6px; border-radius: 4px;
  border-top: 1px solid var(--rule); }
.example li.right { background: var(--goodwash); color: var(--good); font-weight: 600; }
.example li span { overflow-wrap: anywhere; }
.example li .score { color: var(--soft); font-weight: 400; font-variant-numeric: tabular-nums; }
.clip { display: -webkit-box; -webkit-line-clamp: 4; -webkit-box-orient: vertical; overflow: hidden; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 8px 32px; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--accent); }
pre { overflow-x: auto; background: var(--wash); border-radius: 6px; padding: 14px; font-size: 0.8125rem; }
footer { color: var(--soft); font-size: 0.875rem; padding: 8px 0 40px; }
@media (max-width: 520px) { .chart { width: 680px; max-width: none; }
  section { padding: 18px 16px; } .wrap { padding: 0 12px; }
  .example { grid-template-columns: 1fr; } .example img { width: 100%; max-height: 320px; } h1 { font-size: 1.4rem; } }
@media print { body { background: #fff; } section, .tile { break-inside: avoid; } nav { display: none; } }
"""


def render(template: Path, **values: object) -> str:
    """The Jinja template with `values`, escaped. It may include files of its folder; a missing value fails."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(values)


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """An element; plain strings among children and attributes are escaped. `klass` writes the class attribute."""
    pairs = ((key.replace("klass", "class").replace("_", "-"), value) for key, value in attributes.items())
    opening = "".join(f' {key}="{html.escape(value, quote=True)}"' for key, value in pairs)
    if name in VOID:
        return Html(f"<{name}{opening}>")
    return Html(f"<{name}{opening}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """The children one after the other, escaped unless they are HTML."""
    return Html("".join(child if isinstance(child, Html) else html.escape(child) for child in children))


def document(title: str, body: Html) -> Html:
    """A whole page that needs no other file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    return Html("<!doctype html>\n" + tag("html", head, tag("body", body), lang="en") + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], main: Sequence[int] = ()) -> Html:
    """A table whose first column names the rows; rows numbered in `main` stand out. It scrolls where space is short."""
    lines = []
    for number, row in enumerate(rows):
        line = _row(row)
        lines.append(tag("tr", line, klass="main") if number in main else tag("tr", line))
    top = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    return tag("div", tag("table", top, tag("tbody", *lines)), klass="scroll", tabindex="0")


def facts(rows: Iterable[Sequence[str]]) -> Html:
    """A narrow table of names and values."""
    return tag("table", tag("tbody", *(tag("tr", _row(row)) for row in rows)), klass="facts")


def _row(cells: Sequence[str]) -> Html:
    return join([tag("th", cells[0], scope="row"), *(tag("td", cell) for cell in cells[1:])])


def section(identifier: str, title: str, *children: str) -> Html:
    """A part of the page that the navigation can lead to."""
    return tag("section", tag("h2", title), *children, id=identifier)


def chart(path: Path, alt: str) -> Html:
    """A PNG file, embedded; on narrow screens it scrolls sideways rather than becoming unreadable."""
    return tag(
        "div", tag("img", src=data_uri(path.read_bytes(), "png"), alt=alt, klass="chart"), klass="scroll", tabindex="0"
    )


def picture(image: Image.Image, alt: str) -> Html:
    """An image in small, embedded."""
    small = image.convert("L" if image.mode in ("L", "1", "LA") else "RGB")
    small.thumbnail((PICTURE_SIZE, PICTURE_SIZE))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=88)
    return tag("img", src=data_uri(stream.getvalue(), "jpeg"), alt=alt, loading="lazy")


def data_uri(data: bytes, kind: str) -> str:
    """An image file of `kind` (png, jpeg, ...) as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
