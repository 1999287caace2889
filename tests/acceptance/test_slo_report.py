"""The report of service levels as an operator meets it: a red run, and its artifact with the plot, in a browser."""

import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from playwright.sync_api import Page

from tests.acceptance.conftest import Stack
from tests.acceptance.test_ui import page, picture  # noqa: F401
from tests.prometheus_fixtures import prometheus, write_past
from tests.test_slo_report import evaluated, past

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
RUN = """
from flows.slo import slo_report
state = slo_report(return_state=True)
print(state.type.value, state.state_details.flow_run_id, state.message, sep="\\n")
"""


def test_a_spent_budget_is_a_red_run_whose_report_shows_where_it_went(
    stack: Stack,
    page: Page,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The run's message names the budget; the artifact has the figures and draws them, from nobody else's server."""
    now = datetime.now(UTC)
    days = [now - timedelta(minutes=5 * n) for n in range(30 * 288, 0, -1)]
    went = {  # as the rules recorded it day by day, with a day on which Prometheus was down
        f'engram:slo:budget_remaining30d{{slo="{slo}"}}': [
            (at, 1 - loss * (n / len(days)) ** 2) for n, at in enumerate(days) if not 2880 < n < 3168
        ]
        for slo, loss in (("availability", 1.9), ("latency", 0.2), ("errors", 0.4), ("auth", 0.5))
    }
    write_past(tmp_path, went | dict(past(now, 30, errors=0.02, slow=0.1, auth=0.1)))
    environment = stack.environment | {
        "PREFECT_API_URL": stack.status["prefect_api_url"],
        "ENGRAM_CONTROL_PLANE_URL": stack.status["control_plane_url"],
    }
    with prometheus(tmp_path) as url:
        evaluated(url)
        done = subprocess.run(
            [*stack.program, "-c", RUN],
            env=environment | {"ENGRAM_PROMETHEUS_URL": url},
            capture_output=True, text=True, timeout=120, check=True,
        )  # fmt: skip
    state, flow_run_id, message = done.stdout.splitlines()[-3:]
    assert state == "FAILED" and message == "error budget spent: availability"
    found = stack.prefect("POST", "artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [flow_run_id]}}})
    kinds = {artifact["type"]: artifact for artifact in found}
    assert kinds.keys() == {"markdown", "table"} and '"spent"' in str(kinds["table"]["data"])

    page.goto(f"{stack.status['prefect_ui_url']}/artifacts/artifact/{kinds['markdown']['id']}")
    page.get_by_text("RTO in ms, of the restore tests that passed").first.wait_for()
    plot = page.locator('img[src^="data:image/svg+xml"]')
    assert plot.evaluate("image => image.naturalWidth") > 0
    picture(page, "slo-report")
