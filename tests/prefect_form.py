"""A deployment's form on Prefect's page: opened, filled in, sent off, and its run watched to the end."""

from __future__ import annotations

import json
import time
from typing import Any

from playwright.sync_api import Page
from prefect_stack import Prefect

RUN_SECONDS = 900.0
CHOICES = ("recipe", "size")


def say(words: str) -> None:
    """For the reader of a failure, or of ``pytest -s``: what was done when."""
    print(time.strftime("%T"), words, flush=True)


def open_form(page: Page, served: Prefect, deployment: str) -> None:
    say(f"opens the form of {deployment}")
    page.goto(f"{served.prefect}/v2/deployments")
    page.get_by_role("link", name=deployment).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Custom run").click()


def fill_form(page: Page, request: dict[str, Any]) -> None:
    """Types the fields of `request` in; `overrides` is the last of them on the form, where there is one editor."""
    say("fills the form")
    for name, value in request.items():
        if name == "overrides":
            page.locator(".cm-content").first.click()
            page.keyboard.press("ControlOrMeta+a")
            page.keyboard.insert_text(json.dumps(value))
        elif name in CHOICES:
            page.get_by_label(f"Select {name.capitalize()}").click()
            page.get_by_role("option", name=str(value), exact=True).click()
        else:
            page.get_by_label(f"{name.capitalize()} (Optional)").fill(str(value))


def send_form(page: Page) -> str:
    """Starts the run, goes to its page, and returns its id."""
    page.get_by_role("button", name="Submit").click()
    page.get_by_role("link", name="View run").click()
    page.wait_for_url("**/runs/flow-run/**")
    return page.url.split("?")[0].rpartition("/")[2]


def watch(page: Page, served: Prefect, run_id: str) -> None:
    """Until the page itself, left open, says that the run is completed; a run that ends otherwise fails at once."""
    late = time.monotonic() + RUN_SECONDS
    seen = ""
    while not page.get_by_text("Completed", exact=True).first.is_visible():
        state = served.run(run_id)["state"]
        stages = served.post("task_runs/filter", {"flow_runs": {"id": {"any_": [run_id]}}})
        now = ", ".join([state["name"], *sorted(f"{each['name']} {each['state_name']}" for each in stages)])
        if now != seen:
            say(seen := now)
        assert state["type"] not in ("FAILED", "CANCELLED"), f"{state['message']}\n{served.said()}"
        assert time.monotonic() < late, f"the page did not say that the run is completed: {now}\n{served.said()}"
        page.wait_for_timeout(500)
    assert served.run(run_id)["state"]["name"] == "Completed"
