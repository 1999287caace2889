"""Tenants: creation that a crash cannot break, states, the map a gateway keeps."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from shared import registry
from shared.control_plane import ControlPlane
from shared.engine import database
from shared.errors import (
    ControlPlaneUnavailable,
    Permanent,
    TenantNotActive,
    UnknownTenant,
    UnsafeTenantId,
)
from shared.registry import Elsewhere, KnownTenants, Standings
from shared.tenant import TenantPaths
from tests.core_fixtures import World, add_memories, contents_of, settings_in

pytest_plugins = ("tests.core_fixtures",)


def test_a_created_tenant_is_active_and_has_an_empty_database(world: World) -> None:
    """The gateway may serve it the moment its row says active."""
    tenant = registry.get(world.control_plane, world.tenant_id)
    assert (tenant.state, tenant.generation, tenant.machine_id, tenant.plan_id) == ("active", 1, "local", "standard")
    assert world.rows() == []


def test_creating_a_tenant_twice_is_refused_and_keeps_its_data(world: World) -> None:
    """A second create must not empty the first."""
    world.write("one")
    with pytest.raises(Permanent, match="already exists"):
        registry.create(world.control_plane, world.settings, world.tenant_id)
    assert world.rows() == ["one"]


def test_an_interrupted_creation_is_completed_by_the_next(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the row and the file, and between the file and the state."""
    for step in ("before the file", "after the file"):
        tenant_id = f"t{secrets.token_hex(6)}"
        with monkeypatch.context() as patch:
            real = database.create

            def crash(paths: TenantPaths, step: str = step) -> bool:
                if step == "after the file":
                    real(paths)  # noqa: B023
                raise InterruptedError(step)

            patch.setattr(database, "create", crash)
            with pytest.raises(InterruptedError):
                registry.create(world.control_plane, world.settings, tenant_id)
        assert registry.get(world.control_plane, tenant_id).state == "creating"
        with pytest.raises(TenantNotActive):
            registry.get_active(world.control_plane, tenant_id)
        assert registry.create(world.control_plane, world.settings, tenant_id).state == "active"
        paths = TenantPaths.of(world.settings.tenants_dir, tenant_id)
        add_memories(paths, "one")
        assert contents_of(paths.database) == ["one"]


def test_a_creation_begun_on_another_machine_is_not_finished_here(world: World, tmp_path: Path) -> None:
    """Otherwise one tenant has two databases."""
    tenant_id = f"t{secrets.token_hex(6)}"
    world.control_plane.execute(
        "tenant_insert", tenant_id=tenant_id, plan_id="standard", schema_version=1, machine_id="elsewhere"
    )
    with pytest.raises(Permanent, match="elsewhere"):
        registry.create(world.control_plane, world.settings, tenant_id)
    assert not TenantPaths.of(world.settings.tenants_dir, tenant_id).root.exists()


def test_suspend_and_resume_may_be_repeated_and_keep_the_data(world: World) -> None:
    """Suspended tenants keep being backed up and restored."""
    world.write("one")
    for change, state in ((registry.suspend, "suspended"), (registry.resume, "active")):
        for _ in range(2):
            assert change(world.control_plane, world.tenant_id).state == state
        assert registry.get_active(world.control_plane, world.tenant_id).state == state
    assert world.rows() == ["one"]


def test_an_unknown_and_an_unsafe_id_are_told_apart(world: World) -> None:
    """404 and 400; neither makes a directory."""
    with pytest.raises(UnknownTenant):
        registry.suspend(world.control_plane, "nobody-here")
    for call in (registry.get, registry.suspend, registry.resume):
        with pytest.raises(UnsafeTenantId):
            call(world.control_plane, "../etc")
    with pytest.raises(UnsafeTenantId):
        registry.create(world.control_plane, world.settings, "A")


def test_a_half_made_tenant_cannot_be_suspended_or_resumed(world: World) -> None:
    """`resume` must not be a way around the creation's order."""
    tenant_id = f"t{secrets.token_hex(6)}"
    world.control_plane.execute(
        "tenant_insert", tenant_id=tenant_id, plan_id="standard", schema_version=1, machine_id="local"
    )
    for change in (registry.suspend, registry.resume):
        with pytest.raises(Permanent, match="creating"):
            change(world.control_plane, tenant_id)


def test_the_gateways_map_survives_a_control_plane_that_is_away(world: World, tmp_path: Path) -> None:
    """The last known states stand; requests do not depend on PostgreSQL."""
    known = KnownTenants.of(world.control_plane, world.settings.machine_id)
    assert not known.loaded
    known.refresh()
    assert known.loaded
    assert known.standings[world.tenant_id] == "active"
    settings = settings_in(tmp_path, "postgresql://u:p@127.0.0.1:1/d", control_plane_connect_timeout_seconds=0.2)
    with ControlPlane(settings) as dead:
        known._read = KnownTenants.of(dead, world.settings.machine_id)._read
        with pytest.raises(ControlPlaneUnavailable):
            known.refresh()
    assert known.standings[world.tenant_id] == "active"
    assert world.tenant_id in {t.tenant_id for t in registry.list_all(world.control_plane)}


def test_a_refresh_reads_what_has_changed_and_misses_nothing_that_was_committed_late(world: World) -> None:
    """Not every tenant of every machine each time; a change that was under way during a read is in a later one."""
    other = f"t{secrets.token_hex(6)}"
    known, read = KnownTenants.of(world.control_plane, world.settings.machine_id), list[int]()
    asked = known._read

    def counted(since: str | None) -> Standings:
        rows, following = asked(since)
        read.append(len(rows))
        return rows, following

    known._read = counted
    known.refresh()
    known.refresh()
    everything, nothing = read
    assert everything >= 1 and nothing < everything
    with world.control_plane.transaction() as connection:
        connection.execute("UPDATE tenants SET machine_id = 'far' WHERE tenant_id = %s", (world.tenant_id,))
        registry.create(world.control_plane, world.settings, other)  # begun later, over sooner
        known.refresh()
        assert known.standings[other] == "active"
        assert known.standings[world.tenant_id] == "active"
    known.refresh()
    assert known.standings[world.tenant_id] == Elsewhere("far")
    registry.suspend(world.control_plane, other)
    known.refresh()
    assert known.standings[other] == "suspended"
    assert max(read[1:]) < everything + 1
    known._until_full_read = 0
    known.refresh()
    assert read[-1] == everything + 1
