"""Prefect as production runs it: who may ask, what replicas tell each other, what waits for what, what is kept, and
what becomes of what was missed."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import httpx
import psutil
import pytest
import redis
import yaml
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings
from pydantic import SecretStr

from deployments import flow_process, orchestration
from deployments.bridge import Alert, event_of, to_prefect
from deployments.prefect_api import PrefectApi
from deployments.process import Child
from flows import missed as missed_runs
from flows import sweep as sweep_flow
from shared import queues
from shared.errors import Permanent, Transient
from shared.settings import Settings
from tests.prefect_fixtures import MACHINE, READY_SECONDS, ROOT, WORKER_LIMIT, Production, deploy_busy, wait_for
from tests.prefect_proxies import refusing

pytest_plugins = ("tests.prefect_fixtures",)
pytestmark = [pytest.mark.slow, pytest.mark.timeout(580)]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]


def test_the_queues_of_the_file_are_those_of_the_code() -> None:
    """A restore that the file puts beside the backups would wait behind them; nothing else would say so."""
    named = {d["name"]: d["work_pool"].get("work_queue_name", queues.SHARED) for d in DEPLOYMENTS}
    assert {name: queue for name, queue in named.items() if queue != queues.SHARED} == queues.URGENT
    limited = {d["name"]: d["concurrency_limit"]["limit"] for d in DEPLOYMENTS if "concurrency_limit" in d}
    upkeep = [name for name, queue in queues.URGENT.items() if queue == queues.UPKEEP]
    assert sum(limited[name] for name in upkeep) < Settings().prefect_urgent_limit, "a place is left for a restore"


@pytest.mark.parametrize(
    ("url", "known"), [("http://prefect.internal:4200/api", 1), ("https://prefect.test/api", None)]
)
def test_only_where_no_tls_is_spoken_a_client_knows_no_real_authority(url: str, known: int | None) -> None:
    """Reading them all is a third of what applying the deployments takes; over TLS nobody could be trusted without."""
    file = orchestration.client_environment(Settings(prefect_api_url=url)).get("PREFECT_API_SSL_CERT_FILE")
    assert (file and len(ssl.create_default_context(cafile=file).get_ca_certs())) == known


class Places(NamedTuple):
    """The runs that hold all places until `file` is gone, and the one that waits for one."""

    file: Path
    held: list[str]
    waiting: str


def alert(name: str) -> dict[str, object]:
    labels = {"alertname": name, "diagnosis": "metering"}
    return event_of(Alert("firing", labels, datetime(2026, 1, 1, tzinfo=UTC), name.encode().hex()))


async def pass_on(production: Production, replica: int, auth: str, *events: dict[str, object]) -> None:
    settings = production.settings(replica, prefect_api_auth_string=SecretStr(auth))
    async with httpx.AsyncClient() as client:
        await to_prefect(settings, client)(events)


def test_without_the_credential_nobody_is_answered_and_each_client_of_ours_has_it(production: Production) -> None:
    """Whoever may ask can start restores. Every replica asks, our clients answer, none tells the credential."""
    for replica in (0, 1):
        for given in ({}, {"authorization": "Basic " + base64.b64encode(b"engram:guessed").decode()}):
            for method, path in (("POST", "deployments/filter"), ("GET", "admin/version"), ("POST", "events")):
                answer = httpx.request(method, f"{production.api(replica)}/{path}", headers=given)
                assert answer.status_code == 401, path
        assert orchestration.http_ok(f"{production.api(replica)}/health"), "a platform's probe has no credential"
    stranger = production.settings(prefect_api_auth_string=SecretStr(""))
    with pytest.raises(Permanent, match="PREFECT_API_AUTH_STRING"):
        PrefectApi(stranger).newest_run_url("restore")
    assert not orchestration.ensure_queues(stranger)
    with pytest.raises(Transient, match="401"):
        asyncio.run(pass_on(production, 0, "engram:guessed", alert("Stranger")))

    assert PrefectApi(production.settings()).newest_run_url("restore") == ""
    assert orchestration.ensure_queues(production.settings()) and orchestration.ensure_queues(production.settings())
    secret = production.auth.partition(":")[2]
    argv = [" ".join(psutil.Process(child.pid).cmdline()) for child in production.children.values() if child.alive()]
    logs = [file.read_text(errors="replace") for file in production.directory.glob("*.log")]
    assert len(argv) >= 3 and len(logs) >= 4
    assert not [text for text in argv + logs if secret in text]


def test_what_one_replica_is_told_starts_a_run_that_the_other_shows(production: Production) -> None:
    """Events go through Redis to the services, which neither replica runs; each alert starts one run, however often it
    comes and through whichever replica."""
    event = alert("ToldToTheSecond")
    asyncio.run(pass_on(production, 1, production.auth, event))
    asyncio.run(pass_on(production, 0, production.auth, event))

    def diagnoses() -> list[str]:
        body = {"flows": {"name": {"any_": ["diagnose"]}}}
        found = production.call("POST", "flow_runs/filter", body, replica=0)
        return [run["work_queue_name"] for run in found if run["parameters"]["alert"] == "ToldToTheSecond"]

    wait_for(diagnoses)
    asyncio.run(pass_on(production, 0, production.auth, event, alert("Another")))
    wait_for(lambda: len(production.runs(flows={"name": {"any_": ["diagnose"]}})) == 2)
    assert diagnoses() == [queues.UPKEEP]
    for run in production.runs(flows={"name": {"any_": ["diagnose"]}}):
        production.call("DELETE", f"flow_runs/{run['id']}")  # nothing below needs them to run


def scheduled(production: Production, *flows: str) -> set[str]:
    """Ids of the runs that are yet to come, of these flows or of all."""
    of = {"flows": {"name": {"any_": list(flows)}}} if flows else {}
    return {run["id"] for run in production.runs(flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}}, **of)}


# A state has its own copy of the time, which a run waits for.
_MOVED = """
WITH moved AS (
    UPDATE flow_run SET expected_start_time = %(at)s, next_scheduled_start_time = %(at)s WHERE id = %(id)s
    RETURNING state_id
)
UPDATE flow_run_state s
SET state_details = jsonb_set(s.state_details::jsonb, '{scheduled_time}', to_jsonb(%(at)s::timestamptz))
FROM moved WHERE s.id = moved.state_id
"""


def make_late(production: Production, flow: str, keep: int) -> list[str]:
    """The first `keep` runs of a schedule as they are after an outage: due long ago, an hour apart. Oldest first."""
    found: list[dict[str, object]] = []

    def scheduled_runs() -> bool:
        found[:] = production.runs(
            flows={"name": {"any_": [flow]}},
            flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}},
            sort="EXPECTED_START_TIME_ASC",
        )
        return sum(bool(run["auto_scheduled"]) for run in found) >= keep

    wait_for(scheduled_runs)
    ids = [run["id"] for run in found if run["auto_scheduled"]][:keep]
    assert len(ids) == keep
    due = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=keep)
    at = {run_id: due + timedelta(hours=n) for n, run_id in enumerate(ids)}
    for run in found:  # the others must not come due while a test runs
        production.rows(_MOVED, at=at.get(run["id"], due + timedelta(days=30)), id=run["id"])
    return ids


def test_schedules_outlive_the_whole_server(production: Production) -> None:
    """They are in PostgreSQL: what was scheduled stays, and a server that comes back goes on making runs."""
    before, schedules = scheduled(production), active_schedules(production)
    assert {"backup", "restore-test", "slo-report"} <= schedules.keys()
    gone = make_late(production, "slo-report", 3)
    names = ("services", "api-0", "api-1")
    for child in [production.children[name] for name in names]:
        os.kill(child.pid, signal.SIGKILL)
        child.stop(5.0)
    assert not orchestration.http_ok(f"{production.api()}/health")
    servers = (production.services(), production.replica(0), production.replica(1))
    for server in servers:
        server.start()
    for server in servers:
        server.wait_ready(READY_SECONDS)
    for run_id in gone:
        production.call("DELETE", f"flow_runs/{run_id}")

    wait_for(lambda: len(scheduled(production, "slo-report") - before) >= 3)
    assert before - set(gone) <= scheduled(production)
    assert active_schedules(production) == schedules


def active_schedules(production: Production) -> dict[str, list[str]]:
    """{deployment: ids of its schedules that make runs}"""
    found = production.call("POST", "deployments/filter", {})
    kept = {d["name"]: sorted(s["id"] for s in d["schedules"] if s["active"]) for d in found}
    return {name: ids for name, ids in kept.items() if ids}


def test_a_missed_run_that_cannot_be_cancelled_is_nobodys_end(
    production: Production,
) -> None:
    """Both workers would end with it, restores too. The others are cancelled; that one looks for itself."""
    first, second, newest = make_late(production, "verify", 3)
    with refusing(production.api(), f"/flow_runs/{first}/set_state") as url:
        auth = {PREFECT_API_AUTH_STRING: production.auth}
        with temporary_settings({PREFECT_API_URL: url, **auth}):
            assert asyncio.run(missed_runs.settle()) == 1
        with temporary_settings({PREFECT_API_URL: url.replace("/api", "/nothing"), **auth}):
            assert asyncio.run(missed_runs.settle()) == 0
    assert [production.state(run) for run in (first, second, newest)] == ["SCHEDULED", "CANCELLED", "SCHEDULED"]
    for run_id in (first, second, newest):
        production.call("DELETE", f"flow_runs/{run_id}")


def test_what_was_missed_without_a_worker_is_run_once(production: Production, missed: list[str], worker: Child) -> None:
    """Three nights without a worker are one backup when it comes back, not three at the same time; each of the others
    says which run stands for it."""
    *older, newest = missed
    for run_id in older:
        run = production.call("GET", f"flow_runs/{run_id}")
        assert run["state_type"] == "CANCELLED" and run["state"]["message"].startswith("missed; the run due "), run
        assert run["run_count"] == 0, "no process was started for it"
    wait_for(lambda: production.state(newest) in ENDED)
    assert production.state(newest) == "COMPLETED"
    assert "runs_missed" in (production.directory / "worker.log").read_text()


@pytest.fixture(scope="module")
def missed(production: Production) -> list[str]:
    """Runs that are late before the worker starts."""
    return make_late(production, "backup", 3)


def test_what_was_missed_under_a_worker_that_stayed_is_run_once(production: Production, worker: Child) -> None:
    """The server was away and comes back: the worker takes all that is due at once, so each run looks for itself."""
    older, newest = make_late(production, "restore-test", 2)
    wait_for(lambda: {production.state(older), production.state(newest)} <= ENDED)
    assert production.call("GET", f"flow_runs/{older}")["state"]["message"].startswith("missed; the run due ")
    assert production.state(newest) == "FAILED", "it did its work: there is no backup to test"


def test_a_run_that_a_worker_took_up_and_nobody_began_is_settled(
    production: Production, worker: Child, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker died between the two: nobody has it, and no pid says so. Who asked for a run hears of it; one of a
    schedule is done after all. Neither happens to a run that is about to begin, or that has a process."""
    pending = {"state": {"type": "PENDING", "name": "Pending"}}
    asked, begun = (production.start_run("restore/restore", {"tenant_id": "nobody"}, **pending) for _ in range(2))
    due = production.start_run("slo-report/slo-report", {}, **pending)
    production.call("PATCH", f"flow_runs/{begun}", {"infrastructure_pid": "elsewhere:1"})
    production.rows("UPDATE flow_run SET auto_scheduled = true, expected_start_time = now() WHERE id = %s", due)

    def swept(pick_up_seconds: float) -> set[str]:
        settings = production.settings(prefect_pick_up_seconds=pick_up_seconds)
        monkeypatch.setattr(sweep_flow, "configuration", lambda: settings)
        with temporary_settings({PREFECT_API_URL: production.api(), PREFECT_API_AUTH_STRING: production.auth}):
            return {one.done for one in sweep_flow.runs.fn([])}

    assert swept(600.0) == set()
    assert {production.state(run_id) for run_id in (asked, begun, due)} == {"PENDING"}
    assert swept(0.001) == {"marked Crashed", "marked Scheduled"}
    assert (production.state(asked), production.state(begun)) == ("CRASHED", "PENDING")
    assert "ended before it began; nothing was done" in production.call("GET", f"flow_runs/{asked}")["state"]["message"]
    wait_for(lambda: production.state(due) in ENDED)
    assert production.call("GET", f"flow_runs/{due}")["run_count"] == 1
    production.call("DELETE", f"flow_runs/{begun}")


def test_a_process_that_comes_after_its_run_was_given_up_leaves_it(production: Production, tmp_path: Path) -> None:
    """A worker that stood still goes on: somebody was told long ago that this restore had died."""
    run_id = production.start_run(deploy_busy(production), {"file": str(tmp_path / "none")}, state={"type": "PENDING"})
    production.call("POST", f"flow_runs/{run_id}/set_state", {"state": {"type": "CRASHED"}, "force": True})
    late = [sys.executable, "-m", "deployments.flow_process"]
    environment = production.environment() | {"PREFECT__FLOW_RUN_ID": run_id}
    done = subprocess.run(late, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    found = production.call("GET", f"flow_runs/{run_id}")
    assert (found["state_type"], found["run_count"]) == ("CRASHED", 0)


def test_a_run_is_one_process_of_its_own_that_can_be_cancelled(
    production: Production, worker: Child, tmp_path: Path
) -> None:
    """The worker's own Python, whatever its PATH says, and no second one before it; out of reach of signals to the
    worker's group, but not of the button in the UI."""
    file = tmp_path / "busy"
    file.touch()
    run_id = production.start_run(deploy_busy(production), {"file": str(file)})
    wait_for(lambda: production.state(run_id) == "RUNNING")
    [run] = [p for p in psutil.Process(worker.pid).children() if p.environ().get("PREFECT__FLOW_RUN_ID") == run_id]
    assert run.cmdline()[1:] == ["-m", "deployments.flow_process", "--yielding"] and run.children() == []
    assert run.nice() == flow_process.NICE
    assert Path(run.exe()).samefile(sys.executable)
    assert os.getsid(run.pid) == os.getpgid(run.pid) == run.pid

    cancelling = {"state": {"type": "CANCELLING", "name": "Cancelling"}}
    assert production.call("POST", f"flow_runs/{run_id}/set_state", cancelling)["status"] == "ACCEPT"
    wait_for(lambda: production.state(run_id) in ENDED)
    assert production.state(run_id) == "CANCELLED"
    assert not psutil.pid_exists(run.pid) or run.status() == psutil.STATUS_ZOMBIE


def test_queues_have_the_priorities_of_their_table(production: Production, worker: Child) -> None:
    """As the server has them, with a second machine too: a free place goes to what waits for nobody else first."""
    assert orchestration.ensure_queues(production.settings(machine_id="there"))
    found = production.call("POST", "work_pools/engram/queues/filter", {})
    by_priority = [queue["name"] for queue in sorted(found, key=lambda queue: queue["priority"])]
    assert len({queue["priority"] for queue in found}) == len(found)
    assert set(by_priority[:2]) == {queues.urgent(MACHINE), queues.urgent("there")}
    assert by_priority[2:] == [queues.SHARED_URGENT, queues.UPKEEP, queues.SHARED, MACHINE, "there"]


@pytest.mark.parametrize("name", ["verify", "diagnose"])
def test_a_run_beyond_the_limit_of_its_deployment_waits_or_is_cancelled(
    production: Production, worker: Child, name: str
) -> None:
    """By what prefect.yaml says: a second nightly reading is dropped, a third alert's diagnosis waits its turn."""
    [wanted] = [d["concurrency_limit"] for d in DEPLOYMENTS if d["name"] == name]
    deployed = production.call("GET", f"deployments/name/{name}/{name}")
    assert deployed["global_concurrency_limit"]["limit"] == wanted["limit"]
    assert deployed["concurrency_options"]["collision_strategy"] == wanted["collision_strategy"]
    taken = {"names": [deployed["global_concurrency_limit"]["name"]], "slots": wanted["limit"]}
    production.call("POST", "v2/concurrency_limits/increment", taken | {"mode": "concurrency"})
    run_id = production.start_run(f"{name}/{name}", {"subject": "metering"} if name == "diagnose" else {})

    def state() -> tuple[str, str]:
        found = production.call("GET", f"flow_runs/{run_id}")["state"]
        return found["type"], found["name"]

    if wanted["collision_strategy"] == "CANCEL_NEW":
        wait_for(lambda: state()[0] == "CANCELLED")
    else:
        wait_for(lambda: state() == ("SCHEDULED", "AwaitingConcurrencySlot"))
    production.call("POST", "v2/concurrency_limits/decrement", taken)
    if wanted["collision_strategy"] == "ENQUEUE":
        wait_for(lambda: state()[0] in ENDED - {"CANCELLED"})


@pytest.fixture(scope="module")
def places(production: Production, worker: Child, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Places]:
    """Runs that hold every place of the ordinary worker, and one more that waits."""
    file, deployment = tmp_path_factory.mktemp("places") / "busy", deploy_busy(production)
    file.touch()
    held = [production.start_run(deployment, {"file": str(file)}) for _ in range(WORKER_LIMIT)]
    wait_for(lambda: [production.state(run_id) for run_id in held] == ["RUNNING"] * WORKER_LIMIT)
    yield Places(file, held, production.start_run(deployment, {"file": str(file)}, work_queue_name=MACHINE))
    file.unlink(missing_ok=True)


def test_a_restore_never_waits_behind_backups(production: Production, places: Places) -> None:
    """A worker's limit counts over all of its queues: the machine's own queue gets no place either while the shared one
    has them all. A restore has a worker of its own, whether a form started it or the command line."""
    form = production.start_run("restore/restore", {"tenant_id": "nobody"})
    command = PrefectApi(production.settings()).start("restore/restore", {"tenant_id": "no-one"}, machine_id=MACHINE)
    wait_for(lambda: {production.state(form), production.state(command.id)} == {"FAILED"})
    queue = production.call("GET", f"flow_runs/{command.id}")["work_queue_name"]
    assert queue == queues.urgent(MACHINE)
    assert [production.state(run_id) for run_id in places.held] == ["RUNNING"] * WORKER_LIMIT
    assert production.state(places.waiting) == "SCHEDULED"


def test_a_start_whose_answer_is_lost_starts_one_run(production: Production) -> None:
    """Asked again under the same key, Prefect gives back the run that it has made."""
    lost: list[httpx.Response] = []

    def lose_the_first(answer: httpx.Response) -> None:
        if answer.request.url.path.endswith("/create_flow_run") and not lost:
            lost.append(answer)
            raise httpx.ReadError("the connection was reset")

    api, said = PrefectApi(production.settings()), list[str]()
    api._http.event_hooks["response"].append(lose_the_first)
    found = api.start("restore/restore", {"tenant_id": "asked-twice"}, machine_id="nowhere", say=said.append)
    waiting = production.runs(flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}}, limit=200)
    assert [run["id"] for run in waiting if run["parameters"].get("tenant_id") == "asked-twice"] == [found.id]
    assert len(lost) == len(said) == 1
    assert api.start("restore/restore", {"tenant_id": "asked-twice"}, machine_id="nowhere").id != found.id


def test_runs_go_on_when_a_replica_is_killed(production: Production, places: Places, worker: Child) -> None:
    """Worker and runs were talking to the one that dies; the other knows what it knew. Those that run end as they
    should, and what waited is taken up."""
    os.kill(production.children["api-0"].pid, signal.SIGKILL)
    wait_for(lambda: orchestration.http_ok(f"{production.api()}/health"))
    places.file.unlink()
    wait_for(lambda: {production.state(run_id) for run_id in (*places.held, places.waiting)} == {"COMPLETED"})
    assert worker.alive() and not production.children["api-0"].alive()


def test_ended_runs_go_after_their_time_with_all_that_hangs_on_them(production: Production, worker: Child) -> None:
    """Otherwise the database grows for ever: runs, their tasks, states, logs and artifacts. What is younger, or has not
    ended, stays."""
    days = production.settings().prefect_retention_days
    # Those that began first: the last lines of a run that has just ended may come after its rows went, and such lines
    # go with the daily pass only.
    ended = production.runs(flow_runs={"state": {"type": {"any_": ["COMPLETED", "FAILED"]}}}, sort="START_TIME_ASC")
    old, young = (run["id"] for run in ended[:2])
    assert counts(production, old)["log"] > 0
    age = "UPDATE flow_run SET end_time = now() - make_interval(days => %s) + make_interval(hours => %s) WHERE id = %s"
    production.rows(age, days, 1, young)
    production.rows(age, days, -1, old)
    # A pass that the services were killed in, above, is taken up again five minutes later: docket's redelivery_timeout.
    wait_for(lambda: not any(counts(production, old).values()), 400.0)
    assert counts(production, young)["flow_run"] == 1
    assert production.rows("SELECT count(*) FROM flow_run WHERE state_type = 'SCHEDULED'")[0][0] > 0


def counts(production: Production, run_id: str) -> dict[str, int]:
    """Rows of a run, by table."""
    where = dict.fromkeys(("task_run", "flow_run_state", "log", "artifact"), "flow_run_id") | {"flow_run": "id"}
    return {
        table: production.rows(f"SELECT count(*) FROM {table} WHERE {column} = %s", run_id)[0][0]
        for table, column in where.items()
    }


def test_everything_that_the_server_keeps_in_redis_is_in_ours(production: Production) -> None:
    """Each part has a setting of its own for where that is; one without asks this machine, and fails each minute."""
    with redis.Redis.from_url(production.redis_url) as ours:
        wait_for(lambda: any(b"worker-cleanup" in command["command"] for command in ours.slowlog_get(1_000_000)))
    logs = {file.name: file.read_text(errors="replace") for file in production.directory.glob("*.log")}
    assert [name for name, text in logs.items() if "localhost:6379" in text] == []
