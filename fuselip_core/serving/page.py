"""The search page: search by words, a picture or both, ask about a picture, see the archive as a map.

The query is part of the URL, so that it can be shared; an uploaded picture is not. Built with NiceGUI, which serves
all its files from this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fastapi import FastAPI
from nicegui import app as pages
from nicegui import events, ui
from nicegui.elements.mixins.text_element import TextElement
from starlette.requests import Request

from fuselip_core.html import data_uri, picture_uri
from fuselip_core.request_rules import read_picture
from fuselip_core.search.index import Hit
from fuselip_core.serving.api import thumbnail_of
from fuselip_core.serving.asked import FACETS, Asked
from fuselip_core.serving.engine import Engine
from fuselip_core.serving.guard import sentence_for

NOTICE = "Research software, not a medical device. Nothing is sent to anyone else."
MOST_OPTIONS = 500  # of a filter
HITS = 24
MAP_SECONDS = 600.0  # limit for computing it the first time
START = "Type words, drop a picture, or do both."
NOTHING = "Nothing found. Remove a filter, lower the minimum score, or use other words."
# Closes the filters on small screens, makes the back button repeat the previous search, and accepts a dropped file.
IN_BROWSER = """
if (innerWidth <= 800) document.querySelector('details.fl-filters').open = false;
addEventListener('popstate', () => location.reload());
addEventListener('dragover', event => event.preventDefault());
addEventListener('drop', event => {
  event.preventDefault();
  if (event.dataTransfer.files.length) getElement(%d).$refs.qRef.addFiles([event.dataTransfer.files[0]]);
});
"""
Result = TypeVar("Result")


def add_page(app: FastAPI, engine: Engine, compared: Engine | None = None) -> None:
    """Adds the page at / of `app`. Call it once in a process, since NiceGUI's pages are global.

    With `compared`, both models answer every search, and their hits are shown side by side.
    """
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")

    @ui.page("/", title="fuselip: search")
    async def page(request: Request) -> None:
        ui.add_css(style)
        shown = SearchPage(engine, compared, Asked.of_address(request.query_params), await engine.facets())
        shown.build()
        await ui.context.client.connected()
        ui.run_javascript(IN_BROWSER % shown.upload.id)
        if not shown.asked.is_empty:
            await shown.show_query()
            await shown.search()

    # Quasar's loading bar has no accessible name; the page reports its state as text.
    pages.config.quasar_config["loadingBar"]["skipHijack"] = True
    ui.run_with(app, title="fuselip", dark=None, language="en-US", show_welcome_message=False, reconnect_timeout=30)


class Text(TextElement):
    """Text in an HTML element of a given tag."""

    def __init__(self, tag: str, text: str = "", classes: str = "") -> None:
        super().__init__(tag=tag, text=text)
        self.classes(classes)


class SearchPage:
    """One visitor's page."""

    def __init__(
        self, engine: Engine, compared: Engine | None, asked: Asked, facets: Mapping[str, Mapping[str, int]]
    ) -> None:
        self.engine, self.asked, self.facets = engine, asked, facets
        self.engines = [engine, *([compared] if compared else [])]
        self.lists: list[ui.element] = []  # of hits, one for each engine
        self.shown = 0  # hits in each list
        self.map_ids: dict[tuple[str, int], str] = {}

    # ---- elements ----------------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Header, query, filters and the three tabs."""
        ui.colors(primary="#1f5f9e")
        with ui.element("header").classes("fl-top"):
            Text("h1", "Search the archive")
            Text("p", NOTICE)
            ui.space()
            dark = ui.dark_mode(None)
            following = {None: True, True: False, False: None}
            ui.button(icon="contrast", on_click=lambda: dark.set_value(following[dark.value])).props(
                'flat round aria-label="Dark, light or system theme"'
            )
        with ui.element("section").classes("fl-query").props('aria-label="Query"'):
            self._build_picture()
            self._build_words()
        with ui.element("div").classes("fl-main"):
            self._build_filters()
            with ui.element("div"):
                self._build_tabs()

    def _build_picture(self) -> None:
        with ui.element("div").classes("fl-picture"):
            self.preview = ui.element("img").props('alt="The picture that is asked about"')
            # Hidden, since its buttons have no accessible names; the button below and dropped files use it.
            self.upload = ui.upload(
                auto_upload=True,
                max_file_size=int(self.engine.limits.body_mb * 1e6),
                on_upload=self.take_upload,
                on_rejected=lambda: self.fail(
                    f"the file is larger than {self.engine.limits.body_mb:g} MB; choose another"
                ),
            ).classes("hidden")
            pick = ui.button("Picture or DICOM", icon="add_photo_alternate").props("outline no-caps").classes("w-full")
            pick.on("click", js_handler=f"() => getElement({self.upload.id}).$refs.qRef.pickFiles()")
            Text("p", "or drop it anywhere", "fl-quiet")
            self.remove = ui.button("Remove picture", icon="close", on_click=self.remove_picture)
            self.remove.props("flat dense no-caps")
        self.preview.set_visibility(False)
        self.remove.set_visibility(False)

    def _build_words(self) -> None:
        with ui.element("div"):
            self.words = ui.input("Words", value=self.asked.words).classes("w-full").props("outlined clearable")
            self.words.on("keydown.enter", self.search_words)
            with ui.row().classes("items-center mt-2"):
                ui.button("Search", icon="search", on_click=self.search_words)
                self.spinner = ui.spinner(size="1.5rem").props('aria-hidden="true"')
                self.status = Text("p", START, "fl-quiet").props('role="status" aria-live="polite"')
            self.error = Text("p", "", "fl-error").props('role="alert"')
        self.spinner.set_visibility(False)
        self.error.set_visibility(False)

    def _build_filters(self) -> None:
        details = ui.element("details").classes("fl-filters").props("open")
        with details, ui.element("div"):
            self.filters = {}
            for name, label in FACETS.items():
                counted = dict(list(self.facets[name].items())[:MOST_OPTIONS])
                options = {value: f"{value} ({count})" for value, count in counted.items()}
                chosen = [value for value in self.asked.filters.get(name, ()) if value in options]
                if options:
                    self.filters[name] = ui.select(
                        options, label=label, value=chosen, multiple=True, clearable=True, on_change=self.filter
                    ).classes("w-full")
            self.threshold = ui.number(
                "Minimum score", value=self.asked.threshold, min=-1, max=1, step=0.05, on_change=self.filter
            ).classes("w-full")
            self.after = ui.input("Indexed after", value=self.asked.after, on_change=self.filter)
            self.after.props('type="date" stack-label').classes("w-full")
            self.hybrid = ui.checkbox("Match words of captions too", value=self.asked.hybrid, on_change=self.filter)
        with details:
            Text("summary", "Filters").move(details, 0)

    def _build_tabs(self) -> None:
        with ui.tabs(on_change=self.show_map).props('align="left"') as self.tabs:
            found, ask, plane = ui.tab("Pictures"), ui.tab("Question"), ui.tab("Map")
        with ui.tab_panels(self.tabs, value=found).classes("w-full").props("keep-alive"):
            with ui.tab_panel(found):
                with ui.element("div").classes("fl-columns"):
                    for engine in self.engines:
                        self._build_hits(engine)
                self.more = ui.button("Show more", on_click=self.show_more).props("outline").classes("mt-4")
                self.more.set_visibility(False)
            with ui.tab_panel(ask):
                self._build_question()
            with ui.tab_panel(plane):
                Text("p", "Similar pictures are close together. Click one to search for more like it.", "fl-quiet")
                self.plane = ui.element("div").classes("w-full")

    def _build_hits(self, engine: Engine) -> None:
        alone = len(self.engines) == 1
        with ui.element("section"):
            title = "Pictures found" if alone else f"Pictures found by {engine.name}"
            Text("h2", title, "sr-only" if alone else "fl-model")
            hits = ui.element("ul").classes("fl-hits")
            hits.props["aria-label"] = title
            self.lists.append(hits)

    def _build_question(self) -> None:
        Text("p", "Answers are ranked by their similarity to the picture and the question together.", "fl-quiet")
        self.question = ui.input("Question about the picture").classes("w-full").props("outlined")
        self.question.on("keydown.enter", self.rank)
        self.candidates = ui.textarea("Possible answers, one a line", value="yes\nno").classes("w-full mt-2")
        self.candidates.props("outlined autogrow")
        ui.button("Rank answers", icon="sort", on_click=self.rank).classes("mt-2")
        self.ranked = ui.element("ol").classes("fl-answers mt-4").props('aria-label="Ranked answers"')

    def _add_hit(self, hit: Hit, place: ui.element) -> None:
        caption = hit.caption or hit.id
        facts = [
            f"score {hit.score:.3f}",
            hit.modality,
            hit.split,
            hit.source,
            hit.licence and f"licence {hit.licence}",
        ]
        facts += [f"{hit.folded} equal pictures"] if hit.folded else []
        with place, ui.element("li").classes("fl-hit"):
            # The API serves thumbnails of the first index only.
            source = thumbnail_of(hit.id) if place is self.lists[0] else data_uri(hit.thumbnail, "jpeg")
            ui.element("img").props(f'src="{source}" loading="lazy" alt=""')
            with ui.element("div").classes("fl-words"):
                Text("h3", caption)
                Text("p", " · ".join(fact for fact in facts if fact), "fl-quiet")
                if hit.concepts:
                    Text("p", ", ".join(hit.concepts), "fl-quiet")
                if hit.place.startswith(("http://", "https://")):
                    ui.link("Original", hit.place, new_tab=True).classes("fl-link").props('rel="noreferrer"')
                elif hit.place:
                    Text("p", hit.place, "fl-quiet")
                with ui.element("div").classes("fl-actions"):
                    for label, act in (
                        ("More like this", self.search_like),
                        ("The same, but …", self.change),
                        ("Ask", self.ask_about),
                    ):
                        button = ui.button(label, on_click=lambda _, act=act, name=hit.id: act(name))
                        button.props["aria-label"] = f"{label}: {caption}"
                        button.props("flat dense no-caps")
                    link = ui.link("Link", Asked(ids=(hit.id,)).address).classes("fl-link")
                    link.props["aria-label"] = f"Link: {caption}"

    # ---- actions -----------------------------------------------------------------------------------------------------

    async def tried(self, work: Awaitable[Result], doing: str, seconds: float | None = None) -> Result | None:
        """The result of `work`, or None if it failed, in which case its error is shown. `doing`: status meanwhile."""
        self.error.set_visibility(False)
        self.spinner.set_visibility(True)
        self.status.text = doing
        try:
            async with asyncio.timeout(seconds or self.engine.limits.seconds):
                return await work
        except Exception as error:
            self.fail(sentence_for(error)[1])
            return None
        finally:
            self.spinner.set_visibility(False)

    def fail(self, sentence: str) -> None:
        """Shows an error."""
        self.status.text = ""
        self.error.text = sentence[:1].upper() + sentence[1:]
        self.error.set_visibility(True)

    async def search_words(self) -> None:
        """Searches for the words, with the picture if one is chosen."""
        self.asked = replace(self.asked, words=self.words.value or "")
        await self.search()

    async def filter(self) -> None:
        """Searches again with the filters."""
        chosen = {name: tuple(select.value) for name, select in self.filters.items() if select.value}
        self.asked = replace(
            self.asked,
            filters=chosen,
            threshold=self.threshold.value,
            after=self.after.value or "",
            hybrid=self.hybrid.value,
        )
        if not self.asked.is_empty:
            await self.search()

    async def search(self) -> None:
        """Shows the first hits, and puts the query into the URL."""
        self.tabs.set_value("Pictures")
        ui.navigate.history.push(self.asked.address)
        self.shown = 0
        for place in self.lists:
            place.clear()
        self.more.set_visibility(False)
        await self.show_more()

    async def show_more(self) -> None:
        """Adds the next hits."""
        query = replace(self.asked.query, limit=HITS, offset=self.shown)
        work = asyncio.gather(*(engine.search(query) for engine in self.engines))
        answers = await self.tried(work, "Searching …")
        if answers is None:
            return
        for place, (hits, _) in zip(self.lists, answers, strict=True):
            for hit in hits:
                self._add_hit(hit, place)
        most = max(len(hits) for hits, _ in answers)
        self.shown += most
        self.more.set_visibility(most == HITS)
        found = f"{self.shown} pictures, the nearest to {self.asked.said} first."
        self.status.text = f"{found if self.shown else NOTHING} {answers[0][1]}"

    async def take_upload(self, event: events.UploadEventArguments) -> None:
        """Chooses the uploaded picture, and searches for similar ones."""
        data = await event.file.read()
        self.upload.reset()

        def preview() -> str:
            return picture_uri(read_picture(data, "the file", self.engine.limits.megapixels))

        source = await self.tried(asyncio.to_thread(preview), "Reading …")
        if source is not None:
            self.asked = replace(self.asked, picture=data, ids=(), words=self.words.value or "")
            self._show_picture(source)
            await self.search()

    async def remove_picture(self) -> None:
        """Continues with the words alone."""
        self.asked = replace(self.asked, picture=None, ids=())
        self._show_picture(None)
        self.status.text = START
        if not self.asked.is_empty:
            await self.search()

    async def show_query(self) -> None:
        """Shows the picture that the URL names, if any."""
        if not self.asked.ids:
            return
        found = await self.tried(self.engine.item(self.asked.ids[0]), "Searching …")
        if found is not None:
            self._show_picture(thumbnail_of(found.id))

    def _show_picture(self, source: str | None) -> None:
        self.preview.set_visibility(source is not None)
        self.remove.set_visibility(source is not None)
        self.preview.props["src"] = source or ""
        self.words.props["label"] = "Words about the picture: a question, or a difference" if source else "Words"
        self.preview.update()
        self.words.update()

    def _choose(self, name: str) -> None:
        self.asked = replace(self.asked, ids=(name,), picture=None, words="")
        self.words.set_value("")
        self._show_picture(thumbnail_of(name))

    async def search_like(self, name: str) -> None:
        """Searches for pictures similar to that one."""
        self._choose(name)
        await self.search()

    async def change(self, name: str) -> None:
        """Asks for words that describe the difference."""
        self._choose(name)
        self.status.text = "Type what differs, such as “without contrast”, and search with picture and words together."
        self.words.run_method("focus")

    async def ask_about(self, name: str) -> None:
        """Chooses the picture for a question."""
        self._choose(name)
        self.tabs.set_value("Question")
        self.question.run_method("focus")

    async def rank(self) -> None:
        """Ranks the answers and shows them."""
        answers = [line.strip() for line in (self.candidates.value or "").splitlines() if line.strip()]
        self.ranked.clear()
        name = self.asked.ids[0] if self.asked.ids and self.asked.picture is None else None
        work = self.engine.answers(self.asked.picture, name, self.question.value or "", answers)
        answer = await self.tried(work, "Ranking …")
        if answer is None:
            return
        ranked, note = answer
        with self.ranked:
            for place, score in ranked:
                with ui.element("li"):
                    Text("span", f"{answers[place]} ")
                    Text("span", f"{score:.3f}", "fl-quiet")
        self.status.text = f"{len(ranked)} answers, the nearest first. {note}"

    async def show_map(self) -> None:
        """Draws the map when its tab is first opened."""
        if self.tabs.value != "Map" or self.map_ids:
            return
        drawn = await self.tried(
            self.engine.map(), "Drawing the map, which takes a while the first time …", MAP_SECONDS
        )
        if drawn is None:
            return
        series: dict[str, list[list[float]]] = {}
        for name, place, modality in zip(drawn[0], drawn[1].tolist(), drawn[2], strict=True):
            points = series.setdefault(modality or "unknown", [])
            self.map_ids[modality or "unknown", len(points)] = name
            points.append([round(value, 4) for value in place])
        with self.plane:
            chart = ui.echart(map_options(series), on_point_click=self.open_point).classes("fl-map")
            chart.props('role="img" aria-label="Map of the archive; every picture on it can be found by search"')
        self.status.text = f"{len(drawn[0])} pictures on the map."

    async def open_point(self, event: events.EChartPointClickEventArguments) -> None:
        """Searches for pictures similar to the clicked one."""
        await self.search_like(self.map_ids[event.series_name, event.data_index])


def map_options(series: Mapping[str, list[list[float]]]) -> dict[str, object]:
    """ECharts options: one series of points for each modality."""
    axis = {"show": False, "scale": True}
    grey = {"color": "#808890"}
    points = {"type": "scatter", "symbolSize": 7, "cursor": "pointer"}
    return {
        "animation": False,
        "legend": {"type": "scroll", "textStyle": grey},
        "grid": {"left": 8, "right": 8, "top": 40, "bottom": 8},
        "xAxis": axis,
        "yAxis": axis,
        "dataZoom": [{"type": "inside", "xAxisIndex": 0}, {"type": "inside", "yAxisIndex": 0}],
        "series": [{**points, "name": name, "data": data} for name, data in series.items()],
    }
