"""What an operator does at 3 a.m., in a real browser: fill in the restore form, watch the run, read the artifact."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from tests.acceptance.conftest import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
# Without these, Chromium looks for its makers' hosts at every start.
_QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def page() -> Iterator[Page]:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=browser, args=_QUIET)
        yield opened.new_page(viewport={"width": 1400, "height": 1500})
        opened.close()


def picture(page: Page, name: str) -> None:
    """Keep a screenshot where `ENGRAM_SCREENSHOTS` says, for a person to look at."""
    if directory := os.environ.get("ENGRAM_SCREENSHOTS"):
        page.screenshot(path=str(Path(directory) / f"{name}.png"))


def test_a_restore_started_from_the_form_works_and_its_page_tells_what_it_did(stack: Stack, page: Page) -> None:
    """The form shows what each field means; the run's page shows the steps; the artifact says what happened."""
    client = stack.tenant("from-the-form")
    made = client.post("/v1/memories", json={"content": "must come back"}).json()
    [backup] = stack.json("backup", "from-the-form")
    client.delete(f"/v1/memories/{made['id']}").raise_for_status()
    ui, deployment = stack.status["prefect_ui_url"], stack.prefect("GET", "deployments/name/restore/restore")

    page.goto(f"{ui}/deployments/deployment/{deployment['id']}/run")
    page.get_by_text("The tenant whose database is replaced.").wait_for()
    for field in deployment["parameter_openapi_schema"]["properties"].values():
        assert page.get_by_text(field["description"], exact=True).is_visible(), field["title"]
    boxes = page.locator("textarea")
    boxes.nth(0).fill("from-the-form")
    boxes.nth(1).fill("started from the form")
    picture(page, "form")
    page.get_by_role("button", name="Submit").click()

    deadline = time.monotonic() + 120
    while not (
        rows := stack.rows(
            "SELECT flow_run_id, state, reason FROM restores WHERE tenant_id = 'from-the-form' AND state <> 'running'"
        )
    ):
        assert time.monotonic() < deadline, "the restore did not end"
        time.sleep(0.5)
    [(flow_run_id, state, reason)] = rows
    assert (state, reason) == ("restored", "started from the form")
    assert client.get(f"/v1/memories/{made['id']}").json() == made

    page.goto(f"{ui}/runs/flow-run/{flow_run_id}")
    page.get_by_text("Completed").first.wait_for()
    page.get_by_text("Task Runs", exact=True).click()
    for step in ("plan", "download", "safety-backup", "lock", "swap", "verify", "release"):
        page.get_by_text(step, exact=False).first.wait_for()
    picture(page, "run")
    [artifact] = stack.prefect(
        "POST",
        "artifacts/filter",
        {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}, "type": {"any_": ["markdown"]}}},
    )
    page.goto(f"{ui}/artifacts/artifact/{artifact['id']}")
    page.get_by_text(backup["sha256"]).first.wait_for()
    page.get_by_text("writes were held for").first.wait_for()
    picture(page, "artifact")
