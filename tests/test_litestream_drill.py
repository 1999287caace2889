"""Drills of the copies that Litestream keeps: would a restore from one work? Recorded apart from those of backups."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from shared import drill, litestream_drill, remnants, smoke, snapshot
from tests.core_fixtures import World
from tests.litestream_fixtures import caught_up, copied, copies, damage

pytest_plugins = ("tests.core_fixtures", "tests.litestream_fixtures")


def test_copies_are_drilled_and_recorded_apart(layered: World, tmp_path: Path) -> None:
    """A copy that works must not hide that a tenant's backups were never drilled."""
    with copied(layered):
        layered.write("one", "two")
        caught_up(layered)

    def drill() -> litestream_drill.CopyDrilled:
        tested = litestream_drill.run(
            layered.settings, layered.objects, layered.tenant_id, tmp_path, reason="test", random=Random(1)
        )
        return litestream_drill.record(layered.control_plane, tested)

    passed = drill()
    assert passed.outcome == "pass", passed.checks
    assert {"copy", "whole", "schema", "sentinel", "full_text", "create_search_get"} == {c.name for c in passed.checks}
    damage(layered, copies(layered)[0])
    assert drill().outcome == "fail"
    with layered.control_plane.transaction() as connection:

        def outcomes(table: str) -> list[str]:
            rows = connection.execute(
                f"SELECT outcome FROM {table} WHERE tenant_id = %s ORDER BY finished_at", (layered.tenant_id,)
            )
            return [row["outcome"] for row in rows.fetchall()]

        assert (outcomes("point_in_time_tests"), outcomes("restore_tests")) == (["pass", "fail"], [])
    assert not [p for p in tmp_path.iterdir() if ".sqlite" in p.name or p.name == "copies"]


def test_what_a_drill_of_a_copy_has_on_disk_has_its_tenants_name(
    layered: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof of a deletion says that this machine has no copy left: it finds them by name."""
    with copied(layered):
        layered.write("one")
        caught_up(layered)
    seen: dict[str, int] = {}

    def looking(check: Callable[..., Any]) -> Callable[..., Any]:
        def look(*args: object) -> Any:
            seen.update(remnants.copies(layered.settings, layered.tenant_id))
            return check(*args)

        return look

    monkeypatch.setattr(snapshot, "inspect", looking(snapshot.inspect))
    monkeypatch.setattr(smoke, "check_engine", looking(smoke.check_engine))
    with drill.sandbox(layered.settings) as sandbox:
        tested = litestream_drill.run(layered.settings, layered.objects, layered.tenant_id, sandbox, reason="test")
    assert tested.outcome == "pass", tested.checks
    assert {Path(name).parts[2] for name in seen} == {f"{layered.tenant_id}.sqlite.{tested.test_id}", "copies"}


def test_a_tenant_without_a_copy_is_inconclusive_not_passed(layered: World, tmp_path: Path) -> None:
    """Nobody looked at anything."""
    tested = litestream_drill.run(layered.settings, layered.objects, layered.tenant_id, tmp_path, reason="test")
    assert tested.outcome == "inconclusive" and tested.point is None
