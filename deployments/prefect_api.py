"""The few calls the command line makes to Prefect, over its REST API: start a deployment's run, follow it.

Importing Prefect takes a second and 100 MB; a command that only starts a run and waits needs neither.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from deployments.orchestration import basic_auth
from shared import queues
from shared.errors import Permanent, Transient
from shared.settings import Settings

_TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})


class RunFailed(Permanent):
    """A flow run ended in another state than Completed; the message is its cause."""


class NotPickedUp(Transient):
    """No worker started the run in time; it stays scheduled."""


@dataclass(frozen=True, slots=True)
class Run:
    """A flow run as it was last seen."""

    id: str
    name: str
    url: str
    state: str
    message: str

    @property
    def ended(self) -> bool:
        return self.state in _TERMINAL


class PrefectApi:
    """A client for one Prefect server. Raises `Transient` when it does not answer."""

    def __init__(self, settings: Settings) -> None:
        settings.require("prefect_api_url")
        self._ui_url = settings.prefect_ui_url
        self._http = httpx.Client(
            base_url=settings.prefect_api_url.rstrip("/") + "/", headers=basic_auth(settings), timeout=30.0
        )

    def start(self, deployment: str, parameters: dict[str, Any], *, machine_id: str | None = None) -> Run:
        """Start a run of `flow/deployment`, on a machine's queue or on the one that any worker polls.

        Raises `Permanent` when Prefect refuses the parameters.
        """
        found = self._call("GET", f"deployments/name/{deployment}")
        body: dict[str, Any] = {
            "parameters": parameters,
            "state": {"type": "SCHEDULED", "message": "Started from the command line"},
        }
        if machine_id is not None:
            body["work_queue_name"] = queues.queue(machine_id, deployment.rpartition("/")[2])
        return self._run(self._call("POST", f"deployments/{found['id']}/create_flow_run", body))

    def run(self, run_id: str) -> Run:
        return self._run(self._call("GET", f"flow_runs/{run_id}"))

    def steps(self, run_id: str) -> list[tuple[str, str]]:
        """The run's steps as (name, state), in order of their start."""
        rows = self._call(
            "POST",
            "task_runs/filter",
            {"flow_runs": {"id": {"any_": [run_id]}}, "sort": "EXPECTED_START_TIME_ASC", "limit": 200},
        )
        return [(row["name"].rpartition("-")[0] or row["name"], row["state_type"]) for row in rows]

    def completed_steps(self, run_id: str, count: int, *, wait_seconds: float = 10.0) -> list[str]:
        """The names of the steps that completed; waits for `count`, for the server records them a little later."""
        deadline = time.monotonic() + wait_seconds
        while True:
            done = [name for name, state in self.steps(run_id) if state == "COMPLETED"]
            if len(done) >= count or time.monotonic() > deadline:
                return done
            time.sleep(0.3)

    def newest_run_url(self, flow: str) -> str:
        """The page of the flow's newest run, empty when it never ran."""
        body = {"flows": {"name": {"any_": [flow]}}, "sort": "START_TIME_DESC", "limit": 1}
        rows = self._call("POST", "flow_runs/filter", body)
        return self._run(rows[0]).url if rows else ""

    def follow(self, run: Run, *, pick_up_seconds: float, run_seconds: float) -> Iterator[Run]:
        """Yield the run each time its state changed, the ended one last.

        Raises `NotPickedUp`, or `Transient` when it runs for longer than `run_seconds`.
        """
        started = time.monotonic()
        shown = ""
        while True:
            seen = self.run(run.id)
            if seen.state != shown:
                shown = seen.state
                yield seen
            if seen.ended:
                return
            waited = time.monotonic() - started
            if seen.state in ("SCHEDULED", "PENDING") and waited > pick_up_seconds:
                raise NotPickedUp(f"no worker picked up {seen.url} within {pick_up_seconds:g} s; it stays scheduled")
            if waited > run_seconds:
                raise Transient(f"{seen.url} still runs after {run_seconds:g} s; it goes on")
            time.sleep(0.3)

    def finish(self, run: Run, *, pick_up_seconds: float = 60.0, run_seconds: float = 900.0) -> Run:
        """Wait for the end. Raises `RunFailed` with the cause unless it completed."""
        *_, ended = self.follow(run, pick_up_seconds=pick_up_seconds, run_seconds=run_seconds)
        if ended.state != "COMPLETED":
            raise RunFailed(f"{ended.name} ended {ended.state.lower()}: {ended.message}")
        return ended

    def _run(self, row: dict[str, Any]) -> Run:
        message = " ".join(str((row.get("state") or {}).get("message") or "").split())
        message = message.removeprefix("Flow run encountered an exception: ")
        return Run(row["id"], row["name"], f"{self._ui_url}/runs/flow-run/{row['id']}", row["state_type"], message)

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            response = self._http.request(method, path, json=body)
        except httpx.HTTPError as e:
            raise Transient(f"Prefect does not answer at {self._http.base_url}: {e}") from e
        if response.status_code == 401:
            raise Permanent("Prefect does not take PREFECT_API_AUTH_STRING, or wants one")
        if response.status_code == 404:
            raise Permanent(f"Prefect does not know {path}")
        if response.status_code >= 500:
            raise Transient(f"Prefect answered {response.status_code} to {path}")
        if response.is_error:
            raise Permanent(f"Prefect refused {path}: {_reason(response)}")
        return response.json()


def _reason(response: httpx.Response) -> str:
    try:
        detail = response.json().get("detail", response.text)
    except ValueError:
        detail = response.text
    return " ".join(str(detail).split())[:300]
