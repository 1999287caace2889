"""Restores and backups at the same time: of one tenant in turn or refused, of different tenants side by side."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Stack
from tests.acceptance.slow_restore import Beside
from tests.core_fixtures import contents_of, sampled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
OLD, NEW = ["kept", "live"], ["kept"]
DURING = {"download": OLD, "lock": OLD, "release": NEW}  # a restore: what a backup has


@pytest.fixture(scope="module")
def one(stack: Stack) -> Iterator[Beside]:
    """A process that runs flows, and can be made to wait in them."""
    with closing(Beside(stack)) as made:
        yield made


@pytest.fixture(scope="module")
def other(stack: Stack) -> Iterator[Beside]:
    """A second one."""
    with closing(Beside(stack)) as made:
        yield made


def live(stack: Stack, tenant_id: str) -> list[str]:
    return contents_of(stack.data_dir / "tenants" / tenant_id / "engram.db")


def backed(stack: Stack, beside: Beside, tenant_id: str) -> tuple[httpx.Client, str]:
    """A tenant with a backup of `NEW` and `OLD` live: its client and the backup's id."""
    client = stack.tenant(tenant_id)
    client.post("/v1/memories", json={"content": "kept"}).raise_for_status()
    [made] = beside.run("backup", tenant_id)["result"]
    client.post("/v1/memories", json={"content": "live"}).raise_for_status()
    return client, made["backup_id"]


def stored(stack: Stack, answer: dict[str, Any], directory: Path) -> list[str]:
    """The rows in the object of a backup run that completed."""
    assert answer["state"] == "COMPLETED", answer["message"]
    copied = directory / "object.sqlite"
    shutil.copy(stack.data_dir / "objects" / answer["result"][0]["key"], copied)
    return contents_of(copied)


@pytest.mark.parametrize(
    "point", sampled(["download", "lock", "before the rename", "after the rename", "release"], "lock", "release")
)
def test_of_two_restores_of_one_tenant_one_runs_and_the_other_is_refused(
    stack: Stack, one: Beside, other: Beside, point: str
) -> None:
    """Wherever the first is, the second touches nothing and says in one sentence why."""
    tenant_id = f"twice-{point.split()[0]}"
    backed(stack, one, tenant_id)
    one.start("restore", tenant_id, point=point)
    refused = other.run("restore", tenant_id)
    undo = other.run("undo", tenant_id)
    one.go_on(tenant_id)
    first = one.answer()
    assert first["state"] == "COMPLETED" and first["result"]["outcome"] == "restored"
    assert refused["state"] == "FAILED"
    assert f"another restore of tenant {tenant_id} is running on this machine" in refused["message"]
    assert undo["state"] == "FAILED"
    assert live(stack, tenant_id) == NEW
    states = stack.rows("SELECT state FROM restores WHERE tenant_id = %s AND kind = 'restore'", tenant_id)
    assert sorted(states) == [("refused",), ("restored",)]
    assert other.run("restore", tenant_id)["state"] == "COMPLETED"


def test_the_command_line_refuses_a_second_restore_for_safety(stack: Stack, one: Beside) -> None:
    """Exit code 3 and one line that names the cause, after a real run of the deployment."""
    backed(stack, one, "twice-cli")
    one.start("restore", "twice-cli", point="download")
    done = stack.engram("restore", "twice-cli", check=False)
    one.go_on("twice-cli")
    assert one.answer()["state"] == "COMPLETED"
    assert done.returncode == 3
    assert "another restore of tenant twice-cli is running" in done.stderr.strip().splitlines()[-1]


def test_two_restores_started_at_the_same_instant_do_not_mix(stack: Stack, one: Beside, other: Beside) -> None:
    """Without any arrangement of ours: each is restored or refused, at least one is restored, one database is live."""
    client, backup_id = backed(stack, one, "race")
    for _ in range(3):
        one.start("restore", "race", backup_id=backup_id)
        other.start("restore", "race", backup_id=backup_id)
        answers = [one.answer(), other.answer()]
        assert {a["state"] for a in answers} <= {"COMPLETED", "FAILED"}
        assert "COMPLETED" in {a["state"] for a in answers}
        assert all("another restore" in a["message"] for a in answers if a["state"] == "FAILED")
        assert live(stack, "race") == NEW
        client.post("/v1/memories", json={"content": "live"}).raise_for_status()


def test_restores_of_two_tenants_run_side_by_side(stack: Stack, one: Beside, other: Beside) -> None:
    """One tenant's fence, even held for long, is nobody else's."""
    (first, _), (second, _) = backed(stack, one, "left"), backed(stack, one, "right")
    one.start("restore", "left", point="after the rename")
    assert other.run("restore", "right")["result"]["outcome"] == "restored"
    assert second.post("/v1/memories", json={"content": "goes on"}).status_code == 201
    for _ in range(3):  # it waits 2 s for the fence, and 2 s at most for its turn: a slow machine may say either
        held = first.post("/v1/memories", json={"content": "must wait"})
        if held.json()["reason"] != "shed":
            break
    assert (held.status_code, held.json()["reason"]) == (503, "maintenance")
    one.go_on("left")
    assert one.answer()["result"]["outcome"] == "restored"
    assert first.post("/v1/memories", json={"content": "goes on"}).status_code == 201
    assert live(stack, "left") == live(stack, "right") == ["kept", "goes on"]


def test_a_restore_during_a_backup_gives_two_whole_results(
    stack: Stack, one: Beside, other: Beside, tmp_path: Path
) -> None:
    """The backup began with the old database and holds all of it and nothing of the new one."""
    client, _ = backed(stack, one, "while-backup")
    one.start("backup", "while-backup", point="snapshot")
    assert other.run("restore", "while-backup")["result"]["outcome"] == "restored"
    client.post("/v1/memories", json={"content": "into the new one"}).raise_for_status()
    one.go_on("while-backup")
    assert stored(stack, one.answer(), tmp_path) == OLD
    assert live(stack, "while-backup") == ["kept", "into the new one"]


@pytest.mark.parametrize("point", sampled(DURING, "lock", "release"))
def test_a_backup_during_a_restore_gives_two_whole_results(
    stack: Stack, one: Beside, other: Beside, tmp_path: Path, point: str
) -> None:
    """Before the swap it is of the old database, after it of the new one."""
    tenant_id = f"while-{point}"
    backed(stack, one, tenant_id)
    one.start("restore", tenant_id, point=point)
    assert stored(stack, other.run("backup", tenant_id), tmp_path) == DURING[point]
    one.go_on(tenant_id)
    assert one.answer()["result"]["outcome"] == "restored"
    assert live(stack, tenant_id) == NEW


def test_a_backup_asked_for_under_the_fence_waits_for_the_new_database(
    stack: Stack, one: Beside, other: Beside, tmp_path: Path
) -> None:
    """Between the rename and the verification nobody may read: a backup then waits, and is of what came of it."""
    backed(stack, one, "fenced")
    one.start("restore", "fenced", point="after the rename")
    other.start("backup", "fenced")
    one.go_on("fenced")
    assert one.answer()["result"]["outcome"] == "restored"
    assert stored(stack, other.answer(), tmp_path) == NEW
