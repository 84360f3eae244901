"""Debian's Chromium for tests: without a screen, and reaching nothing but this machine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from needs import missing
from playwright.sync_api import Browser, Page, Request, WebSocket, expect, sync_playwright

# The browser itself must not look around either: what is counted are the pages' requests.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
HERE = r"((https?|wss?)://127\.0\.0\.1[:/]|data:|blob:|about:)"
PATIENCE_MS = 60_000


@contextmanager
def opened_browser() -> Iterator[Browser]:
    """The browser; skips the test where it is not installed."""
    program = shutil.which("chromium")
    if not program:
        missing("needs Chromium (Debian's package chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS)
        expect.set_options(timeout=PATIENCE_MS)
        yield browser
        browser.close()


@contextmanager
def opened_page(browser: Browser, outside: list[str], last: Path, **options: Any) -> Iterator[Page]:
    """An empty page. `outside` gets the addresses beyond this machine that it asks for, `last` its last look."""

    def note(asked: Request | WebSocket) -> None:
        if not re.match(HERE, asked.url):
            outside.append(asked.url)

    context = browser.new_context(service_workers="block", **options)
    context.route(re.compile(f"^(?!{HERE})"), lambda route: route.abort())
    context.on("request", note)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.on("websocket", note)
    try:
        yield page
    finally:
        print(f"the last page was {page.url}; it looked like {last}")
        page.screenshot(path=last, full_page=True)
        context.close()
