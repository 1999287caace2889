"""Point in time by Litestream: to any second, one generation a copy, beside the backups and never in their place."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from collections import defaultdict
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared import catalogue, deletion, litestream, litestream_copies, strays
from shared import plan as planning
from shared.errors import CorruptBackup, UnknownBackup
from shared.litestream import Control
from shared.plan import Plan
from tests.core_fixtures import World, contents_of, settings_in, wait_until
from tests.litestream_fixtures import caught_up, copied, copies, damage, rows_at, with_copies
from tests.live_writer import Writer
from tests.restore_fixtures import begun, check_unlocked, check_whole, perform, run

pytest_plugins = ("tests.core_fixtures", "tests.litestream_fixtures", "tests.s3_fixtures")


def plan_at(world: World, at: datetime) -> Plan:
    return planning.plan(world.settings, world.control_plane, world.tenant_id, at=at, objects=lambda: world.objects)


def restores_row(world: World, chosen: Plan) -> dict[str, object]:
    row = world.control_plane.row("restore_by_flow_run", flow_run_id=str(chosen.restore_id))
    assert row is not None
    return row


def test_a_restore_to_an_instant_brings_back_what_was_acknowledged_by_then_and_nothing_after(layered: World) -> None:
    """The backup is older, the damage younger: neither is what the operator asked for."""
    with copied(layered):
        layered.write("good 1", "good 2")
        at = caught_up(layered)
        layered.write("damage")
        caught_up(layered)
        chosen = plan_at(layered, at)
        assert chosen.copy is not None and chosen.backup is not None and chosen.source_at == chosen.copy.at <= at
        assert chosen.writes_lost == 1
        released = run(layered, chosen)
        assert (released.outcome, released.backup_id) == ("restored", None)
    assert layered.rows() == ["old", "good 1", "good 2"]
    assert contents_of(layered.paths.backup) == ["old", "good 1", "good 2", "damage"]
    row = restores_row(layered, chosen)
    assert row["backup_id"] is None and row["source"] == chosen.source and row["source_at"] == chosen.source_at
    check_unlocked(layered)
    check_whole(layered)


def test_the_same_against_s3_with_the_secrets_in_the_environment_alone(
    world: World, s3: dict[str, object], tmp_path: Path
) -> None:
    """In production the store is S3; a configuration file with its keys would be one more place to lose them."""
    settings = settings_in(
        tmp_path, "", object_store_url=f"s3://engram/{world.tenant_id}", point_in_time="litestream", **s3
    )
    on_s3 = with_copies(World(settings, world.control_plane, world.objects, world.tenant_id))
    on_s3.write("old")
    on_s3.back_up()
    with copied(on_s3) as follower:
        on_s3.write("good")
        at = caught_up(on_s3)
        on_s3.write("damage")
        caught_up(on_s3)
        secret = settings.s3_secret_access_key.get_secret_value()
        assert secret not in (settings.run_dir / "litestream.json").read_text()
        assert follower._child is not None
        assert secret not in Path(f"/proc/{follower._child.pid}/cmdline").read_text()
        run(on_s3, plan_at(on_s3, at))
    assert on_s3.rows() == ["old", "good"]


def test_the_backup_is_taken_when_it_is_the_nearer_one(layered: World) -> None:
    """A backup has a sha256 and a manifest: of two states as near, it is the better known."""
    with copied(layered):
        caught_up(layered)
        made = layered.back_up()
        assert plan_at(layered, made.ts).copy is None
        assert plan_at(layered, datetime.now(UTC)).backup == made
        layered.write("younger")
        caught_up(layered)
        assert plan_at(layered, datetime.now(UTC)).copy is not None
        before = layered.settings.model_copy(update={"point_in_time": "off"})
        off = World(before, layered.control_plane, layered.objects, layered.tenant_id)
        assert plan_at(off, datetime.now(UTC)).copy is None


def test_after_a_restore_the_new_generation_is_followed_and_no_copy_is_of_two(layered: World, tmp_path: Path) -> None:
    """Two databases in one copy would restore to something that never was."""
    with copied(layered) as follower:
        layered.write("first generation")
        caught_up(layered)
        perform(layered)
        assert follower.look()
        assert Control(layered.settings).databases() == {str(layered.paths.database.resolve())}
        configured = json.loads((layered.settings.run_dir / "litestream.json").read_text())["dbs"]
        assert [db["path"] for db in configured] == [str(layered.paths.database.resolve())]
        layered.write("second generation")
        at = caught_up(layered)
        second, first = copies(layered)
        assert (second.generation, first.generation) == (2, 1)
        states = [rows_at(layered, c.prefix, n, tmp_path) for c in (first, second) for n in c.transactions]
        assert all(not {"first generation", "second generation"} <= set(rows) for rows in states)
        assert states[-1] == ["old", "second generation"]
        chosen = plan_at(layered, at)
        assert chosen.copy is not None and chosen.copy.generation == 2
        wal = layered.paths.backup.resolve().with_name("engram.db-wal")
        assert not wal.exists() or wal.stat().st_size == 0, "what an operator copies is the one file"
        with closing(sqlite3.connect(f"file:{layered.paths.backup}?mode=ro", uri=True)) as kept:
            assert kept.execute("SELECT count(*) FROM memories").fetchone() == (2,), "and it opens read-only"
        assert not follower.look(), "nothing has changed"


def test_acknowledged_writes_and_the_fence_hold_beside_a_running_litestream(layered: World, tmp_path: Path) -> None:
    """It checkpoints and writes its own tables without asking the fence: a restore must not mind."""
    with copied(layered, poll_seconds=0.05), Writer(layered) as writer:
        acknowledged: dict[int, set[str]] = defaultdict(set)

        def note() -> int:
            for ack in writer.news():
                acknowledged[ack.generation].add(f"w{ack.number}")
            return len(acknowledged[layered.paths.generation()])

        for _ in range(4):
            before = layered.paths.generation()
            wait_until(lambda: note() >= 5)
            released = perform(layered)
            assert released.outcome == "restored" and released.generation == before + 1
            note()
            kept = set(contents_of(layered.paths.backup))
            assert acknowledged[before] <= kept, "a write of the replaced database is not in engram.db.bak"
        writer.process.kill()
        writer.process.wait()
        note()
        number, live = layered.paths.generation(), layered.rows()
        assert acknowledged[number] <= set(live)
        assert live[0] == "old" and all(row.startswith("w") for row in live[1:])
        wait_until(lambda: Control(layered.settings).databases() == {str(layered.paths.database.resolve())})
        caught_up(layered)
        point = litestream_copies.point_at(layered.objects, layered.tenant_id)
        assert point is not None and point.generation == number
        assert rows_at(layered, point.prefix, point.txid, tmp_path) == live
    check_unlocked(layered)
    check_whole(layered)


def test_a_damaged_copy_gives_way_to_the_backup_and_that_is_said(layered: World) -> None:
    """A second layer that fails must not take the first one with it, and nobody may believe it was used."""
    with copied(layered):
        layered.write("good")
        at = caught_up(layered)
    damage(layered, copies(layered)[0])
    chosen = plan_at(layered, at)
    assert chosen.copy is not None
    run(layered, chosen)
    assert chosen.backup is not None and layered.rows() == ["old"]
    row = restores_row(layered, chosen)
    assert row["backup_id"] == chosen.backup.backup_id and row["source_at"] == chosen.backup.ts
    assert "could not be restored, so the backup was taken" in str(row["note"])


def test_without_a_backup_that_old_a_damaged_copy_is_refused_and_nothing_changes(world: World) -> None:
    """What does not verify is not let in, however much it is all there is."""
    layered = with_copies(world)
    layered.write("live")
    with copied(layered):
        at = caught_up(layered)
    damage(layered, copies(layered)[0])
    chosen = plan_at(layered, at)
    assert chosen.backup is None
    with pytest.raises(CorruptBackup, match="no backup that old"):
        run(layered, chosen)
    assert layered.rows() == ["live"] and restores_row(layered, chosen)["state"] == "refused"
    with pytest.raises(UnknownBackup):
        plan_at(layered, at - timedelta(hours=1))


def test_of_another_tenant_a_copy_is_refused(layered: World) -> None:
    """There is no manifest to compare with: the identity inside the file is what says whose it is."""
    with copied(layered):
        at = caught_up(layered)
    with closing(sqlite3.connect(layered.paths.database.resolve())) as connection:
        connection.execute("UPDATE meta SET value = 'somebody-else' WHERE key = 'tenant_id'")
        connection.commit()
    with copied(layered):
        caught_up(layered)
    chosen = plan_at(layered, datetime.now(UTC))
    assert chosen.copy is not None and chosen.copy.at > at
    run(layered, chosen)
    assert "somebody-else" in str(restores_row(layered, chosen)["note"]) and layered.rows() == ["old"]


def test_a_litestream_that_hangs_costs_no_restore(layered: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked after writes flow again; when it comes round, it is let go of what was replaced."""
    with copied(layered) as follower:
        assert follower._child is not None
        os.kill(follower._child.pid, signal.SIGSTOP)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(litestream, "_ANSWER_SECONDS", 0.5)
                assert perform(layered).outcome == "restored"
        finally:
            os.kill(follower._child.pid, signal.SIGCONT)
        layered.write("served")
        assert follower.look()
        assert Control(layered.settings).databases() == {str(layered.paths.database.resolve())}


def test_a_follower_that_starts_again_goes_on_with_the_same_copy(layered: World) -> None:
    """A copy begun anew at every start would have no past."""
    with copied(layered):
        layered.write("before")
        at = caught_up(layered)
    layered.write("between")
    with copied(layered):
        caught_up(layered)
        [copy] = copies(layered)
        last = litestream_copies.point_at(layered.objects, layered.tenant_id)
        then = litestream_copies.point_at(layered.objects, layered.tenant_id, at)
        assert last is not None and then is not None and last.prefix == then.prefix == copy.prefix
        assert last.txid > then.txid


def test_an_instant_beyond_the_window_is_not_answered_by_an_older_generation(layered: World) -> None:
    """Its last state is from before the restore: it would bring back what somebody had replaced."""
    with copied(layered) as follower:
        layered.write("first generation")
        caught_up(layered)
        perform(layered)
        follower.look()
        for n in range(3):
            layered.write(f"second {n}")
            at = caught_up(layered)
    second = copies(layered)[0]
    for txid in list(second.transactions)[:-1]:  # what the window's end takes
        layered.objects.delete(second.transactions[txid])
    assert litestream_copies.point_at(layered.objects, layered.tenant_id, at) is not None
    assert litestream_copies.point_at(layered.objects, layered.tenant_id, at - timedelta(days=1)) is None


def test_a_deleted_tenants_copies_go_with_it_and_nothing_comes_back(layered: World) -> None:
    """Litestream makes directories anew that it finds missing: it has to let go before they are removed."""
    with copied(layered) as follower:
        layered.write("secret")
        caught_up(layered)
        deletion.delete(
            layered.settings, layered.control_plane, layered.objects, layered.tenant_id,
            reason="contract ended", requested_by="test", keep_backups=True,
        )  # fmt: skip
        assert copies(layered) == [] and Control(layered.settings).databases() == set()
        follower.look()
        assert not layered.paths.root.exists() and Control(layered.settings).databases() == set()
    assert [k for k in layered.objects.keys(f"tenants/{layered.tenant_id}/") if "point-in-time" in k] == []


def test_a_copy_is_never_a_backup_and_old_ones_go_by_themselves(world: World) -> None:
    """What counts as last good, and what a restore without a time takes, is in the catalogue alone."""
    layered = with_copies(world)
    layered.write("one")
    with copied(layered):
        caught_up(layered)
    assert layered.tenant_id in {
        row["tenant_id"] for row in catalogue.stale(layered.control_plane, 0.0, limit=10_000) if not row["good_at"]
    }
    with pytest.raises(UnknownBackup):
        begun(layered)
    objects = layered.settings.data_dir / "objects"
    for file in objects.rglob("*.ltx"):
        os.utime(file, times=(0, 0))

    def found() -> set[str]:
        return {s.outcome for s in strays.find(layered.control_plane, layered.objects, layered.settings, dry_run=False)}

    assert found() == set(), "the active generation's copy is Litestream's to look after, however old"
    layered.back_up()
    perform(layered)
    assert found() == {"removed"} and copies(layered) == []
