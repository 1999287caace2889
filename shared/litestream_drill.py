"""A restore test of Litestream's copy of a tenant: pick → restore → checks → record. Kept apart from `shared.drill`.

A copy that works says nothing about a tenant's backups, so its tests are in `point_in_time_tests` and no figure of the
backups' tests counts them. Half of the time the newest state is taken, else any of the window. There is no manifest and
no sha256 to compare: Litestream compares the checksums of its files, and what it puts together must be this tenant's,
whole, of a schema this build knows, and work with this build's engine. Outcomes as in `shared.drill`.
"""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID

import msgspec
from psycopg.types.json import Jsonb

from shared import generation, litestream, litestream_copies, smoke, snapshot
from shared.control_plane import ControlPlane
from shared.drill import Outcome
from shared.errors import CorruptBackup, EngramError, SchemaTooNew
from shared.ids import new_id
from shared.litestream_copies import Point
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.smoke import Check, run_check
from shared.tenant import TenantPaths


class CopyDrilled(Receipt, frozen=True):
    """One test. `point` is None when the tenant has no copy, or nobody could look. `age_seconds`: since its instant."""

    test_id: UUID
    tenant_id: str
    reason: str
    point: Point | None
    checks: tuple[Check, ...]
    outcome: Outcome
    started_at: datetime
    rto_ms: float
    age_seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        """The public shape."""
        shown = msgspec.structs.asdict(self) | {
            "test_id": str(self.test_id),
            "checks": [check.as_dict() for check in self.checks],
            "generation": self.point.generation if self.point else None,
            "txid": self.point.txid if self.point else None,
            "at": self.point.at.isoformat() if self.point else None,
        }
        return {name: value for name, value in shown.items() if name not in ("point", "started_at")}


def run(
    settings: Settings,
    objects: ObjectStore,
    tenant_id: str,
    directory: Path,
    *,
    reason: str,
    random: Random | None = None,
) -> CopyDrilled:
    """Test one state of the tenant's newest copy in `directory`. Never raises for a bad or unreachable copy."""
    started_at, clock = datetime.now(UTC), time.perf_counter()
    test_id, point = new_id(), None
    checks: list[Check] = []
    inconclusive = False
    file = directory / f"{tenant_id}.sqlite.{test_id}"  # its name says whose it is
    try:
        point = litestream_copies.any_point(objects, tenant_id, random or Random())
        if point is None:
            raise CorruptBackup("Litestream has no copy of this tenant")
        litestream.program(settings)
    except (EngramError, OSError) as e:
        checks.append(Check("copy", False, str(e), _ms(clock)))
        inconclusive = True
    else:
        try:
            checks += _check(settings, point, file, directory / "copies")
        except OSError as e:  # this machine's, not the copy's
            checks.append(Check("sandbox", False, str(e), _ms(clock)))
            inconclusive = True
        finally:
            file.unlink(missing_ok=True)
            shutil.rmtree(directory / "copies", ignore_errors=True)
    passed = all(check.passed for check in checks)
    return CopyDrilled(
        test_id,
        tenant_id,
        reason,
        point,
        tuple(checks),
        "pass" if passed else "inconclusive" if inconclusive else "fail",
        started_at,
        _ms(clock),
        round(max(0.0, (started_at - point.at).total_seconds()), 3) if point else None,
    )


def _check(settings: Settings, point: Point, file: Path, tenants: Path) -> list[Check]:
    found: dict[str, Any] = {}

    def copy() -> str:
        litestream.restore(settings, point.prefix, point.txid, file)
        if (size := file.stat().st_size) != point.size_bytes:
            raise CorruptBackup(f"{size} bytes, the transaction says {point.size_bytes}")
        return f"{point} of {point.at:%F %T.%f} UTC, {point.size_bytes} bytes"

    def whole() -> str:
        found.update(snapshot.inspect(file, point.tenant_id).as_dict())
        return f"tenant {point.tenant_id}, {found['memories']} memories, integrity ok, foreign keys ok"

    checks = [run_check("copy", copy)]
    if checks[-1].passed:
        try:
            checks.append(run_check("whole", whole))
        except SchemaTooNew as e:  # a newer build's: no fault of the copy, but this build cannot restore it
            checks.append(Check("whole", False, str(e), 0.0))
    if checks[-1].passed:
        checks.append(smoke.check_schema(file, point.tenant_id))
    if checks[-1].passed:
        paths = TenantPaths.of(tenants, point.tenant_id)
        generation.activate(paths, generation.prepare(paths, file, previous=0))
        paths.lock.touch(mode=0o600)
        checks += smoke.check_engine(paths, found, point.at)
    return checks


def record(control_plane: ControlPlane, drilled: CopyDrilled, *, flow_run_id: str | None = None) -> CopyDrilled:
    """Write the `point_in_time_tests` row; twice is once."""
    control_plane.execute(
        "copy_drill_insert",
        test_id=drilled.test_id,
        tenant_id=drilled.tenant_id,
        generation=drilled.point.generation if drilled.point else None,
        txid=drilled.point.txid if drilled.point else None,
        outcome=drilled.outcome,
        checks=Jsonb([check.as_dict() for check in drilled.checks]),
        reason=drilled.reason,
        rto_ms=drilled.rto_ms,
        age_seconds=drilled.age_seconds,
        flow_run_id=flow_run_id,
        started_at=drilled.started_at,
    )
    return drilled


def _ms(clock: float) -> float:
    return round((time.perf_counter() - clock) * 1000, 3)
