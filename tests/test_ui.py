"""What a user does in a browser: fill Prefect's form, watch the run to its end, and find its model on MLflow's page."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import opened_browser, opened_page
from playwright.sync_api import Page, expect
from prefect_form import fill_form, open_form, say, send_form, watch
from prefect_stack import Served

from fuselip_core.data.phantom.data_set import draw_data_set

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]
NAME = "from-the-page"
# Small enough for a test.
OVERRIDES = {
    "codebook.steps": 2,
    "codebook.batch_size": 16,
    "train.batch_size": 16,
    "train.validate_every": 3,
    "train.checkpoint_every": 3,
    "evaluate.examples": 2,
}


@pytest.fixture
def served(prefect_served: Served) -> Iterator[Served]:
    """What is served, with the real stages and a small sample to run them on."""
    mark = prefect_served.repository / "real"
    mark.touch()
    draw_data_set(prefect_served.repository / "images", 0, {"train": 48, "valid": 24, "test": 24})
    yield prefect_served
    mark.unlink()


@pytest.fixture
def outside() -> list[str]:
    """Addresses beyond this machine that a page has asked for."""
    return []


@pytest.fixture
def page(outside: list[str], tmp_path: Path) -> Iterator[Page]:
    size = {"width": 1280, "height": 900}
    with opened_browser() as browser, opened_page(browser, outside, tmp_path / "last.png", viewport=size) as page:
        yield page


def test_form_to_model(served: Served, page: Page, outside: list[str], tmp_path: Path) -> None:
    """Opens a deployment, has wrong values refused, starts it, watches it, and follows its links to MLflow."""
    open_form(page, served, "pipeline-nightly")
    assert_refused_by_the_form(page)
    assert_refused_by_the_server(page, served)
    page.screenshot(path=tmp_path / "refused.png")
    # Anew: the refusal covers the button for as long as the pointer is there.
    open_form(page, served, "pipeline-nightly")
    fill_form(page, wanted(served))
    page.screenshot(path=tmp_path / "form.png", full_page=True)
    run_id = send_form(page)
    asked = served.run(run_id)["parameters"]["request"]
    # A form that fills in what nobody gave would hide a recipe's values, or those of a data set's own settings.
    assert {name: value for name, value in asked.items() if value} == wanted(served)
    watch(page, served, run_id)
    # The page draws only the lines in view, and registering comes last.
    page.get_by_role("combobox", name="log sort order").click()
    page.get_by_role("option", name="Newest to oldest").click()
    expect(page.get_by_role("tabpanel", name="Logs")).to_contain_text("champion of fuselip-sample-tiny does not move")
    page.screenshot(path=tmp_path / "logs.png")
    # Anew: what the page has drawn while the run was under way is out of scale.
    page.reload()
    expect(page.get_by_role("main")).to_contain_text("sample-tiny-")
    page.get_by_role("tab", name="Artifacts").click()
    for name in ("results", "metrics", "report", "picture-reconstructions", "picture-retrieval"):
        expect(page.get_by_role("link", name=re.compile(rf"\b{name}\b")).first).to_be_visible()
    page.screenshot(path=tmp_path / "flow-run.png")
    follow_to_mlflow(page, served, run_id, tmp_path)
    # docs/flows.md says so, and what stops it.
    assert {re.sub(r"^https://([^/]+)/.*", r"\1", each) for each in outside} <= {"sr-client-cfg.amplitude.com"}


def assert_refused_by_the_form(page: Page) -> None:
    """A number out of range does not leave the page."""
    steps = page.get_by_label("Steps (Optional)")
    steps.fill("0")
    page.get_by_role("button", name="Submit").click()
    said = steps.evaluate("field => field.validationMessage")
    assert "greater than or equal to 1" in said
    steps.fill("3")


def assert_refused_by_the_server(page: Page, served: Served) -> None:
    """What only the server checks is refused with the field's name, and there is no run of it."""
    before = count_runs(served)
    page.get_by_label("Name (Optional)").fill("../x")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("Validation failed for field 'request.name'")).to_be_visible()
    assert count_runs(served) == before


def count_runs(served: Served) -> int:
    return int(served.post("flow_runs/count", {}))


def wanted(served: Served) -> dict[str, Any]:
    """The request that the form was filled with."""
    root = str(served.repository / "images")
    return {"recipe": "sample", "name": NAME, "root": root, "steps": 3, "overrides": OVERRIDES}


def follow_to_mlflow(page: Page, served: Served, run_id: str, pictures: Path) -> None:
    """From the run's page in Prefect to its run in MLflow, which names the way back, and on to the model."""
    say("goes to the run's page in MLflow")
    page.get_by_role("link", name="mlflow-run").click()
    page.locator("a[href*='/v2/artifacts/artifact/']").first.click()
    page.get_by_role("link", name="MLflow run", exact=True).click()
    page.wait_for_url(f"{served.mlflow}/**")
    main = page.get_by_role("main")
    for words in ("Finished", "recipe: sample", run_id[:8]):
        expect(main).to_contain_text(words)
    back = main.get_by_role("link", name="this flow run")
    expect(back).to_have_attribute("href", f"{served.prefect}/v2/runs/flow-run/{run_id}")
    expect(main.locator("a[href*='/models/fuselip-sample-tiny']").first).to_be_visible()
    page.screenshot(path=pictures / "mlflow.png")
    page.goto(f"{served.mlflow}/#/models/fuselip-sample-tiny")
    expect(main.get_by_role("heading", name="fuselip-sample-tiny")).to_be_visible()
    # Three steps of training pass no gate: the version is there, without the alias of what is served.
    expect(main.get_by_role("row", name=re.compile("Version 1"))).to_contain_text("candidate")
    page.screenshot(path=pictures / "model.png")
