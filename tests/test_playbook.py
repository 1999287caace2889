"""The playbook's core: who may do what, the book of actions, and what the looking actions see."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args
from uuid import UUID

import pytest

from flows.act import Name
from shared import limits
from shared.control_plane import ControlPlane
from shared.counters import Route
from shared.errors import ControlPlaneUnavailable, Permanent, Refused, UnknownTenant
from shared.playbook import audit, autonomy, busiest, volume
from shared.playbook.action import BadRequest, Kind, Request, RequestedBy
from shared.playbook.autonomy import Caps
from shared.playbook.perform import perform
from shared.playbook.table import ACTIONS
from shared.playbook.volume import Volume
from shared.settings import Settings
from shared.workers import Busy
from tests.disk_fixtures import file_system
from tests.gateway_stack import Stack, eventually, new_key, stack  # noqa: F401
from tests.playbook_fixtures import ask, newest, settings  # noqa: F401

PERSON, ALONE = "person", "automation"


@pytest.mark.parametrize(
    ("kind", "requested_by", "dry_run", "enabled", "in_last_hour", "may"),
    [
        ("read", PERSON, False, False, 99, True),
        ("reversible", PERSON, False, False, 99, True),
        ("destructive", PERSON, False, False, 99, True),
        ("read", ALONE, False, True, 0, True),
        ("read", ALONE, False, False, 99, True),
        ("reversible", ALONE, False, True, 0, True),
        ("reversible", ALONE, False, True, 2, True),
        ("reversible", ALONE, False, True, 3, False),
        ("reversible", ALONE, False, True, 99, False),
        ("reversible", ALONE, False, False, 0, False),
        ("reversible", ALONE, True, False, 99, True),
        ("destructive", ALONE, False, True, 0, False),
        ("destructive", ALONE, True, True, 0, False),
    ],
)
def test_who_may_do_what_without_a_person(
    kind: Kind, requested_by: RequestedBy, dry_run: bool, enabled: bool, in_last_hour: int, may: bool
) -> None:
    """The whole rule, with a cap of three an hour."""
    caps = Caps(enabled, 3)
    refused = autonomy.refusal(kind, requested_by, dry_run=dry_run, caps=caps, in_last_hour=in_last_hour)
    assert (refused is None) is may


def test_no_action_of_the_playbook_replaces_data() -> None:
    """A restore has one door, and it is not this one."""
    assert {action.kind for action in ACTIONS.values()} == {"read", "reversible"}


def test_the_cap_counts_what_was_done_and_not_what_was_refused_or_tried(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
) -> None:
    """Over the book, so over every machine and door; the refusal is in the book too."""

    def alone(cap: int, **how: Any) -> None:
        capped = settings.model_copy(update={"automation_actions_per_hour": cap})
        ask(stack, capped, "clear-limit", limit="shed", requested_by=ALONE, **how)

    counted = stack.control_plane.rows("actions_by_themselves")[0]["actions"]
    alone(counted + 1)
    alone(counted + 1, dry_run=True)
    for _ in range(2):
        with pytest.raises(Refused, match="within the last hour"):
            alone(counted + 1)
    row = newest(stack)
    assert (row["state"], row["requested_by"], row["finished_at"] is not None) == ("refused", ALONE, True)
    alone(counted + 2)
    off = settings.model_copy(update={"automation": False})
    with pytest.raises(Refused, match="switched off"):
        ask(stack, off, "clear-limit", limit="shed", requested_by=ALONE)
    assert ask(stack, off, "volume-health", requested_by=ALONE).kind == "read"


def test_nothing_is_done_without_a_person_when_the_cap_cannot_be_counted(tmp_path: Path) -> None:
    """Without PostgreSQL an automation waits; a person need not (`tests/test_act.py`)."""
    away = Settings(
        data_dir=tmp_path,
        control_plane_url="postgresql://127.0.0.1:1/x",  # type: ignore[arg-type]
        control_plane_connect_timeout_seconds=0.3,
    )
    request = Request("shed", reason="r", requested_by="automation")
    with ControlPlane(away) as control_plane, pytest.raises(ControlPlaneUnavailable):
        perform(away, control_plane, request)
    assert limits.active(away) == {}


@pytest.mark.parametrize(
    "request_",
    [
        Request("dance", reason="r"),
        Request("shed"),
        Request("shed", reason=" "),
        Request("shed", reason="x" * 501),
        Request("shed", reason="r", arguments={"classes": ["everything"]}),
        Request("shed", reason="r", arguments={"class": ["search"]}),
        Request("shed", reason="r", tenant_id="acme"),
        Request("shed", reason="r", ttl_seconds=0),
        Request("refresh-jwks", reason="r", ttl_seconds=60),
        Request("restart-tenant", reason="r"),
        Request("restart-tenant", reason="r", tenant_id="../x"),
        Request("shed", reason="of a terminal \udce4"),
        Request("shed", reason="a\0b"),
        Request("set-limit", reason="r", arguments={"limit": "shed", "value": ["\0"]}),
        Request("explain-token", door="prefect"),
        Request("explain-token"),
        Request("set-limit", reason="r", door="api", arguments={"limit": "shed", "value": ["get"]}),
    ],
    ids=lambda request: request.action,
)
def test_nonsense_is_refused_before_anything_is_touched(tmp_path: Path, request_: Request) -> None:
    """No row, no file: there is nothing to be remembered."""
    empty = Settings(data_dir=tmp_path)
    with pytest.raises(BadRequest):
        perform(empty, None, request_)
    assert list(tmp_path.iterdir()) == []


def test_a_death_in_the_middle_leaves_a_row_that_says_so(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """Killed between the effect and the end of its row: begun, never ended, and nobody claims to know."""
    code = f"""
import os, signal
from flows.act import Name
from shared import limits
from shared.control_plane import ControlPlane
from shared.playbook import limit
from shared.playbook.action import Request
from shared.playbook.perform import perform
from shared.settings import Settings
put = limits.put
def put_and_die(*a):
    put(*a)
    os.kill(os.getpid(), signal.SIGKILL)
limits.put = put_and_die
settings = Settings(data_dir={str(settings.data_dir)!r}, control_plane_url={stack.control_plane_url!r})
with ControlPlane(settings) as control_plane:
    perform(settings, control_plane, Request("shed", reason="dies", who="pytest", ttl_seconds=60))
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    assert limits.active(settings).keys() == {"shed"}, "the effect is there"
    row = newest(stack)
    assert (row["action"], row["state"], row["reason"], row["interrupted"]) == ("shed", "begun", "dies", False)
    with stack.control_plane.transaction() as connection:
        connection.execute("UPDATE actions SET begun_at = begun_at - interval '1 hour' WHERE reason = 'dies'")
    history = audit.history(stack.control_plane, action="shed", limit=1_000)  # an hour old now: others are newer
    assert next(r for r in history if r["reason"] == "dies")["interrupted"]


def test_a_failed_action_is_in_the_book_with_its_cause(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """So is one for a tenant that does not exist, and one for a tenant of another machine."""
    with pytest.raises(UnknownTenant):
        ask(stack, settings, "restart-tenant", "nobody-has-this")
    row = newest(stack)
    assert (row["state"], row["tenant_id"]) == ("refused", "nobody-has-this") and "no tenant" in row["error"]
    elsewhere = settings.model_copy(update={"machine_id": "another"})
    with pytest.raises(Refused, match="on machine local"):
        ask(stack, elsewhere, "restart-tenant", stack.idle_tenant)
    broken = settings.model_copy(update={"jwks_url": "http://127.0.0.1:1/"})
    assert ask(stack, broken, "jwks-status").findings[0].ok is False
    undamaged = limits.path_of(settings).read_bytes() if limits.path_of(settings).exists() else b'{"entries":{}}'
    limits.path_of(settings).write_bytes(b"{")
    try:
        with pytest.raises(Permanent):
            ask(stack, settings, "shed")
    finally:
        limits.path_of(settings).write_bytes(undamaged)
    assert newest(stack)["state"] == "failed" and "cannot be read" in newest(stack)["error"]


def test_what_a_worker_does_not_hold_is_named(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """A key that the issuer publishes and no worker has; a refresh brings it, and the status is good again."""
    held = ask(stack, settings, "refresh-jwks")
    assert held.verified
    assert all(finding.ok is not False for finding in ask(stack, settings, "jwks-status").findings)
    rotated = new_key("ES256")
    stack.issuer.keys.append(rotated)
    try:
        status = ask(stack, settings, "jwks-status")
        assert [row["missing"] for row in status.tables["workers"]] == [[rotated.kid]] * 2
        assert status.proposal[:3] == ["engram", "act", "refresh-jwks"]
        done = ask(stack, settings, "refresh-jwks")
        assert all(rotated.kid in worker["kids"] for worker in done.after.values())
        assert not ask(stack, settings, "jwks-status").proposal
    finally:
        stack.issuer.keys.remove(rotated)
        ask(stack, settings, "refresh-jwks")


@pytest.mark.parametrize(
    ("changes", "bad"),
    [
        ({}, set()),
        ({"free_bytes": 9}, {"free space (bytes)"}),
        ({"free_inodes": 9}, {"free inodes"}),
        ({"total_inodes": 0, "free_inodes": 0}, set()),
        ({"read_only": True}, {"mounted read-only"}),
        ({"fsyncs_ms": [1.0, 500.0]}, {"fsync (ms, slowest of 5)"}),
        ({"error": "No space left on device", "writes_ms": [], "fsyncs_ms": []}, {"a file can be written"}),
    ],
)
def test_a_volume_is_judged_by_what_is_normal(changes: dict[str, Any], bad: set[str]) -> None:
    """Pure: one thing wrong is one thing named."""
    healthy = {
        "free_bytes": 50,
        "total_bytes": 100,
        "free_inodes": 50,
        "total_inodes": 100,
        "read_only": False,
        "writes_ms": [0.1],
        "fsyncs_ms": [1.0],
        "error": "",
    }
    assert {f.name for f in volume.judged(Volume(**{**healthy, **changes})) if f.ok is False} == bad


def test_a_full_and_a_read_only_volume_are_seen_where_they_are(tmp_path: Path) -> None:
    """On a real small file system: full, then read-only; and nothing of the probes is left."""
    with file_system(tmp_path / "volume", "size=1m") as where:
        assert not [f.name for f in volume.judged(volume.look(where, where)) if f.ok is False]
        (where / "filler").write_bytes(bytes(1 << 20))
        full = {f.name for f in volume.judged(volume.look(where, where)) if f.ok is False}
        assert full == {"free space (bytes)", "a file can be written"}
        (where / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(where)], check=True)
        read_only = {f.name for f in volume.judged(volume.look(where, where)) if f.ok is False}
        assert read_only == {"mounted read-only", "a file can be written"}
        assert list(where.iterdir()) == []


def test_top_names_the_tenant_that_asks_most(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """Counted by the workers themselves, for tenants; between two looks at the counters, for routes."""
    tenant = stack.tenant()
    with stack.client(tenant) as client:
        for _ in range(300):
            client.get("/v1/memories/00000000-0000-7000-8000-000000000000")

        def seen() -> dict[str, Any] | None:
            tables = ask(stack, settings, "top", seconds=0.0).tables
            rows = next(rows for title, rows in tables.items() if title.startswith("tenants"))
            return next((row for row in rows if row["tenant_id"] == tenant), None)

        row = eventually(lambda: found if (found := seen()) and found["requests"] >= 300 else None)
        assert row["errors"] == 0 and row["busy_seconds"] > 0
    routes = {row["route"]: row for row in ask(stack, settings, "top", seconds=0.0).tables["routes"]}
    assert routes["/v1/memories/{id}"]["requests"] >= 300


def test_routes_are_what_happened_between_two_looks() -> None:
    """What is slow since the start of the gateway may have been fast for hours; slowest first."""
    before = {"/v1/search": Route(100, 50, {0.25: 100.0, 1.0: 100.0, float("inf"): 100.0})}
    after = {
        "/v1/search": Route(120, 51, {0.25: 101.0, 1.0: 120.0, float("inf"): 120.0}),
        "/v1/memories": Route(5, 0, {0.25: 5.0, 1.0: 5.0, float("inf"): 5.0}),
        "/v1/usage": Route(),
        "/v1/mcp": Route(30, 0, {0.25: 0.0, 1.0: 0.0, float("inf"): 0.0}),
    }
    slow, fast, refused = busiest.between(before, after, 10.0)
    assert (slow.route, slow.requests, slow.rps, slow.errors, slow.slow_ms) == ("/v1/search", 20, 2.0, 1, 1000.0)
    assert (fast.route, fast.slow_ms) == ("/v1/memories", 250.0)
    assert (refused.route, refused.requests, refused.slow_ms) == ("/v1/mcp", 30, 0.0), "none had a good token"


def test_a_tenants_rows_of_all_workers_are_one() -> None:
    """The slower worker's p95 is the tenant's; beyond the last bucket it has no number."""
    a, b = Busy("a", 10, 1, 2, 5.0, 0.1), Busy("a", 5, 0, 0, 50.0, 0.2)
    assert busiest.together([[a], [b, Busy("b", 99, 0, 0, None, 9.0)]]) == [
        Busy("b", 99, 0, 0, None, 9.0),
        Busy("a", 15, 1, 2, 50.0, 0.3),
    ]


def test_an_id_of_the_book_is_the_outcomes(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """What a person is told is what the book has."""
    done = ask(stack, settings, "volume-health")
    row = stack.control_plane.row("action_get", action_id=UUID(done.action_id))
    assert row is not None and row["action"] == "volume-health" and done.recorded


def test_the_form_in_prefect_offers_what_the_playbook_does() -> None:
    """All but what has no place among parameters that everybody can read, and the raw limits of the terminal."""
    offered = {name for name, action in ACTIONS.items() if "prefect" in action.doors}
    assert set(get_args(Name)) == offered and set(ACTIONS) - offered == {"explain-token", "set-limit"}
