"""Stored backups are read again, a share every day, those not read for longest first.

    good          the object is what was stored, unpacks to the sha256 of the row, and opens as this tenant's database
    corrupt       it was read, and is not
    missing       the store answers, and has no such object
    inconclusive  we could not look: store away, credentials or key refused, a newer build's file. Changes nothing

Only a second look at a bad one marks it: a byte lost on the way is no fault of the store. One that is marked is looked
at again too, and is available once more when it reads whole. When nothing at all can be found, the store is the wrong
one, or empty by mistake: nothing is marked then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from shared import snapshot
from shared.backup import fetch
from shared.catalogue import Backup
from shared.control_plane import ControlPlane
from shared.errors import CorruptBackup, CorruptDatabase, EngramError, KeyUnavailable
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.settings import Settings
from shared.workdir import workdir

Outcome = Literal["good", "corrupt", "missing", "inconclusive"]
_NOTHING_FOUND = 3  # so many missing and not one found: this is not our store
log = get_logger("verify")


class Examined(Receipt, frozen=True):
    """One look at a stored backup. `cause` is None when it is good."""

    backup: Backup
    outcome: Outcome
    cause: str | None
    ms: float


class Share(Receipt, frozen=True):
    """What one run reads: so many of all, oldest verification first."""

    backups: tuple[Backup, ...]
    available: int


def choose(control_plane: ControlPlane, settings: Settings, limit: int | None = None) -> Share:
    """The share of a day, all of them in `verify_cycle_days`; beside it the corrupt ones found last, to look again."""
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
    """Look at one backup; twice when it is bad. Never raises for the object, the store or the key."""
    started = time.perf_counter()
    file = directory / f"{backup.backup_id}.sqlite"
    outcome, cause = _try(control_plane, objects, backup, file)
    if outcome in ("corrupt", "missing"):
        outcome, cause = _try(control_plane, objects, backup, file)
    return Examined(backup, outcome, cause, round((time.perf_counter() - started) * 1000, 3))


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
    """Read the whole share; what was not begun within `verify_run_seconds` is left to the next run."""
    end = time.monotonic() + settings.verify_run_seconds
    examined: list[Examined] = []
    with sandbox(settings) as directory, ThreadPoolExecutor(settings.verify_parallel, "verify") as pool:

        def look(backup: Backup) -> Examined | None:
            if time.monotonic() > end:
                return None
            return examine(control_plane, objects, backup, directory)

        for done in pool.map(look, share.backups):
            if done is not None:
                examined.append(done)
            if progress is not None:
                progress(len(examined), len(share.backups))
    return examined


def record(control_plane: ControlPlane, examined: list[Examined]) -> list[Examined]:
    """Write what was seen: verified now, or corrupt with its cause. Returns them as they are recorded."""
    missing = sum(e.outcome == "missing" for e in examined)
    if missing >= _NOTHING_FOUND and not any(e.outcome in ("good", "corrupt") for e in examined):
        log.critical("object_store_empty", missing=missing)
        cause = f"{missing} of {len(examined)} objects are missing and none was found: is this the right object store?"
        return [Examined(e.backup, "inconclusive", cause, e.ms) if e.outcome == "missing" else e for e in examined]
    for one in examined:
        if one.outcome == "good":
            control_plane.execute("backup_verified", backup_id=one.backup.backup_id)
        elif one.outcome in ("corrupt", "missing"):
            reason = f"{one.outcome}: {one.cause}"[:500]
            if control_plane.execute("backup_found_corrupt", backup_id=one.backup.backup_id, reason=reason):
                log.critical(
                    "backup_corrupt", tenant_id=one.backup.tenant_id, key=one.backup.key, cause=one.cause or ""
                )
    return examined
