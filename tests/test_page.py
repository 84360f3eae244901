"""What a person does on the page of `fuselip app`, in Debian's Chromium, which reaches nothing but this machine."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from chromium import opened_browser, opened_page
from make_dicom import picture, save
from PIL import Image
from playwright.sync_api import Browser, Page, expect
from tiny_model import save_tiny_model

from fuselip_core import Embedder
from fuselip_core.config import Settings
from fuselip_core.search import build

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
START_SECONDS = 240.0


@pytest.fixture(scope="module")
def address(finished_run: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a `fuselip app` of its own process, on the model and the data of a small run."""
    folder = tmp_path_factory.mktemp("app")
    model = finished_run.artifacts / "model"
    build.build(finished_run.artifacts / "prepared", folder / "index", Embedder.from_pretrained(model, "cpu"))
    log = folder / "log"
    command = [sys.executable, "-m", "fuselip_core", "app", "--model", str(model), "--index", str(folder / "index")]
    with served_by([*command, "--port", "0"], log) as address:
        yield address


@contextmanager
def served_by(command: list[str], log: Path) -> Iterator[str]:
    with log.open("w") as stream:
        served = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield wait_for(served, log)
        served.send_signal(signal.SIGINT)
        assert served.wait(30) == 128 + signal.SIGINT
        assert "Traceback" not in log.read_text()
    finally:
        served.kill()


def wait_for(served: subprocess.Popen[bytes], log: Path) -> str:
    late = time.monotonic() + START_SECONDS
    while time.monotonic() < late:
        assert served.poll() is None, log.read_text()
        if said := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
            try:
                if httpx.get(f"{said[0]}/ready").status_code == 200:
                    return said[0]
            except httpx.HTTPError:
                pass
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, address: str, tmp_path: Path) -> Iterator[Page]:
    """A page that was opened, asks nothing of another machine, and logs no error."""
    outside: list[str] = []
    errors: list[str] = []
    options = {"viewport": {"width": 1280, "height": 900}, "base_url": address}
    with opened_page(browser, outside, tmp_path / "last.png", **options) as page:
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if "Content Security" in said.text else None)
        open_page(page)
        yield page
    assert not outside and not errors


def open_page(page: Page, place: str = "/") -> None:
    page.goto(place)
    expect(page.get_by_role("heading", name="Search the archive")).to_be_visible()
    expect(page.get_by_role("status").or_(page.get_by_role("alert")).filter(has_text=re.compile("."))).to_be_visible()


def hits(page: Page) -> Any:
    return page.get_by_role("list", name="Pictures found").get_by_role("listitem")


def search(page: Page, words: str) -> None:
    """Searches for words; the page says which ones it has found pictures for."""
    page.get_by_role("textbox", name=re.compile("^Words")).fill(words)
    page.get_by_role("button", name="Search", exact=True).click()
    found(page, f"“{words}”")


def found(page: Page, said: str) -> None:
    """Waits for the answer to the query that the page calls `said`."""
    expect(page.get_by_role("status")).to_have_text(re.compile(rf"^\d+ pictures, the nearest to {said} first\."))


def upload(page: Page, name: str, data: bytes) -> None:
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "", "buffer": data})


def bright(form: str) -> bytes:
    pixels = np.full((32, 32), 20, np.uint8)
    pixels[:16] = 200
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def test_words_fill_the_page_and_the_address(page: Page) -> None:
    expect(page.get_by_text("not a medical device")).to_be_visible()
    search(page, "the left half is bright")
    first = hits(page).first
    expect(first).to_contain_text("half is bright")
    expect(first).to_contain_text("score")
    expect(first).to_contain_text("X-Ray Computed Tomography")
    expect(first.locator("img")).to_have_js_property("complete", True)
    assert first.locator("img").evaluate("image => image.naturalWidth") > 0
    count = hits(page).count()
    assert 0 < count <= 24
    caption = first.get_by_role("heading").inner_text()
    address = page.url
    assert "q=the+left+half+is+bright" in address
    page.get_by_role("button", name="Show more").click()
    expect(hits(page).nth(count)).to_be_visible()
    # The address alone leads to the same.
    open_page(page, address)
    found(page, "“the left half is bright”")
    expect(hits(page).first.get_by_role("heading")).to_have_text(caption)


def test_enter_searches_and_back_goes_back(page: Page) -> None:
    words = page.get_by_role("textbox", name=re.compile("^Words"))
    for typed in ("left", "right"):
        words.fill(typed)
        words.press("Enter")
        found(page, f"“{typed}”")
        expect(page).to_have_url(re.compile(rf"/\?q={typed}$"))
    page.go_back()
    found(page, "“left”")
    expect(page.get_by_role("textbox", name=re.compile("^Words"))).to_have_value("left")


def test_a_picture_then_picture_and_words(page: Page) -> None:
    upload(page, "top.png", bright("PNG"))
    found(page, "the picture")
    expect(page.get_by_alt_text("The picture that is asked about")).to_be_visible()
    alone = hits(page).all_inner_texts()
    page.get_by_role("textbox", name=re.compile("^Words")).fill("the left half is bright")
    page.get_by_role("button", name="Search", exact=True).click()
    found(page, "the picture with “the left half is bright”")
    expect(page.get_by_alt_text("The picture that is asked about")).to_be_visible()
    assert hits(page).all_inner_texts() != alone
    page.get_by_role("button", name="Remove picture").click()
    expect(page.get_by_alt_text("The picture that is asked about")).to_be_hidden()


def test_dicom_is_shown_and_searched(page: Page, tmp_path: Path) -> None:
    data = save(picture(np.arange(64, dtype=np.uint8).reshape(8, 8)), tmp_path / "a.dcm").read_bytes()
    upload(page, "IM0001", data)
    found(page, "the picture")
    assert page.get_by_alt_text("The picture that is asked about").evaluate("image => image.naturalWidth") == 8


@pytest.mark.parametrize(("data", "words"), [(b"no picture", "not an image"), (b"\0" * 128 + b"DICM", "can't be read")])
def test_a_broken_file_is_one_sentence(page: Page, data: bytes, words: str) -> None:
    upload(page, "broken.png", data)
    expect(page.get_by_role("alert")).to_contain_text(words)
    expect(hits(page)).to_have_count(0)
    search(page, "left")  # and the page goes on
    expect(page.get_by_role("alert")).to_be_hidden()


@pytest.mark.parametrize(("words", "said"), [("", "neither words nor a picture"), ("?!", "no letter and no digit")])
def test_an_empty_query_is_one_sentence(page: Page, words: str, said: str) -> None:
    page.get_by_role("textbox", name=re.compile("^Words")).fill(words)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_role("alert")).to_contain_text(said)
    open_page(page, "/?id=nothing")
    expect(page.get_by_role("alert")).to_contain_text("no picture with that id")


def test_filters_narrow_the_hits_and_can_leave_none(page: Page) -> None:
    search(page, "left")
    page.get_by_label("Split").click()
    page.get_by_role("option", name=re.compile("^test ")).click()
    page.wait_for_url("**split=test**")
    expect(hits(page)).to_have_count(16)
    page.keyboard.press("Escape")
    page.get_by_label("Minimum score").fill("1")
    expect(page.get_by_role("status")).to_contain_text("Nothing found")
    expect(hits(page)).to_have_count(0)


def test_more_like_this_and_the_same_but(page: Page) -> None:
    search(page, "left")
    address = hits(page).first.get_by_role("link", name="Link").get_attribute("href")
    hits(page).first.get_by_role("button", name="More like this").click()
    found(page, "the picture")
    expect(page).to_have_url(re.compile(re.escape(str(address)) + "$"))
    expect(page.locator(f"li a[href='{address}']")).to_have_count(0)
    hits(page).first.get_by_role("button", name="The same, but").click()
    words = page.get_by_role("textbox", name=re.compile("^Words about the picture"))
    expect(words).to_be_focused()
    words.fill("the right half")
    words.press("Enter")
    found(page, "the picture with “the right half”")
    expect(page).to_have_url(re.compile(r"/\?q=the\+right\+half&id="))
    expect(page.get_by_role("status")).not_to_contain_text("thumbnail")  # the original is where it was


def test_a_question_has_ranked_answers(page: Page) -> None:
    search(page, "left")
    hits(page).first.get_by_role("button", name="Ask").click()
    page.get_by_label("Question about the picture").fill("Which half is bright?")
    page.get_by_label("Possible answers, one a line").fill("left\nright\ntop\n\nbottom")
    page.get_by_role("button", name="Rank answers").click()
    rows = page.get_by_role("list", name="Ranked answers").get_by_role("listitem")
    expect(rows).to_have_count(4)
    scores = [float(text.split()[-1]) for text in rows.all_inner_texts()]
    assert scores == sorted(scores, reverse=True)
    page.get_by_label("Possible answers, one a line").fill("")
    page.get_by_role("button", name="Rank answers").click()
    expect(page.get_by_role("alert")).to_contain_text("no answers to rank")


def test_the_map_opens_pictures(page: Page) -> None:
    page.get_by_role("tab", name="Map").click()
    expect(page.get_by_role("status")).to_contain_text("80 pictures on the map", timeout=300_000)
    chart = page.get_by_role("img", name=re.compile("^Map of the archive"))
    expect(chart.locator("canvas").first).to_be_visible()
    # Where a point lies is asked of the chart itself. The click waits until the tab has stopped to slide in.
    x, y = chart.evaluate(
        """node => { const chart = Vue.toRaw(getElement(node.id.slice(1)).chart);
                    chart.getZr().flush();
                    return chart.convertToPixel({seriesIndex: 0}, chart.getOption().series[0].data[0]) }"""
    )
    chart.click(position={"x": x, "y": y})
    found(page, "the picture")
    expect(page).to_have_url(re.compile(r"/\?id="))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_keeps_keyboards_and_screen_readers_out(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme)
    for state in ("start", "found", "error", "question"):
        if state == "found":
            search(page, "left")
        elif state == "error":
            page.get_by_role("textbox", name=re.compile("^Words")).fill("?!")
            page.get_by_role("button", name="Search", exact=True).click()
            expect(page.get_by_role("alert")).to_be_visible()
        elif state == "question":
            page.get_by_role("tab", name="Question").click()
            expect(page.get_by_label("Question about the picture")).to_be_visible()
        serious = [
            (each["id"], [node["html"][:200] for node in each["nodes"]])
            for each in Axe().run(page).response["violations"]
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, (state, serious)


def test_the_keyboard_alone_searches(page: Page) -> None:
    words = page.get_by_role("textbox", name=re.compile("^Words"))
    for _ in range(20):
        page.keyboard.press("Tab")
        if words.evaluate("field => field === document.activeElement"):
            break
    page.keyboard.type("left")
    page.keyboard.press("Enter")
    found(page, "“left”")


@pytest.mark.parametrize("width", [400, 800, 1600])
def test_every_width_fits(page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    open_page(page)
    search(page, "left")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_two_models_stand_side_by_side(browser: Browser, finished_run: Settings, tmp_path: Path) -> None:
    models = {"one": finished_run.artifacts / "model", "two": save_tiny_model(tmp_path / "two-model")}
    for name, model in models.items():
        build.build(finished_run.artifacts / "prepared", tmp_path / name, Embedder.from_pretrained(model, "cpu"))
    command = [sys.executable, "-m", "fuselip_core", "app", "--port", "0", "--index", str(tmp_path / "one")]
    outside: list[str] = []
    with (
        served_by([*command, "--compare-index", str(tmp_path / "two")], tmp_path / "log") as address,
        opened_page(browser, outside, tmp_path / "last.png", base_url=address) as page,
    ):
        open_page(page)
        search(page, "the left half is bright")
        captions = []
        for model in models.values():
            column = page.get_by_role("list", name=f"Pictures found by {model}")
            expect(column.get_by_role("listitem")).to_have_count(24)
            expect(column.locator("img").first).to_have_js_property("complete", True)
            assert column.locator("img").first.evaluate("image => image.naturalWidth") > 0
            captions.append(column.get_by_role("heading").all_inner_texts())
        assert captions[0] != captions[1] and set(captions[0]) & set(captions[1])
    assert not outside
