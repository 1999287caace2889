"""The whole way through a real S3: backup, restore and restore test, as Prefect flows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows import core as flow_core
from flows.backup import backup
from flows.drill import restore_test
from flows.restore import restore
from shared import catalogue
from shared.objects import ObjectStore
from shared.settings import Settings
from shared.settings import settings as cached_settings
from tests.core_fixtures import World

pytest_plugins = ("tests.core_fixtures", "tests.flow_fixtures", "tests.s3_fixtures")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def s3_world(
    world: World, s3: dict[str, object], prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[World]:
    """The settings of a worker whose objects are in S3 under a prefix of its own."""
    values = {
        "data_dir": world.settings.data_dir,
        "control_plane_url": world.settings.control_plane_url.get_secret_value(),
        "object_store_url": f"s3://engram/{world.tenant_id}",
        **s3,
    }
    for name, value in values.items():
        monkeypatch.setenv(f"ENGRAM_{name.upper()}", str(value))
    caches = (cached_settings, flow_core.control_plane, flow_core.objects)
    for cached in caches:
        cached.cache_clear()
    yield world
    flow_core.control_plane().close()
    for cached in caches:
        cached.cache_clear()


def test_a_backup_in_s3_is_restored_and_drilled(s3_world: World) -> None:
    """The key in the bucket is the contract's; what comes back is what went in; nothing is left on local disk."""
    s3_world.write("one", "two")
    assert backup(tenants=[s3_world.tenant_id], return_state=True).is_completed()
    made = catalogue.newest(s3_world.control_plane, s3_world.tenant_id)
    assert ObjectStore(Settings()).keys("tenants") == [made.key]
    s3_world.write("three")

    state = restore(s3_world.tenant_id, return_state=True)
    assert state.is_completed(), state.message
    assert s3_world.rows() == ["one", "two"]
    kinds = [b.kind for b in catalogue.list_of(s3_world.control_plane, s3_world.tenant_id)]
    assert kinds == ["safety", "manual"]

    drilled = restore_test(s3_world.tenant_id, return_state=True)
    assert drilled.is_completed(), drilled.message
    assert not list((s3_world.settings.data_dir / "objects").rglob("*.sqlite"))
