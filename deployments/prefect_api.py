"""The few calls the command line makes to Prefect, over its REST API: start a deployment's run, follow it.

Importing Prefect takes a second and 100 MB; a command that only starts a run and waits needs neither.

A run goes on while its Prefect is away, so an answer that does not come says nothing about the run: `follow` asks on
until its own time is over, and what it says then is that nobody knows. A start whose answer was lost is sent again
under the same idempotency key: Prefect gives back the run that it has made, and makes no second one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx

from deployments.orchestration import basic_auth
from shared import queues
from shared.backoff import Backoff
from shared.errors import Permanent, Transient
from shared.settings import Settings

START_SECONDS = 60.0  # for a start whose answer was lost; nothing follows it yet
_POLL_SECONDS, _MOST_SECONDS = 0.3, 5.0  # between two questions; the second while nobody answers
_TERMINAL = frozenset({"COMPLETED", "FAILED", "CRASHED", "CANCELLED"})
_NOT_NOW = frozenset({408, 429})  # besides every 5xx


class RunFailed(Permanent):
    """A flow run ended in another state than Completed; the message is its cause."""


class NotPickedUp(Transient):
    """No worker started the run in time; it stays scheduled, or pending until the sweep gives it up."""


class Away(Transient):
    """Prefect does not answer, or not with an answer. `sent`: what it was asked may have reached it."""

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class NotKnown(Transient):
    """Prefect stayed away for too long: what became of a run, or whether it was started, is not known."""


def _nothing(_: str) -> None:
    """Say it to nobody."""


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
    """A client for one Prefect server. Raises `Away` when it does not answer, `Permanent` when it refuses."""

    def __init__(self, settings: Settings) -> None:
        settings.require("prefect_api_url")
        self._ui_url = settings.prefect_ui_url
        self._http = httpx.Client(
            base_url=settings.prefect_api_url.rstrip("/") + "/", headers=basic_auth(settings), timeout=30.0
        )

    def start(
        self,
        deployment: str,
        parameters: dict[str, Any],
        *,
        machine_id: str | None = None,
        say: Callable[[str], None] = _nothing,
    ) -> Run:
        """Start one run of `flow/deployment`, on a machine's queue or on the one that any worker polls.

        Raises `Away` when nothing was started, `NotKnown` when that cannot be said, `Permanent` when Prefect refuses
        the parameters.
        """
        found = self._call("GET", f"deployments/name/{deployment}")
        body: dict[str, Any] = {
            "parameters": parameters,
            "state": {"type": "SCHEDULED", "message": "Started from the command line"},
            "idempotency_key": str(uuid4()),
        }
        if machine_id is not None:
            body["work_queue_name"] = queues.queue(machine_id, deployment.rpartition("/")[2])
        return self._run(self._once(deployment, f"deployments/{found['id']}/create_flow_run", body, say))

    def _once(self, deployment: str, path: str, body: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
        """Ask until there is an answer. `body` has a key, so that asking twice starts one run."""
        deadline, backoff, sent, silent = time.monotonic() + START_SECONDS, Backoff(1.0, _MOST_SECONDS), False, False
        while True:
            try:
                created: dict[str, Any] = self._call("POST", path, body)
                return created
            except Away as e:
                sent = sent or e.sent
                if time.monotonic() > deadline:
                    if not sent:
                        raise
                    runs = f"{self._ui_url}/runs"
                    raise NotKnown(f"{e}; it may have started the run of {deployment}: look at {runs}") from e
                if not silent:
                    say(f"{e}; still asking for the run of {deployment}, which is started once")
                silent = True
                time.sleep(backoff.next_seconds())

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

    def follow(
        self,
        run: Run,
        *,
        pick_up_seconds: float,
        run_seconds: float,
        say: Callable[[str], None] = _nothing,
        over: Callable[[], bool] = lambda: False,
    ) -> Iterator[Run]:
        """Yield the run each time its state changed, the ended one last.

        A Prefect that is away is outlasted, and `say` is told; meanwhile `over` is asked whether the run is known to
        have done its work: then this returns without an ended one. Time without Prefect is not time to be picked up.
        Raises `NotPickedUp`, `Transient` when it runs for longer than `run_seconds`, or `NotKnown` when nobody could
        say that, either.
        """
        started, away_since, away_seconds = time.monotonic(), None, 0.0
        shown, backoff = "", Backoff(_POLL_SECONDS, _MOST_SECONDS)
        while True:
            asked = time.monotonic()
            try:
                seen = self.run(run.id)
            except Away as e:
                if away_since is None:
                    away_since = asked
                    say(f"{e}; the run goes on without it; still asking")
                if over():
                    return
                if time.monotonic() - started > run_seconds:
                    raise NotKnown(f"{e}; {run.name} ({run.id}) may still go on: {run.url}") from e
                time.sleep(backoff.next_seconds())
                continue
            if away_since is not None:
                away_seconds += asked - away_since
                away_since = None
                backoff.reset()
                say("Prefect answers again")
            if seen.state != shown:
                shown = seen.state
                yield seen
            if seen.ended:
                return
            waited = time.monotonic() - started
            if seen.state in ("SCHEDULED", "PENDING") and waited - away_seconds > pick_up_seconds:
                late = f"{seen.url} within {pick_up_seconds:g} s"
                if seen.state == "PENDING":
                    raise NotPickedUp(f"a worker took up and did not begin {late}; it may yet, or the sweep ends it")
                raise NotPickedUp(f"no worker picked up {late}; it stays scheduled")
            if waited > run_seconds:
                raise Transient(f"{seen.url} still runs after {run_seconds:g} s; it goes on")
            time.sleep(_POLL_SECONDS)

    def finish(self, run: Run, *, pick_up_seconds: float = 60.0, run_seconds: float = 900.0) -> Run:
        """Wait for the end. Raises `RunFailed` with the cause unless it completed."""
        *_, ended = self.follow(run, pick_up_seconds=pick_up_seconds, run_seconds=run_seconds)  # never `over`
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
            sent = not isinstance(e, (httpx.ConnectError, httpx.ConnectTimeout))
            raise Away(
                f"Prefect does not answer at {self._http.base_url}: {str(e) or type(e).__name__}", sent=sent
            ) from e
        if response.status_code == 401:
            raise Permanent("Prefect does not take PREFECT_API_AUTH_STRING, or wants one")
        if response.status_code == 404:
            raise Permanent(f"Prefect does not know {path}")
        if response.status_code >= 500 or response.status_code in _NOT_NOW:
            raise Away(f"Prefect answered {response.status_code} to {path}")
        if response.is_error:
            raise Permanent(f"Prefect refused {path}: {_reason(response)}")
        try:
            return response.json()
        except ValueError as e:  # something before it answered
            raise Away(f"Prefect answered {path} with no JSON") from e


def _reason(response: httpx.Response) -> str:
    try:
        detail = response.json().get("detail", response.text)
    except ValueError:
        detail = response.text
    return " ".join(str(detail).split())[:300]
