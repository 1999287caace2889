"""The sweep, fact by fact: which dead runs it closes and how, what it never touches; and `.bak`, which an undo uses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path

import pytest

from shared import generation, plan, restore, sweep
from shared.control_plane import ControlPlane
from shared.engine.database import TenantDatabase
from shared.errors import ControlPlaneUnavailable, CorruptDatabase, InMaintenance, Permanent
from shared.fence import RestoreMutex
from shared.previous import seal
from shared.sweep import sweep_disk, sweep_records
from shared.tenant import TenantPaths
from tests.core_fixtures import LIVE, OLD, ROOT, World, contents_of, new_world, settings_in, start_child
from tests.crash_fixtures import undo
from tests.ports import free_ports
from tests.restore_fixtures import (
    begun,
    check_unlocked,
    check_whole,
    perform,
    previous,
    swapped,
)
from tests.test_following import Scripted, serving

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def world(tmp_path: Path, control_plane_url: str) -> Iterator[World]:
    """With a control plane of its own: a sweep looks at every tenant in it."""
    with ControlPlane(settings_in(tmp_path, control_plane_url)) as control_plane:
        yield new_world(tmp_path, control_plane_url, control_plane)


RUN = """
    import sys, time
    from pathlib import Path
    from shared import restore
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore
    from tests.core_fixtures import World, settings_in
    from tests.restore_fixtures import begun, running
    directory, url, tenant_id, until = sys.argv[1:]
    settings = settings_in(Path(directory), url)
    world = World(settings, ControlPlane(settings), ObjectStore(settings), tenant_id)
    chosen = begun(world)
    def reached(step):
        if step == until:
            print(chosen.restore_id, flush=True)
            time.sleep(600)
    with running(world, chosen) as hold:
        staged = restore.download(world.objects, hold, chosen)
        reached("download")
        taken = restore.lock(staged, holder="child", reason="test")
        reached("lock")
        swapped = restore.swap(staged, taken)
        reached("swap")
"""


@contextmanager
def run_until(world: World, step: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A restore in another process, standing after that step; its id."""
    url = world.settings.control_plane_url.get_secret_value()
    child = start_child(RUN, world.settings.data_dir, url, world.tenant_id, step)
    try:
        assert child.stdout is not None
        *_, restore_id = iter(child.stdout.readline().split() or ["died"])
        yield child, restore_id
    finally:
        child.kill()
        child.wait()


def aged(world: World) -> sweep.Settings:
    """Settings under which every row is older than a lease."""
    return world.settings.model_copy(update={"lease_seconds": 0.001})


def row(world: World, restore_id: str) -> dict[str, object]:
    with world.control_plane.transaction() as connection:
        found = connection.execute("SELECT * FROM restores WHERE restore_id = %s", (restore_id,)).fetchone()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("step", "state", "rows", "bak"),
    [("download", "failed", LIVE, None), ("lock", "failed", LIVE, None), ("swap", "restored", OLD, LIVE)],
)
def test_a_dead_run_is_closed_with_what_is_active(
    backed: World, step: str, state: str, rows: list[str], bak: list[str] | None
) -> None:
    """Before the swap it failed, after it the database is restored; either way unlocked, at once, and written down."""
    with run_until(backed, step) as (_, restore_id):
        pass
    found = [*sweep_disk(backed.settings), *sweep_records(aged(backed), backed.control_plane)]
    assert {swept.tenant_id for swept in found} == {backed.tenant_id}
    assert all(swept.ok for swept in found)
    assert (backed.rows(), previous(backed)) == (rows, bak)
    assert row(backed, restore_id)["state"] == state
    assert f"generation {generation.active(backed.paths)} is active" in str(row(backed, restore_id)["error"])
    check_unlocked(backed)
    backed.write("after")
    assert sweep_disk(backed.settings) == sweep_records(aged(backed), backed.control_plane) == []


@pytest.mark.parametrize("step", ["download", "lock", "swap"])
def test_a_living_run_is_never_touched(backed: World, step: str) -> None:
    """However slow or stopped it is: its mutex says that it lives."""
    with run_until(backed, step) as (child, restore_id):
        links = os.readlink(backed.paths.current), backed.paths.mark.exists(), backed.lease_holder()
        assert sweep_disk(backed.settings) == sweep_records(aged(backed), backed.control_plane) == []
        assert (os.readlink(backed.paths.current), backed.paths.mark.exists(), backed.lease_holder()) == links
        assert row(backed, restore_id)["state"] == "running"
        assert child.poll() is None


def test_a_run_that_has_not_yet_the_mutex_is_left_alone(backed: World) -> None:
    """Its row is written before: only a row older than a lease without a holder is a dead one's."""
    chosen = begun(backed)
    backed.control_plane.execute(
        "restore_insert",
        restore_id=chosen.restore_id,
        tenant_id=backed.tenant_id,
        backup_id=None,
        kind="restore",
        requested_by="",
        reason="",
        flow_run_id=None,
    )
    assert sweep_records(backed.settings, backed.control_plane) == []
    assert row(backed, str(chosen.restore_id))["state"] == "running"
    assert [swept.ok for swept in sweep_records(aged(backed), backed.control_plane)] == [True]
    assert row(backed, str(chosen.restore_id))["state"] == "failed"


def test_a_mark_made_by_hand_is_left_and_reported(backed: World) -> None:
    """Somebody holds this tenant for a reason that no run knows."""
    backed.paths.mark.write_text("do not touch, Eve")
    for _ in range(2):
        [found] = sweep_disk(backed.settings)
        assert not found.ok
        assert "by hand" in found.done
    assert backed.paths.mark.read_text() == "do not touch, Eve"
    with pytest.raises(Permanent, match="by hand"):
        perform(backed)
    with pytest.raises(InMaintenance):
        backed.write("x")
    assert backed.lease_holder() is None
    backed.paths.mark.unlink()
    perform(backed)
    check_unlocked(backed)


def eat(world: World, *numbers: int) -> None:
    for number in numbers:
        (world.paths.generation_dir(number) / "engram.db").write_bytes(b"eaten" * 1000)


def test_a_tenant_with_no_good_database_stays_locked_until_a_good_backup_is_restored(backed: World) -> None:
    """Writes into a broken file make it worse; the way out is a restore, and it must not be locked out itself."""
    with run_until(backed, "swap") as (_, restore_id):
        pass
    eat(backed, 1, 2)
    for _ in range(2):
        found = [*sweep_disk(backed.settings), *sweep_records(backed.settings, backed.control_plane)]
        assert found
        assert not any(swept.ok for swept in found)
    assert backed.paths.mark.exists()
    with pytest.raises((InMaintenance, CorruptDatabase)):
        backed.write("x")
    with backed.control_plane.transaction() as connection:
        connection.execute("UPDATE maintenance_locks SET expires_at = clock_timestamp() - interval '1 second'")
    perform(backed)
    assert backed.rows() == OLD
    assert all(swept.ok for swept in sweep_records(aged(backed), backed.control_plane))
    assert row(backed, restore_id)["state"] != "running"
    check_whole(backed)
    assert sweep_disk(backed.settings) == []


def test_without_a_control_plane_the_disk_is_still_repaired(backed: World) -> None:
    """The tenant must not wait for PostgreSQL; its records are closed when that is back."""
    with run_until(backed, "swap") as (_, restore_id):
        pass
    away = settings_in(backed.settings.data_dir, "postgresql://nobody@127.0.0.1:1/none")
    assert [swept.ok for swept in sweep_disk(away)] == [True]
    backed.write("while it is away")
    away = away.model_copy(update={"control_plane_connect_timeout_seconds": 0.2})
    with ControlPlane(away) as unreachable, pytest.raises(ControlPlaneUnavailable):
        sweep_records(away, unreachable)
    sweep_records(backed.settings, backed.control_plane)
    assert (backed.rows(), row(backed, restore_id)["state"]) == ([*OLD, "while it is away"], "restored")
    check_unlocked(backed)


def test_a_tenant_that_cannot_be_repaired_does_not_keep_the_sweep_from_the_others(
    backed: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad disk block is one tenant's."""
    with run_until(backed, "swap"):
        pass
    first = TenantPaths.of(backed.settings.tenants_dir, "a-first")
    first.root.mkdir()
    first.restore_lock.write_text("1\n")
    real: Callable[[TenantPaths], object] = sweep.repair

    def failing(paths: TenantPaths) -> object:
        if paths.tenant_id == "a-first":
            raise OSError(5, "Input/output error")
        return real(paths)

    monkeypatch.setattr(sweep, "repair", failing)
    assert [(swept.tenant_id, swept.ok) for swept in sweep_disk(backed.settings)] == [
        ("a-first", False),
        (backed.tenant_id, True),
    ]
    RestoreMutex(first).release()  # and it is not held


def test_a_restore_folds_the_previous_databases_wal_into_its_file(backed: World) -> None:
    """`engram.db.bak` is one file that can be copied away."""
    with closing(TenantDatabase(backed.paths)) as idle:
        with idle.write() as connection:
            connection.execute("UPDATE memories SET content = 'in the wal' WHERE content = 'live 3'")
        wal = Path(f"{backed.paths.database.resolve()}-wal")
        assert wal.stat().st_size > 0
        perform(backed)
        assert not wal.exists() or wal.stat().st_size == 0
        assert previous(backed) == [*OLD, "in the wal"]


def test_a_previous_database_that_cannot_be_opened_is_not_sealed(backed: World) -> None:
    """It may be the damage that the restore was for."""
    assert not seal(backed.paths)
    perform(backed)
    assert seal(backed.paths)
    eat(backed, 1)
    assert not seal(backed.paths)


def undone(world: World) -> restore.Released:
    return undo(world, plan.plan_undo(world.settings, world.control_plane, world.tenant_id))


def test_an_undo_of_an_undo_is_the_restore_again(backed: World) -> None:
    """An undo keeps what it replaced, as a restore does."""
    perform(backed)
    backed.write("since")
    undone(backed)
    assert (backed.rows(), previous(backed)) == (LIVE, [*OLD, "since"])
    undone(backed)
    assert (backed.rows(), previous(backed)) == ([*OLD, "since"], LIVE)
    check_unlocked(backed)
    check_whole(backed)


def test_an_undo_without_a_database_from_before_is_refused(backed: World) -> None:
    """There is nothing to go back to, and nothing is locked to find that out."""
    with pytest.raises(Permanent, match="no database from before"):
        undone(backed)
    assert backed.rows() == LIVE
    assert backed.control_plane.row("lease_get", tenant_id=backed.tenant_id) is None


def test_a_put_back_restore_leaves_the_earlier_bak_to_undo(backed: World) -> None:
    """What did not become active must not become the database from before either."""
    perform(backed)
    backed.write("since")
    with swapped(backed) as (chosen, done):
        eat(backed, done.to_generation)
        with pytest.raises(CorruptDatabase):
            restore.verify(done)
        restore.release(chosen, done.lease, restore.verify(restore.put_back(done)))
    assert (backed.rows(), previous(backed)) == ([*OLD, "since"], LIVE)
    undone(backed)
    assert (backed.rows(), previous(backed)) == (LIVE, [*OLD, "since"])


@pytest.mark.parametrize("kept", [1, 3])
def test_as_many_databases_from_before_are_kept_as_are_asked_for(backed: World, kept: int) -> None:
    """`restore_generations_kept` counts `engram.db.bak`."""
    backed.settings = backed.settings.model_copy(update={"restore_generations_kept": kept})
    befores = []
    for n in range(4):
        backed.write(f"before {n}")
        befores.append(backed.rows())
        perform(backed)
    files = sorted(backed.paths.generations.glob("*/engram.db"))
    assert [contents_of(file) for file in files] == [*befores[-kept:], OLD]
    assert previous(backed) == befores[-1]


def engram_sweep(world: World, prefect_url: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
    given = {
        "ENGRAM_DATA_DIR": str(world.settings.data_dir),
        "ENGRAM_CONTROL_PLANE_URL": world.settings.control_plane_url.get_secret_value(),
        "ENGRAM_OBJECT_STORE_URL": f"file://{world.settings.data_dir}/objects",
        "PREFECT_API_URL": prefect_url,
    }
    command = [sys.executable, "-m", "deployments.cli", "sweep", "--json"]
    return subprocess.run(
        command, env=kept | given | more, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.parametrize("control_plane", ["there", "away"])
def test_the_command_repairs_without_prefect_and_says_what_it_left(backed: World, control_plane: str) -> None:
    """The runbook's one command: a tenant that answers 503 does not wait for Prefect, nor for PostgreSQL."""
    with run_until(backed, "swap") as (_, restore_id):
        pass
    away = {
        "ENGRAM_CONTROL_PLANE_URL": "postgresql://nobody@127.0.0.1:1/none",
        "ENGRAM_CONTROL_PLANE_CONNECT_TIMEOUT_SECONDS": "0.2",
    }
    nobody = f"http://127.0.0.1:{free_ports(1)[0]}/api"
    done = engram_sweep(backed, nobody, **(away if control_plane == "away" else {}))
    assert done.returncode == 1 and "Prefect does not answer" in done.stderr.splitlines()[-1], done.stderr
    result = json.loads(done.stdout)
    assert {one["what"] for one in result["swept"]} == {backed.tenant_id}
    assert len(result["not_done"]) == (1 if control_plane == "there" else 2)
    backed.write("let in")
    assert row(backed, restore_id)["state"] == ("restored" if control_plane == "there" else "running")


class Dying(Scripted):
    """A Prefect that was healthy when it was asked, and answers nothing after that, or after it was asked who it is."""

    def answer(self, method: str, path: str, body: dict[str, object]) -> tuple[int, object] | None:
        if path.endswith("/health"):
            return 200, True
        return (200, version("prefect")) if path.endswith("/version") and self.looks else (500, {})


@pytest.mark.parametrize("looks", [(), ("RUNNING",)])
def test_the_command_repairs_also_when_prefect_goes_away_under_it(backed: World, looks: tuple[str, ...]) -> None:
    with run_until(backed, "swap") as (_, restore_id):
        pass
    with serving(Dying(*looks)) as url:
        done = engram_sweep(backed, url, PREFECT_CLIENT_MAX_RETRIES="0")
    assert done.returncode == 1 and "Prefect does not answer any more" in done.stderr.splitlines()[-1], done.stderr
    assert [one["what"] for one in json.loads(done.stdout)["swept"]]
    assert row(backed, restore_id)["state"] == "restored"
