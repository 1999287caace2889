"""The main job on the real stack, and what an operator sees of it in Prefect."""

import itertools
import json
import sqlite3
import time
from pathlib import Path

import pytest

from tests.acceptance.conftest import Stack

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_the_demo_holds_on_conversations_of_ones_own(stack: Stack, tmp_path: Path) -> None:
    """The main job, end to end: every row of its table is checked from outside, and one that does not hold fails.

    The README's first command is the same on the corpus that is built in (`tests/test_readme.py`).
    """
    plants = ("radish", "lettuce", "fennel", "chard", "leek", "parsnip", "quince", "medlar")
    lines = [{"content": f"sowed {plant} in the garden", "tags": ["garden"]} for plant in plants]
    (tmp_path / "garden.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = stack.engram("demo", "--memories", str(tmp_path / "garden.jsonl"), "--json", check=False)
    result = json.loads(done.stdout)
    assert [row for row in result["checks"] if not row["holds"]] == []
    assert result["ok"] and done.returncode == 0
    assert len(result["checks"]) > 15


def test_the_resident_drain_measures_what_a_tenant_keeps(stack: Stack) -> None:
    """Storage is billed and limited by a gauge that nobody asks for: it has to appear by itself."""
    stack.tenant("measured").post("/v1/memories", json={"content": "some bytes"}).raise_for_status()
    deadline = time.monotonic() + 120
    statement = "SELECT storage_bytes FROM usage_daily WHERE tenant_id = 'measured' AND storage_bytes IS NOT NULL"
    while not (rows := stack.rows(statement)):
        assert time.monotonic() < deadline, "no measurement"
        time.sleep(1)
    assert rows[0][0] > 4096


def test_a_scheduled_run_starts_by_itself(stack: Stack) -> None:
    """Some versions of Prefect's dependencies leave a healthy-looking server that never schedules anything."""
    stack.tenant("scheduled").post("/v1/memories", json={"content": "backed up by the clock"}).raise_for_status()
    deployment = stack.prefect("GET", "deployments/name/backup/backup")
    [nightly] = deployment["schedules"]
    assert nightly["active"] and nightly["schedule"]["cron"] == "0 2 * * *"
    parameters = {"all": True, "kind": "scheduled"}
    every = {"schedule": {"interval": 15.0}, "active": True, "parameters": parameters}
    [added] = stack.prefect("POST", f"deployments/{deployment['id']}/schedules", [every])  # type: ignore[arg-type]
    try:
        deadline = time.monotonic() + 180
        while not (rows := stack.rows("SELECT flow_run_id, kind FROM backups WHERE tenant_id = 'scheduled'")):
            assert time.monotonic() < deadline, "no scheduled backup ran"
            time.sleep(1)
    finally:
        stack.prefect("DELETE", f"deployments/{deployment['id']}/schedules/{added['id']}")
    run = stack.prefect("GET", f"flow_runs/{rows[0][0]}")
    assert run["auto_scheduled"] is True
    assert rows[0][1] == "scheduled"


def test_a_restore_through_the_deployment_is_a_connected_graph_with_an_artifact(stack: Stack) -> None:
    """At 3 a.m. the page of the run must show the steps in their order and say what happened."""
    client = stack.tenant("graphed")
    made = client.post("/v1/memories", json={"content": "the one to bring back"}).json()
    [backup] = stack.json("backup", "graphed")
    assert backup["error"] is None
    client.delete(f"/v1/memories/{made['id']}").raise_for_status()

    # By its id: the schedule of the test before may have had one more run, which found the memory gone.
    plan = stack.json("restore", "graphed", "--dry-run", "--backup", backup["backup_id"])
    assert (plan["backup_memories"], plan["live_memories"]) == (1, 0)
    result = stack.json("restore", "graphed", "--backup", backup["backup_id"])

    assert result["outcome"] == "restored" and result["backup_id"] == backup["backup_id"]
    assert client.get(f"/v1/memories/{made['id']}").json() == made
    with sqlite3.connect(f"file:{result['previous']}?mode=ro", uri=True) as previous:
        assert previous.execute("SELECT count(*) FROM memories").fetchone() == (0,)

    nodes = dict(stack.prefect("GET", f"flow_runs/{result['flow_run_id']}/graph-v2")["nodes"])
    label = {key: node["label"].rpartition("-")[0] for key, node in nodes.items()}
    parents = {label[key]: {label[p["id"]] for p in node["parents"]} for key, node in nodes.items()}
    steps = ["plan", "download", "safety-backup", "lock", "swap", "verify", "release"]
    assert list(parents) == steps
    assert all(before in parents[after] for before, after in itertools.pairwise(steps))

    [artifact] = stack.prefect(
        "POST",
        "artifacts/filter",
        {"artifacts": {"flow_run_id": {"any_": [result["flow_run_id"]]}, "type": {"any_": ["markdown"]}}},
    )
    assert "writes were held for" in artifact["data"] and backup["sha256"] in artifact["data"]


def test_the_restore_form_is_typed_and_described(stack: Stack) -> None:
    """The form in the UI is made from this schema: a field without a description is a guess at 3 a.m."""
    schema = stack.prefect("GET", "deployments/name/restore/restore")["parameter_openapi_schema"]
    fields = schema["properties"]
    in_order = sorted(fields, key=lambda name: fields[name]["position"])
    assert in_order == ["tenant_id", "backup_id", "at", "dry_run", "with_safety_backup", "reason", "requested_by"]
    assert all(field.get("description") for field in fields.values())
    assert schema["required"] == ["tenant_id"]
    assert fields["dry_run"]["type"] == "boolean"
    assert {"format": "uuid", "type": "string"}.items() <= fields["backup_id"]["anyOf"][0].items()
    assert fields["at"]["anyOf"][0]["format"] == "date-time"


def test_a_restore_that_cannot_be_is_refused_with_one_line(stack: Stack) -> None:
    """A wrong id, an unknown tenant or two choices at once: exit code 1 or 2, one line, nothing started."""
    stack.tenant("unbacked")
    for words in (
        ("restore", "unbacked"),
        ("restore", "no-such-tenant"),
        ("restore", "unbacked", "--backup", "not-an-id"),
        ("restore", "../escape"),
        ("backup", "no-such-tenant"),
    ):
        done = stack.engram(*words, check=False)
        assert done.returncode == 1, words
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert stack.rows("SELECT count(*) FROM restores WHERE tenant_id = 'unbacked'") == [(0,)]
