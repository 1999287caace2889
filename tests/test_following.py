"""A command that follows a run says what became of it, whatever Prefect says, and when: it outlasts a Prefect that is
away, believes the run's row in the control plane, starts one run however often it has to ask, and does not guess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from uuid import uuid4

import pytest

from deployments import prefect_api
from deployments.cli import following
from deployments.cli.following import Following, NotSettled
from deployments.prefect_api import Away, NotKnown, NotPickedUp, PrefectApi, Run
from shared.errors import ControlPlaneUnavailable
from shared.settings import Settings
from tests.core_fixtures import ROOT, World
from tests.ports import free_ports

pytest_plugins = ("tests.core_fixtures",)
RUN_ID = str(uuid4())
Look = str | int | None  # a state, the status of an answer that is none, or no answer
KILLED = "Process for flow run 'restore' exited with status code: -9"


class Scripted:
    """A Prefect that knows one run. Each look at it is answered by the next of `looks`, the last one for ever."""

    def __init__(self, *looks: Look, message: str = "", lost_answers: int = 0) -> None:
        self.looks = list(looks)
        self.message = message
        self.lost_answers = lost_answers
        self.keys: list[str] = []
        self.before: dict[int, Callable[[], None]] = {}  # what happens before the n-th look
        self.looked = 0

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any] | None:
        if path.endswith("/create_flow_run"):
            self.keys.append(body.get("idempotency_key", ""))
            return None if len(self.keys) <= self.lost_answers else (201, self._row("SCHEDULED"))
        if method == "GET" and "/flow_runs/" in path:
            self.before.get(self.looked, lambda: None)()
            look = self.looks[min(self.looked, len(self.looks) - 1)]
            self.looked += 1
            if isinstance(look, str):
                return 200, self._row(look)
            return None if look is None else (look, {"detail": "not now"})
        if path.endswith("/task_runs/filter"):
            return 200, []
        return 200, {"id": str(uuid4())}

    def _row(self, state: str) -> dict[str, Any]:
        message = self.message if state not in ("SCHEDULED", "RUNNING") else ""
        return {"id": RUN_ID, "name": "restore", "state_type": state, "state": {"message": message}}


@contextmanager
def serving(scripted: Scripted) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def _do(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else {}
            answer = scripted.answer(self.command, self.path, body)
            if answer is None:
                self.close_connection = True
                return
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(json.dumps(answer[1]).encode())

        do_GET = do_POST = _do

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/api"
    finally:
        server.shutdown()
        server.server_close()


def engram_restore(world: World, scripted: Scripted) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
    with serving(scripted) as url:
        given = {
            "ENGRAM_DATA_DIR": str(world.settings.data_dir),
            "ENGRAM_CONTROL_PLANE_URL": world.settings.control_plane_url.get_secret_value(),
            "ENGRAM_LOG_LEVEL": "error",
            "PREFECT_API_URL": url,
        }
        words = ["restore", world.tenant_id, "--json"]
        return subprocess.run(
            [sys.executable, "-m", "deployments.cli", *words],
            env=kept | given, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip


def begins(world: World) -> Callable[[], None]:
    """The run's row, as a restore writes it first."""

    def write() -> None:
        world.control_plane.execute(
            "restore_insert",
            restore_id=uuid4(), tenant_id=world.tenant_id, backup_id=None, kind="restore", requested_by="", reason="",
            flow_run_id=RUN_ID,
        )  # fmt: skip

    return write


def closes(world: World, state: str, error: str | None = None, locked_ms: float | None = None) -> Callable[[], None]:
    def write() -> None:
        row = world.control_plane.row("restore_by_flow_run", flow_run_id=RUN_ID)
        assert row is not None
        world.control_plane.execute(
            "restore_finish",
            restore_id=row["restore_id"], state=state, error=error, locked_ms=locked_ms, from_generation=None,
            to_generation=None,
        )  # fmt: skip

    return write


@pytest.fixture(autouse=True)
def _one_run_a_test(world: World) -> Iterator[None]:
    """All tests follow a run of the same id, in one control plane."""
    global RUN_ID
    RUN_ID = str(uuid4())
    yield


def test_a_restore_is_followed_through_an_outage_of_prefect(backed: World) -> None:
    """The run needs no Prefect to go on; one answer that did not come was once the end of the command, and exit 1."""
    prefect = Scripted("RUNNING", 500, None, 503, None, "RUNNING", "COMPLETED")
    prefect.before = {0: begins(backed), 6: closes(backed, "restored", locked_ms=1.0)}
    done = engram_restore(backed, prefect)
    assert done.returncode == 0, done.stderr
    assert (json.loads(done.stdout)["outcome"], json.loads(done.stdout)["locked_ms"]) == ("restored", 1.0)
    assert "the run goes on without it; still asking" in done.stderr and "Prefect answers again" in done.stderr


def test_a_restore_that_ends_while_prefect_is_away_is_told_by_its_row(backed: World) -> None:
    prefect = Scripted("RUNNING", None)
    prefect.before = {0: begins(backed), 3: closes(backed, "restored", locked_ms=1.0)}
    done = engram_restore(backed, prefect)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["outcome"] == "restored"


def test_a_restore_that_failed_while_prefect_is_away_is_told_so_too(backed: World) -> None:
    prefect = Scripted("RUNNING", 500)
    prefect.before = {0: begins(backed), 3: closes(backed, "failed", "DrainTimeout: a reader stayed")}
    done = engram_restore(backed, prefect)
    assert (done.returncode, done.stdout) == (1, "") and "a reader stayed" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(("state", "code"), [("restored", 0), ("failed", 1)])
def test_a_run_killed_in_the_middle_is_told_as_the_sweep_settles_it(backed: World, state: str, code: int) -> None:
    """After its swap it is `restored`, whatever its process says in the end; and nobody knows before the sweep."""
    prefect = Scripted("RUNNING", "CRASHED", message=KILLED)
    error = "the run died; generation 2 is active"
    threads: list[threading.Timer] = []

    def settled_later() -> None:  # well after the run has ended
        threads.append(threading.Timer(3.0, closes(backed, state, error)))
        threads[0].start()

    prefect.before = {0: begins(backed), 1: settled_later}
    done = engram_restore(backed, prefect)
    threads[0].join()
    assert done.returncode == code, done.stderr
    assert "waiting until it is settled" in done.stderr
    if code:
        assert done.stdout == "" and done.stderr.splitlines()[-1] == f"engram: {error}"
    else:
        result = json.loads(done.stdout)
        assert result["outcome"] == "restored" and KILLED in result["note"] and error in result["note"]


def test_a_run_that_ends_before_it_has_a_row_changed_nothing(backed: World) -> None:
    done = engram_restore(backed, Scripted("PENDING", "CRASHED", message="its worker died before it began"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "changed nothing itself: its worker died before it began" in done.stderr.splitlines()[-1]


def test_a_start_whose_answer_is_lost_is_asked_for_again_under_the_same_key(backed: World) -> None:
    """The first may have started the run: a second restore would throw away what was written since the first."""
    prefect = Scripted("RUNNING", "COMPLETED", lost_answers=2)
    prefect.before = {0: begins(backed), 1: closes(backed, "restored", locked_ms=1.0)}
    done = engram_restore(backed, prefect)
    assert done.returncode == 0, done.stderr
    assert len(prefect.keys) == 3 and len(set(prefect.keys)) == 1 and prefect.keys[0]


RUN = Run("the-id", "restore-acme", "http://ui/runs/the-id", "SCHEDULED", "")


def api(url: str) -> PrefectApi:
    return PrefectApi(Settings(prefect_api_url=url))


def test_who_gives_up_says_that_the_run_may_go_on_which_and_how_to_look() -> None:
    def no_row(_: str) -> str | None:
        raise ControlPlaneUnavailable("away, too")

    with serving(Scripted(None)) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(following, "RUN_SECONDS", 0.0)
        follows = Following(api(url), Settings(), no_row, lambda _: True, following.look_at("acme"))
        with pytest.raises(NotKnown, match=r"restore-acme \(the-id\) may still go on.*engram diagnose tenant-db acme"):
            follows.end(RUN)


def test_a_row_that_nobody_closes_is_said_not_to_be_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SWEEP_SECONDS", 0.0)
    with serving(Scripted("CRASHED", message=KILLED)) as url:
        settings = Settings(lease_seconds=0.001)
        follows = Following(api(url), settings, lambda _: "running", lambda _: False, following.look_at("acme"))
        with pytest.raises(NotSettled, match="not settled: its row is still open; `engram diagnose tenant-db acme`"):
            follows.end(RUN)


def test_a_start_that_reached_nobody_started_nothing_and_one_that_may_have_is_not_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prefect_api, "START_SECONDS", 0.0)
    with pytest.raises(Away) as refused:
        api(f"http://127.0.0.1:{free_ports(1)[0]}/api").start("restore/restore", {})
    assert not refused.value.sent
    with serving(Scripted("RUNNING", lost_answers=99)) as url, pytest.raises(NotKnown, match="it may have started"):
        api(url).start("restore/restore", {})


class Clock:
    """An hour passes while nobody answers, otherwise only what is asked for."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds if seconds == prefect_api._POLL_SECONDS else 3600.0


def test_time_without_prefect_is_no_time_in_which_a_worker_could_have_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_api, "time", Clock())
    with serving(Scripted("SCHEDULED", None, 502, "SCHEDULED", "RUNNING", "COMPLETED")) as url:
        seen = [run.state for run in api(url).follow(RUN, pick_up_seconds=60.0, run_seconds=86_400.0)]
        assert seen == ["SCHEDULED", "RUNNING", "COMPLETED"]
    for state, said in (("SCHEDULED", "it stays scheduled"), ("PENDING", "it may yet, or the sweep ends it")):
        with serving(Scripted(state)) as url, pytest.raises(NotPickedUp, match=said):
            list(api(url).follow(RUN, pick_up_seconds=60.0, run_seconds=86_400.0))
