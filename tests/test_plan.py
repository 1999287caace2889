"""The plan of a restore: which backup, and that making one changes nothing."""

from __future__ import annotations

from datetime import timedelta

import pytest

from shared import catalogue
from shared import plan as planning
from shared.errors import (
    Permanent,
    UnknownBackup,
)
from tests.core_fixtures import World
from tests.restore_fixtures import (
    identity,
)

pytest_plugins = ("tests.core_fixtures",)


def test_a_plan_changes_nothing(backed: World) -> None:
    """A dry run may be made by anybody at any time."""
    before = identity(backed)
    for _ in range(2):
        planning.plan(backed.settings, backed.control_plane, backed.tenant_id)
    assert identity(backed) == before
    assert backed.control_plane.row("lease_get", tenant_id=backed.tenant_id) is None


def test_a_plan_by_time_takes_the_newest_backup_before_it(backed: World) -> None:
    """`--at` and `--backup` together are a contradiction."""
    first = catalogue.newest(backed.control_plane, backed.tenant_id)
    second = backed.back_up()
    arguments = (backed.settings, backed.control_plane, backed.tenant_id)
    assert planning.plan(*arguments).backup == second
    assert planning.plan(*arguments, at=second.ts - timedelta(microseconds=1)).backup == first
    naive = second.ts.replace(tzinfo=None)
    assert planning.plan(*arguments, at=naive).backup == second
    with pytest.raises(Permanent, match="not both"):
        planning.plan(*arguments, at=first.ts, backup_id=str(first.backup_id))
    with pytest.raises(UnknownBackup):
        planning.plan(*arguments, at=first.ts - timedelta(seconds=1))
