"""Stored backups are read again, a share every day, those not read for longest first.

    good          the object is what was stored, unpacks to the sha256 of the row, and opens as this tenant's database
    corrupt       it was read, and is not
    missing       the store answers, and has no such object
    inconclusive  we could not look: store away, credentials or key refused, a newer build's file. Changes nothing

Only a second look at a bad one marks it: a byte lost on the way is no fault of the store. One that is marked is looked
at again too, and is available once more when it reads whole. When one is missing and none of those seen last can be
found either, the store is the wrong one, or empty by mistake: nothing is marked then.

Each is recorded as soon as it was read: a run that is killed loses the one in hand. One that could not be read takes no
other's place in a day's share; it is tried beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from shared import snapshot
from shared.backup import fetch
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, CorruptBackup, CorruptDatabase, EngramError, KeyUnavailable
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.workdir import workdir

Outcome = Literal["good", "corrupt", "missing", "inconclusive"]
_PROBED = 20  # objects that were seen last: when one is missing, these are looked for
_NOTHING_FOUND = 3  # so many, and not one there: this is not our store
log = get_logger("verify")


class Examined(Receipt, frozen=True):
    """One look at a stored backup. `cause` is None when it is good."""

    backup: Backup
    outcome: Outcome
    cause: str | None
    ms: float
    recorded: bool = False


class Share(Receipt, frozen=True):
    """What one run reads: so many of all, oldest verification first."""

    backups: tuple[Backup, ...]
    available: int


def choose(control_plane: ControlPlane, settings: Settings, limit: int | None = None) -> Share:
    """The share of a day, all of them in `verify_cycle_days`; beside it, to look again, the corrupt ones found last and
    those that could not be read."""
    counted = control_plane.row("verify_count") or {"available": 0}
    available = int(counted["available"])
    share = limit or -(-available // settings.verify_cycle_days)
    found = control_plane.rows("verify_oldest", limit=share)
    return Share(tuple(Backup(**row) for row in found), available)


@contextmanager
def sandbox(settings: Settings) -> Iterator[Path]:
    """A private directory for the files of one run."""
    with workdir(settings.data_dir / "tmp", "verify") as directory:
        yield directory


def examine(control_plane: ControlPlane, objects: ObjectStore, backup: Backup, directory: Path) -> Examined:
    """Look at one backup; twice when it is bad. Never raises for the object, the store, the key or PostgreSQL."""
    started = time.perf_counter()
    file = directory / f"{backup.tenant_id}.sqlite.{backup.backup_id}"  # its name says whose it is
    outcome, cause = _try(control_plane, objects, backup, file)
    if outcome in ("corrupt", "missing"):
        outcome, cause = _try(control_plane, objects, backup, file)
    if outcome == "missing" and (wrong := _wrong_store(control_plane, objects)) is not None:
        outcome, cause = "inconclusive", wrong
    return Examined(backup, outcome, cause, round((time.perf_counter() - started) * 1000, 3))


def _wrong_store(control_plane: ControlPlane, objects: ObjectStore) -> str | None:
    """Why this is not the store the catalogue speaks of; None when it may be."""
    try:
        keys = [row["key"] for row in control_plane.rows("backups_seen_last", limit=_PROBED)]
        if len(keys) < _NOTHING_FOUND or any(objects.exists(key) for key in keys):
            return None
    except EngramError as e:
        return f"{type(e).__name__}: {e}"[:300]
    log.error("object_store_empty", looked_for=len(keys))
    return f"none of the {len(keys)} objects seen last is there: is this the right object store?"


def _try(control_plane: ControlPlane, objects: ObjectStore, backup: Backup, file: Path) -> tuple[Outcome, str | None]:
    try:
        return _look(control_plane, objects, backup, file)
    except CorruptDatabase as e:
        return "corrupt", str(e)
    except (EngramError, OSError) as e:
        return "inconclusive", f"{type(e).__name__}: {e}"[:300]
    finally:
        file.unlink(missing_ok=True)


def _look(control_plane: ControlPlane, objects: ObjectStore, backup: Backup, file: Path) -> tuple[Outcome, str | None]:
    try:
        fetch(objects, backup, file, control_plane)
    except CorruptBackup as e:
        return _judge(objects, backup, e)
    except KeyUnavailable:
        if not objects.exists(backup.key):
            return "missing", "no such object"
        stored, _ = objects.sha256(backup.key)  # readable without the key
        if stored != backup.stored_sha256:
            return "corrupt", f"the object's sha256 is {stored[:12]}…, not {backup.stored_sha256[:12]}…"
        raise
    found = snapshot.inspect(file, backup.tenant_id).as_dict()
    wrong = [f"{k}: {v}, manifest {backup.manifest[k]}" for k, v in found.items() if backup.manifest.get(k, v) != v]
    return ("corrupt", "; ".join(wrong)) if wrong else ("good", None)


def _judge(objects: ObjectStore, backup: Backup, failure: CorruptBackup) -> tuple[Outcome, str]:
    """The object is missing, or other bytes than were stored, or those and cannot be opened."""
    if not objects.exists(backup.key):
        return "missing", "no such object"
    if backup.packing != "none" and objects.sha256(backup.key)[0] == backup.stored_sha256:
        return "inconclusive", f"the object is what was stored, but: {failure}"
    return "corrupt", str(failure)


def examine_all(
    control_plane: ControlPlane,
    objects: ObjectStore,
    settings: Settings,
    share: Share,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Examined]:
    """Read the whole share and record each as it was read; what was not begun within `verify_run_seconds` is left to
    the next run. One that PostgreSQL did not take is returned as not recorded."""
    end = time.monotonic() + settings.verify_run_seconds
    examined: list[Examined] = []
    with sandbox(settings) as directory, ThreadPoolExecutor(settings.verify_parallel, "verify") as pool:

        def look(backup: Backup) -> Examined | None:
            if time.monotonic() > end:
                return None
            seen = examine(control_plane, objects, backup, directory)
            try:
                return record(control_plane, seen)
            except ControlPlaneUnavailable as e:
                log.warning("verification_not_recorded", key=backup.key, cause=str(e))
                return seen

        for done in pool.map(look, share.backups):
            if done is not None:
                examined.append(done)
            if progress is not None:
                progress(len(examined), len(share.backups))
    return examined


def record(control_plane: ControlPlane, seen: Examined) -> Examined:
    """Write what was seen: verified now, corrupt with its cause, or not read. Twice is once."""
    chosen = seen.backup
    if seen.outcome == "good":
        control_plane.execute("backup_verified", backup_id=chosen.backup_id)
    elif seen.outcome == "inconclusive":
        control_plane.execute("backup_unread", backup_id=chosen.backup_id)
    else:
        reason = f"{seen.outcome}: {seen.cause}"[:500]
        if control_plane.execute("backup_found_corrupt", backup_id=chosen.backup_id, reason=reason):
            log.critical("backup_corrupt", tenant_id=chosen.tenant_id, key=chosen.key, cause=seen.cause or "")
    return msgspec.structs.replace(seen, recorded=True)
