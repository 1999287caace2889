"""A restore test: a backup nobody has restored is a hope. select → fetch → smoke → record.

The sandbox is `data_dir/sandbox`, apart from `tenants/`: nothing here can reach a tenant's files. Outcome:

    pass          every check held
    fail          the backup is not what the catalogue says, or does not work: restoring it would hurt
    inconclusive  we could not look (store unreachable, credentials refused, no key, no disk): says nothing about it

A failed file is looked at once more as a verify run does it (`shared.verify`): what that cannot confirm, because the
object reads whole then, opens with no key of ours, or the whole store is the wrong one, condemns no backup.

RTO in ms is what a restore would take: download, decrypt (and decompress), verify (write, sha256, file checks, schema)
and smoke (this build's engine). The flipped byte, which no restore does, is not in it.
RPO in seconds is the time from the instant up to which the backup holds all that was written (it was taken then, or
its tenant seen unchanged) to the drill: what a restore of it would have lost. `sentinel_age_seconds` is the age of the
newest memory in the copy: a tenant that writes daily and whose copies hold nothing new has a silent hole.
"""

from __future__ import annotations

import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Literal
from uuid import UUID

from msgspec.structs import replace
from psycopg.types.json import Jsonb

from shared import backup, catalogue, generation, registry, selection, smoke, verify
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, KeyUnavailable, ObjectStoreRefused, Permanent, Transient, UnknownBackup
from shared.ids import new_id
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.selection import Candidate, Point
from shared.settings import Settings
from shared.smoke import Check
from shared.tenant import TenantPaths
from shared.verify import Examined
from shared.workdir import workdir

Outcome = Literal["pass", "fail", "inconclusive"]
_NEVER_LISTED = 500  # names in a report; `never` has all


class Picked(Receipt, frozen=True):
    """What is drilled and why this one. `true_until`: the instant up to which the backup holds all that was written."""

    test_id: UUID
    tenant_id: str
    backup: Backup
    reason: str
    true_until: datetime


class Fetched(Receipt, frozen=True):
    """The backup's bytes in the sandbox; `file` is None when they could not be had, `checks` say why."""

    picked: Picked
    sandbox: Path
    file: Path | None
    checks: tuple[Check, ...]
    inconclusive: bool
    started_at: datetime
    download_ms: float
    decrypt_ms: float
    write_ms: float


class Drilled(Receipt, frozen=True):
    picked: Picked
    checks: tuple[Check, ...]
    outcome: Outcome
    started_at: datetime
    download_ms: float
    decrypt_ms: float
    verify_ms: float
    smoke_ms: float
    rpo_seconds: float
    sentinel_age_seconds: float | None
    again: Examined | None = None  # the second look at a file that failed

    @property
    def rto_ms(self) -> float:
        return round(self.download_ms + self.decrypt_ms + self.verify_ms + self.smoke_ms, 3)

    def as_dict(self) -> dict[str, Any]:
        """The public shape."""
        return {
            "test_id": str(self.picked.test_id),
            "tenant_id": self.picked.tenant_id,
            "backup_id": str(self.picked.backup.backup_id),
            "reason": self.picked.reason,
            "outcome": self.outcome,
            "rto_ms": self.rto_ms,
            **{name: getattr(self, name) for name in ("download_ms", "decrypt_ms", "verify_ms", "smoke_ms")},
            "rpo_seconds": self.rpo_seconds,
            "sentinel_age_seconds": self.sentinel_age_seconds,
            "checks": [check.as_dict() for check in self.checks],
        }


def select(
    control_plane: ControlPlane,
    settings: Settings,
    *,
    tenant_id: str | None = None,
    backup_id: str | None = None,
    count: int | None = None,
    random: Random | None = None,
) -> list[Picked]:
    """What one run drills: the tenant and backup asked for, or what `shared.selection` chooses.

    Without a `count` the settings' share of all tenants. A tenant asked for without a backup: its newest. Raises
    `Permanent`, and `UnknownBackup` when there is nothing to test.
    """
    random = random or Random()
    if tenant_id is not None:
        registry.get_active(control_plane, tenant_id)
        if backup_id is not None:
            wanted = catalogue.get(control_plane, tenant_id, backup_id)
        else:
            wanted = catalogue.newest(control_plane, tenant_id)
        rows = control_plane.rows("drill_points", tenant_ids=[tenant_id])
        until = {row["backup_id"]: row["true_until"] for row in rows}
        return [_picked(wanted, "asked for", until.get(wanted.backup_id, wanted.ts))]
    if backup_id is not None:
        raise Permanent("a backup is drilled by its id only together with its tenant")
    candidates = [Candidate(**row) for row in control_plane.rows("drill_candidates")]
    if not candidates:
        raise UnknownBackup("no tenant has a verified backup to test")
    if count is None:
        count = selection.count_of(len(candidates), settings.restore_test_share, settings.restore_test_least)
    choices = selection.choose(candidates, count, random)
    rows = control_plane.rows("drill_points", tenant_ids=[choice.tenant_id for choice in choices])
    points = defaultdict(list)
    for row in rows:
        if row["kind"] != "safety":
            points[row["tenant_id"]].append(Point(row["backup_id"], row["ts"], row["drilled"]))
    until = {row["backup_id"]: row["true_until"] for row in rows}
    found = []
    for choice in choices:
        if not (of_tenant := points[choice.tenant_id]):  # lost since the first query
            continue
        point = selection.choose_point(of_tenant, random, never_drilled=choice.never_drilled)
        newest = point.ts == max(p.ts for p in of_tenant)
        taken = catalogue.get(control_plane, choice.tenant_id, point.backup_id)
        reason = f"{choice.reason}; {'newest backup' if newest else 'an older backup'}"
        found.append(_picked(taken, reason, until[point.backup_id]))
    return found


def _picked(chosen: Backup, reason: str, true_until: datetime) -> Picked:
    return Picked(new_id(), chosen.tenant_id, chosen, reason, true_until)


@contextmanager
def sandbox(settings: Settings) -> Iterator[Path]:
    """A private directory for one test; those of dead runs are cleared."""
    with workdir(settings.sandbox_dir, "drill") as directory:
        yield directory


def fetch(objects: ObjectStore, picked: Picked, directory: Path, control_plane: ControlPlane) -> Fetched:
    """Download, decrypt and unpack into the sandbox, compare sha256, and prove that one flipped byte would have been
    refused. Never raises for a bad or unreachable object, nor for a full disk."""
    started_at, clock = datetime.now(UTC), time.perf_counter()
    file, chosen = directory / f"{picked.tenant_id}.sqlite.{picked.test_id}", picked.backup
    failure, inconclusive = "", False
    try:
        got = backup.fetch(objects, chosen, file, control_plane)
    except CorruptBackup as e:
        failure, inconclusive = str(e), _given_up(control_plane, chosen)
    except (Transient, ObjectStoreRefused, KeyUnavailable, OSError) as e:
        failure, inconclusive = str(e), True
    ms = round((time.perf_counter() - clock) * 1000, 3)
    if failure:
        checks: tuple[Check, ...] = (Check("sha256", False, failure, ms),)
        return Fetched(picked, directory, None, checks, inconclusive, started_at, ms, 0.0, 0.0)
    seen = f"{got.size_bytes} bytes, sha256 {chosen.sha256[:12]}… as in the catalogue"
    checks = (Check("sha256", True, seen, ms),)
    decrypt_ms = round(got.decrypt_ms + got.decompress_ms, 3)
    if chosen.packing != "none":
        opened = f"{chosen.packing}, {got.stored_bytes} bytes stored" + (f", key {chosen.key_id}" * bool(chosen.key_id))
        checks += (Check("decryption" if chosen.key_id else "decompression", True, opened, decrypt_ms),)
    try:
        checks += (smoke.check_flipped_byte(file, chosen.sha256),)
    except (Transient, OSError) as e:  # no room for a second copy
        checks, inconclusive = (*checks, Check("flipped_byte", False, str(e), 0.0)), True
    return Fetched(picked, directory, file, checks, inconclusive, started_at, got.download_ms, decrypt_ms, got.write_ms)


def _given_up(control_plane: ControlPlane, chosen: Backup) -> bool:
    """Whether retention or a deletion has taken the backup since it was picked: that says nothing against it."""
    row = control_plane.row("backup_get", backup_id=chosen.backup_id)
    return row is not None and row["status"] in ("deleting", "deleted")


def run(control_plane: ControlPlane, objects: ObjectStore, fetched: Fetched) -> Drilled:
    """Run every check on the copy, then remove it; look again when the file failed. What this machine cannot do (a full
    disk) is inconclusive."""
    drilled = _run(fetched)
    bad_file = any(check.name in smoke.FILE_CHECKS and not check.passed for check in drilled.checks)
    if drilled.outcome != "fail" or not bad_file:
        return drilled
    again = verify.examine(control_plane, objects, drilled.picked.backup, fetched.sandbox)
    confirmed = again.outcome in ("corrupt", "missing")
    check = Check("second_look", not confirmed, f"{again.outcome}: {again.cause or 'read whole'}", again.ms)
    # Without a file nothing but the sha256 spoke against it, and that is not confirmed.
    outcome: Outcome = "fail" if confirmed or fetched.file is not None else "inconclusive"
    return replace(drilled, checks=(*drilled.checks, check), outcome=outcome, again=again if confirmed else None)


def _run(fetched: Fetched) -> Drilled:
    picked, checks = fetched.picked, list(fetched.checks)
    root, inconclusive = fetched.sandbox / "tenants", fetched.inconclusive
    smoke_ms, clock = 0.0, time.perf_counter()
    if fetched.file is not None:
        manifest = picked.backup.manifest
        checks += smoke.check_file(fetched.file, picked.tenant_id, manifest)
        try:
            if all(check.passed for check in checks):
                checks.append(smoke.check_schema(fetched.file, picked.tenant_id))
                paths = TenantPaths.of(root, picked.tenant_id)
                generation.activate(paths, generation.prepare(paths, fetched.file, previous=0))
                paths.lock.touch(mode=0o600)
                smoke_clock = time.perf_counter()
                checks += smoke.check_engine(paths, manifest, picked.backup.ts)
                smoke_ms = (time.perf_counter() - smoke_clock) * 1000
        except OSError as e:
            checks.append(Check("sandbox", False, str(e), 0.0))
            inconclusive = True
        finally:
            fetched.file.unlink(missing_ok=True)
            shutil.rmtree(root, ignore_errors=True)
    verify_ms = (time.perf_counter() - clock) * 1000 - smoke_ms + fetched.write_ms
    passed = all(check.passed for check in checks)
    outcome: Outcome = "pass" if passed else "inconclusive" if inconclusive else "fail"
    sentinel_at = picked.backup.manifest.get("sentinel_at")
    return Drilled(
        picked,
        tuple(checks),
        outcome,
        fetched.started_at,
        fetched.download_ms,
        fetched.decrypt_ms,
        round(verify_ms, 3) if fetched.file else 0.0,
        round(smoke_ms, 3),
        _seconds(fetched.started_at, picked.true_until),
        _seconds(fetched.started_at, datetime.fromisoformat(sentinel_at)) if sentinel_at else None,
    )


def _seconds(now: datetime, then: datetime) -> float:
    """Not below 0: another machine's clock may be a little ahead."""
    return round(max(0.0, (now - then).total_seconds()), 3)


class Trend(Receipt, frozen=True):
    """The last drills, newest first, and the tenants that were never drilled (the first of `never_total`)."""

    drills: list[dict[str, Any]]
    never: list[str]
    never_total: int


def never(control_plane: ControlPlane) -> list[str]:
    """Every tenant that has a backup and no drill that passed or failed, oldest first."""
    return [row["tenant_id"] for row in control_plane.rows("drill_never", limit=None)]


def trend(control_plane: ControlPlane, tenant_id: str | None = None, *, limit: int = 20) -> Trend:
    """Of one tenant or of all."""
    never = control_plane.rows("drill_never", limit=_NEVER_LISTED)
    drills = [dict(row) for row in control_plane.rows("drill_trend", tenant_id=tenant_id, limit=limit)]
    return Trend(drills, [row["tenant_id"] for row in never], int(never[0]["total"]) if never else 0)


def record(control_plane: ControlPlane, drilled: Drilled, *, flow_run_id: str | None = None) -> Drilled:
    """Write the `restore_tests` row.

    A backup whose file failed twice is marked corrupt, so nothing chooses it again. One that is whole but does not
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
        started_at=drilled.started_at,
        reason=picked.reason,
        download_ms=drilled.download_ms,
        decrypt_ms=drilled.decrypt_ms,
        verify_ms=drilled.verify_ms,
        smoke_ms=drilled.smoke_ms,
        sentinel_age_seconds=drilled.sentinel_age_seconds,
    )
    if drilled.again is not None:
        verify.record(control_plane, drilled.again)
    return drilled
