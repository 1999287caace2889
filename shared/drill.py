"""A restore test: a backup nobody has restored is a hope. pick → fetch → smoke → record.

The sandbox is `data_dir/sandbox`, apart from `tenants/`: nothing here can reach a tenant's files. Outcome:

    pass          every check held
    fail          the backup is not what the catalogue says, or does not work: restoring it would hurt
    inconclusive  we could not look (store unreachable, credentials refused): says nothing about the backup

RTO is measured from the start of the download to the last check; RPO is how old the newest memory's recovery
point was when the test began (the snapshot's own age).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import UUID

from psycopg.types.json import Jsonb
from uuid6 import uuid7

from shared import backup, catalogue, generation, registry, smoke
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, KeyUnavailable, ObjectStoreRefused, Transient, UnknownBackup
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.smoke import Check
from shared.tenant import TenantPaths
from shared.workdir import workdir

Outcome = Literal["pass", "fail", "inconclusive"]


class Picked(Receipt, frozen=True):
    """What is drilled and why this one."""

    test_id: UUID
    tenant_id: str
    backup: Backup
    reason: str
    started_at: datetime


class Fetched(Receipt, frozen=True):
    """The backup's bytes in the sandbox; `file` is None when they could not be had, `check` says why."""

    picked: Picked
    sandbox: Path
    file: Path | None
    check: Check
    inconclusive: bool
    clock: float


class Drilled(Receipt, frozen=True):
    picked: Picked
    checks: tuple[Check, ...]
    outcome: Outcome
    rto_ms: float
    rpo_seconds: float


def pick(control_plane: ControlPlane, tenant_id: str | None = None) -> Picked:
    """The tenant asked for, else the one least recently drilled (never drilled first).

    Raises `UnknownBackup` when there is nothing to test.
    """
    if tenant_id is None:
        row = control_plane.row("drill_pick")
        if row is None:
            raise UnknownBackup("no active tenant has a verified backup to test")
        tenant_id, reason = str(row["tenant_id"]), "least recently drilled"
    else:
        registry.get_active(control_plane, tenant_id)
        reason = "asked for"
    newest = catalogue.newest(control_plane, tenant_id)
    return Picked(UUID(int=uuid7().int), tenant_id, newest, reason, datetime.now(UTC))


@contextmanager
def sandbox(settings: Settings) -> Iterator[Path]:
    """A private directory for one test; those of dead runs are cleared."""
    with workdir(settings.sandbox_dir, "drill") as directory:
        yield directory


def fetch(objects: ObjectStore, picked: Picked, directory: Path, control_plane: ControlPlane | None = None) -> Fetched:
    """Download into the sandbox and compare sha256. Never raises for a bad or unreachable object."""
    clock = time.perf_counter()
    file, failure = directory / "backup.sqlite", None
    inconclusive = False
    try:
        received = backup.fetch(objects, picked.backup, file, control_plane)
        seen = f"{received.size_bytes} bytes, sha256 {picked.backup.sha256[:12]}… as in the catalogue"
    except CorruptBackup as e:
        failure = str(e)
    except (Transient, ObjectStoreRefused, KeyUnavailable) as e:
        failure, inconclusive = str(e), True
    ms = round((time.perf_counter() - clock) * 1000, 3)
    check = Check("sha256", failure is None, failure or seen, ms)
    return Fetched(picked, directory, None if failure else file, check, inconclusive, clock)


def run(fetched: Fetched) -> Drilled:
    """Run every smoke test on the copy."""
    picked, checks = fetched.picked, [fetched.check]
    if fetched.file is not None:
        manifest = picked.backup.manifest
        checks += smoke.check_file(fetched.file, picked.tenant_id, manifest)
        if all(check.passed for check in checks):
            checks.append(smoke.check_schema(fetched.file, picked.tenant_id))
            paths = TenantPaths.of(fetched.sandbox / "tenants", picked.tenant_id)
            generation.activate(paths, generation.prepare(paths, fetched.file, previous=0))
            paths.lock.touch(mode=0o600)
            checks += smoke.check_engine(paths, manifest)
    passed = all(check.passed for check in checks)
    outcome: Outcome = "pass" if passed else "inconclusive" if fetched.inconclusive else "fail"
    return Drilled(
        picked,
        tuple(checks),
        outcome,
        round((time.perf_counter() - fetched.clock) * 1000, 3),
        round((picked.started_at - picked.backup.ts).total_seconds(), 3),
    )


def record(control_plane: ControlPlane, drilled: Drilled, *, flow_run_id: str | None = None) -> Drilled:
    """Write the `restore_tests` row.

    A backup whose file failed is marked corrupt, so nothing chooses it again. One that is whole but does not
    work with this build is reported and kept: the fault may be the build's.
    """
    picked = drilled.picked
    control_plane.execute(
        "drill_insert",
        test_id=picked.test_id,
        tenant_id=picked.tenant_id,
        backup_id=picked.backup.backup_id,
        outcome=drilled.outcome,
        checks=Jsonb([check.as_dict() for check in drilled.checks]),
        rto_ms=drilled.rto_ms,
        rpo_seconds=drilled.rpo_seconds,
        flow_run_id=flow_run_id,
        started_at=picked.started_at,
    )
    if any(check.name in smoke.FILE_CHECKS and not check.passed for check in drilled.checks) and (
        drilled.outcome == "fail"
    ):
        control_plane.execute("backup_mark_corrupt", backup_id=picked.backup.backup_id)
    return drilled
