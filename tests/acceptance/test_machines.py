"""Two machines, each with its own data directory and worker: what a tenant needs runs where its file is."""

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shared import queues
from shared.fleet_run import shard_of
from shared.settings import Settings
from shared.spool import Spool
from shared.tenant import TenantPaths
from tests.acceptance.conftest import Stack
from tests.core_fixtures import add_memories, contents_of, event, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(280)]
B = "machine-b"


@pytest.fixture(scope="module")
def other(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Machine B: only a worker, beside the first machine's control plane, Prefect server and object store."""
    (stack.data_dir / "objects").mkdir(exist_ok=True)
    environment = stack.environment | {
        "ENGRAM_DATA_DIR": str(tmp_path_factory.mktemp(B)),
        "ENGRAM_MACHINE_ID": B,
        "ENGRAM_CONTROL_PLANE_URL": stack.rows("SELECT 1") and stack.status["control_plane_url"],
        "ENGRAM_OBJECT_STORE_URL": stack.status["object_store_url"],
        "PREFECT_API_URL": stack.status["prefect_api_url"],
    }
    machine = Stack(environment, stack.status | {"data_dir": environment["ENGRAM_DATA_DIR"]})
    worker = subprocess.Popen([sys.executable, "-m", "deployments.cli", "worker"], env=environment)
    try:
        workers = "work_pools/engram/workers/filter"
        wanted = {f"engram-{B}", queues.urgent(f"engram-{B}")}
        wait_until(lambda: wanted <= {w["name"] for w in stack.prefect("POST", workers, {})}, 60)
        yield machine
    finally:
        worker.terminate()
        worker.wait(30)


def tenant_on(machine: Stack, tenant_id: str) -> TenantPaths:
    machine.create(tenant_id)
    paths = TenantPaths.of(machine.data_dir / "tenants", tenant_id)
    add_memories(paths, "before the backup")
    return paths


def ended(stack: Stack, run_id: str) -> Any:
    for _ in range(300):
        run = stack.prefect("GET", f"flow_runs/{run_id}")
        if run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return run
        time.sleep(0.3)
    raise AssertionError(f"{run_id} has not ended")


def newest(stack: Stack, flow: str, queue: str) -> Any:
    """The newest run of a flow in a machine's queue."""
    body = {"flows": {"name": {"any_": [flow]}}, "work_pool_queues": {"name": {"any_": [queue]}}}
    return stack.prefect("POST", "flow_runs/filter", body | {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]


def test_a_backup_and_a_restore_asked_for_on_one_machine_run_on_the_tenants(stack: Stack, other: Stack) -> None:
    """Machine A has no file of that tenant, and makes none; the command line shows the result all the same."""
    paths = tenant_on(other, "lives-on-b")
    [made] = stack.json("backup", "lives-on-b")
    assert made["error"] is None and made["backup_id"]
    assert contents_of(stack.data_dir / "objects" / made["key"]) == ["before the backup"]
    assert newest(stack, "backup", B)["state_type"] == "COMPLETED"

    add_memories(paths, "after the backup")
    done = stack.json("restore", "lives-on-b")
    assert (done["outcome"], done["backup_id"]) == ("restored", made["backup_id"])
    assert contents_of(paths.database) == ["before the backup"]
    assert newest(stack, "restore", queues.urgent(B))["id"] == done["flow_run_id"]
    assert not (stack.data_dir / "tenants" / "lives-on-b").exists()


def test_a_run_that_starts_on_the_wrong_machine_has_its_twin_run_on_the_right_one(stack: Stack, other: Stack) -> None:
    """The form in the UI knows no queues; what it starts must neither fail nor make a database in the wrong place."""
    paths = tenant_on(other, "formed-on-a")
    assert other.json("backup", "formed-on-a")[0]["error"] is None
    add_memories(paths, "after the backup")
    deployment = stack.prefect("GET", "deployments/name/restore/restore")
    form = {"parameters": {"tenant_id": "formed-on-a"}, "work_queue_name": "local", "state": {"type": "SCHEDULED"}}
    run = ended(stack, stack.prefect("POST", f"deployments/{deployment['id']}/create_flow_run", form)["id"])
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    assert contents_of(paths.database) == ["before the backup"]
    [row] = stack.rows("SELECT flow_run_id, state FROM restores WHERE tenant_id = 'formed-on-a'")
    twin = stack.prefect("GET", f"flow_runs/{row[0]}")
    assert twin["work_queue_name"] == queues.urgent(B) and twin["id"] != run["id"] and row[1] == "restored"
    assert not (stack.data_dir / "tenants" / "formed-on-a").exists()


def test_the_nightly_run_is_one_run_a_machine_and_is_red_when_one_of_them_is(stack: Stack, other: Stack) -> None:
    """Started once, on whichever machine; every machine's tenants are backed up by their own."""
    good, bad = tenant_on(other, "good-on-b"), tenant_on(other, "bad-on-b")
    stack.create("lives-on-a")
    whole = bad.database.resolve().read_bytes()
    bad.database.resolve().write_bytes(b"x" * 8192)
    deployment = stack.prefect("GET", "deployments/name/backup/backup")
    nightly = {"parameters": {"all": True, "kind": "scheduled"}, "work_queue_name": "local"}
    started = stack.prefect(
        "POST", f"deployments/{deployment['id']}/create_flow_run", nightly | {"state": {"type": "SCHEDULED"}}
    )
    run = ended(stack, started["id"])
    assert run["state_type"] == "FAILED" and B in run["state"]["message"] and "bad-on-b" in run["state"]["message"]
    backed = dict(
        stack.rows("SELECT tenant_id, flow_run_id FROM backups WHERE tenant_id IN ('good-on-b', 'lives-on-a')")
    )
    assert backed["lives-on-a"] == run["id"]
    twin = stack.prefect("GET", f"flow_runs/{backed[good.tenant_id]}")
    assert twin["work_queue_name"] == B and twin["state_type"] == "FAILED"
    bars = {"artifacts": {"type": {"any_": ["progress"]}}, "flow_runs": {"id": {"any_": [twin["id"]]}}}
    assert [bar["data"] for bar in stack.prefect("POST", "artifacts/filter", bars)] == [100.0]
    tasks = stack.prefect("POST", "task_runs/filter", {"flow_runs": {"id": {"any_": [twin["id"]]}}})
    assert len(tasks) == 2, "one run and two steps, however many tenants"

    bad.database.resolve().write_bytes(whole)
    again = {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}, "force": True}
    stack.prefect("POST", f"flow_runs/{started['id']}/set_state", again)
    run = ended(stack, started["id"])
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    wanted = "SELECT tenant_id, count(*) FROM backups WHERE tenant_id IN ('bad-on-b', 'good-on-b') GROUP BY 1"
    assert dict(stack.rows(wanted)) == {"bad-on-b": 1, "good-on-b": 1}, "only what had failed, by a new twin"


def test_a_night_in_two_shards_is_a_run_for_each_machine_and_shard(stack: Stack, other: Stack) -> None:
    """Started once; all shards of all machines are done, each tenant in one of them."""
    for machine, prefix in ((stack, "s-a"), (other, "s-b")):
        for name in ("one", "two", "three", "four"):
            tenant_on(machine, f"{prefix}-{name}")
    deployment = stack.prefect("GET", "deployments/name/backup/backup")
    nightly = {"parameters": {"all": True, "kind": "scheduled", "shards": 2}, "work_queue_name": "local"}
    started = stack.prefect(
        "POST", f"deployments/{deployment['id']}/create_flow_run", nightly | {"state": {"type": "SCHEDULED"}}
    )
    run = ended(stack, started["id"])
    assert run["state_type"] == "COMPLETED", run["state"]["message"]
    parts = stack.rows(
        f"SELECT machine_id, shard, failed FROM fleet_runs WHERE run_id = '{started['id']}' ORDER BY 1, 2"
    )
    assert parts == [("local", 0, 0), ("local", 1, 0), (B, 0, 0), (B, 1, 0)]
    made = dict(stack.rows("SELECT tenant_id, flow_run_id FROM backups WHERE starts_with(tenant_id, 's-')"))
    runs: dict[tuple[str, int], set[str]] = {}
    for name, run_id in made.items():
        runs.setdefault((name[:3], shard_of(name, 2)), set()).add(run_id)
    assert len(made) == 8 and len(runs) == 4 and all(len(ids) == 1 for ids in runs.values())
    assert runs["s-a", 0] == {run["id"]} and len(set.union(*runs.values())) == 4


def started(stack: Stack, deployment: str) -> Any:
    """A run as the form in the UI starts it, taken up on machine A."""
    found = stack.prefect("GET", f"deployments/name/{deployment}/{deployment}")
    form = {"parameters": {}, "work_queue_name": "local", "state": {"type": "SCHEDULED"}}
    return ended(stack, stack.prefect("POST", f"deployments/{found['id']}/create_flow_run", form)["id"])


def test_usage_is_brought_in_and_compared_on_every_machine_by_one_run_each(stack: Stack, other: Stack) -> None:
    """A spool and what a gateway counted are on one disk: a run elsewhere would find them in order, being empty."""
    tenant_on(other, "used-on-b")
    producer = Spool(Settings(data_dir=other.data_dir))
    for _ in range(5):
        producer.append(event("used-on-b"))
    producer.close()
    done = started(stack, "metering")
    assert done["state_type"] == "COMPLETED", done["state"]["message"]
    assert stack.rows("SELECT count(*)::int FROM usage_events WHERE tenant_id = 'used-on-b'") == [(5,)]
    assert newest(stack, "metering", B)["state_type"] == "COMPLETED"
    agreed = started(stack, "reconcile")
    assert agreed["state_type"] == "COMPLETED", agreed["state"]["message"]
    for _ in range(3):
        producer.append(event("used-on-b"))
    producer.close()
    [lost] = (other.data_dir / "spool").glob("*.seg")
    lost.unlink()
    red = started(stack, "reconcile")
    assert red["state_type"] == "FAILED" and B in red["state"]["message"]
    assert "the gateway counted 8 events of used-on-b, its segments hold 5" in red["state"]["message"]


def test_a_tenant_is_moved_from_one_machine_to_another_as_one_visible_operation(stack: Stack, other: Stack) -> None:
    """From the command line: two runs on two machines, the first of which ends when the second serves."""
    paths = tenant_on(stack, "leaves-a")
    there = TenantPaths.of(other.data_dir / "tenants", "leaves-a")
    plan = stack.json("move", "leaves-a", B, "--dry-run")
    assert (plan["source"], plan["target"], plan["memories"]) == ("local", B, 1) and not there.root.exists()
    moved = stack.json("move", "leaves-a", B, "--reason", "a test")
    assert (moved["outcome"], moved["target"], moved["memories"]) == ("moved", B, 1)
    assert contents_of(there.database) == ["before the backup"] and not paths.database.exists()
    assert stack.rows("SELECT machine_id FROM tenants WHERE tenant_id = 'leaves-a'") == [(B,)]
    twin = newest(stack, "move-arrive", queues.queue(B, "move-arrive"))
    assert twin["state_type"] == "COMPLETED"
    shown = {"flow_runs": {"id": {"any_": [moved["flow_run_id"]]}}, "artifacts": {"type": {"any_": ["markdown"]}}}
    [report] = stack.prefect("POST", "artifacts/filter", shown)
    assert "writes were held for" in report["data"] and f"| to machine | {B} |" in report["data"]
    refused = stack.engram("move", "leaves-a", B, check=False)
    assert refused.returncode == 3 and "already" in refused.stderr
