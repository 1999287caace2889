"""Backups that are not kept any longer: plan → mark → remove. What a row says is true at every instant.

    available ──mark──▶ deleting ──object gone──▶ deleted
        ▲                  │
        └───taken back─────┘

`mark` decides again in the transaction that marks, with the tenant's rows locked: what was found corrupt, restored
from or held since the plan is seen. A marked row is chosen by nobody; only then is its object removed, and only when
that is known does the row say so. A run that dies anywhere leaves rows `deleting`, which the next run goes on with:
removing an object twice is fine. Before it removes one it asks again whether the tenant has another good backup; when
that was lost meanwhile, the row is taken back: available, once its object was read and found whole, else corrupt. That
its object is missing is the store's word alone, and a store may be wrong for a night: such a row becomes corrupt, which
verification looks at again, and not deleted, for which the object would go when it is seen again.

An object that may not be deleted yet (object lock, legal hold, a bucket lock rule) stays `deleting` with the cause in
`delete_error`: no failure, tried again by the next run. On a versioned bucket a delete leaves a marker and the versions
stay, for as long as the bucket's own rules say.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import groupby
from operator import itemgetter
from typing import Any, Literal
from uuid import UUID

from shared.catalogue import Backup
from shared.control_plane import Connection, ControlPlane, rows
from shared.errors import ObjectLocked, ObjectStoreRefused, ObjectStoreUnavailable, UnknownBackup
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.receipt import Receipt
from shared.retention import Decision, Item, Policy, Verdict, decide
from shared.settings import Settings
from shared.verify import examine
from shared.workdir import workdir

Outcome = Literal["deleted", "locked", "held", "taken back", "refused", "unavailable"]
FAILURES: tuple[Outcome, ...] = ("refused", "unavailable")
_COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly", "safety_days")
_REMOVERS = 4
_PAGE = 500
_SILENT_TRIES = 3  # an object store that was silent so often in a row is away
log = get_logger("expiry")


class Planned(Receipt, frozen=True):
    """One tenant. `problem` says why nothing of it can be decided."""

    tenant_id: str
    plan_id: str
    keep: tuple[Verdict, ...]
    delete: tuple[Verdict, ...]
    problem: str | None = None


class Page(Receipt, frozen=True):
    """Some tenants; `after` continues, None when there are no more."""

    planned: tuple[Planned, ...]
    after: str | None


class Removed(Receipt, frozen=True):
    """What became of one backup that was to go."""

    backup_id: UUID
    tenant_id: str
    key: str
    outcome: Outcome
    cause: str | None = None


def plan(control_plane: ControlPlane, settings: Settings, *, after: str = "", limit: int = _PAGE) -> Page:
    """Decide for the next `limit` tenants; changes nothing."""
    with control_plane.transaction(maintenance=True) as connection:
        page = rows(connection, "retention_tenants", after=after, limit=limit)
        tenant_ids = [row["tenant_id"] for row in page]
        planned = tuple(_decided(connection, settings, tenant_ids))
    return Page(planned, tenant_ids[-1] if len(tenant_ids) == limit else None)


def mark(control_plane: ControlPlane, settings: Settings, planned: Iterable[Planned]) -> list[UUID]:
    """Take the planned ones off the catalogue if the decision still stands; which of them. One transaction."""
    wanted = {p.tenant_id: {v.backup_id for v in p.delete} for p in planned if p.delete}
    if not wanted:
        return []
    with control_plane.transaction(maintenance=True) as connection:
        rows(connection, "retention_lock_backups", tenant_ids=sorted(wanted))
        going = [
            verdict
            for again in _decided(connection, settings, sorted(wanted))
            for verdict in again.delete
            if verdict.backup_id in wanted[again.tenant_id]
        ]
        marked = rows(
            connection,
            "backups_mark_deleting",
            backup_ids=[v.backup_id for v in going],
            reasons=[v.reason for v in going],
        )
    return [row["backup_id"] for row in marked]


def remove(control_plane: ControlPlane, objects: ObjectStore, settings: Settings) -> list[Removed]:
    """Remove the object of every row that is `deleting`, this run's and those of runs that died.

    Never raises for an object or the store. Stops trying when the store is silent; the rest is `unavailable`.
    """
    done: list[Removed] = []
    remover = _Remover(control_plane, objects, settings)
    with ThreadPoolExecutor(_REMOVERS, "remove") as pool:
        for page in _deleting(control_plane):
            done += [removed for removed in pool.map(remover.remove, page) if removed is not None]
    return done


def hold(control_plane: ControlPlane, backup_id: UUID, until: datetime, reason: str) -> None:
    """Keep a backup until then at least, for a restore test or by order. Raises `UnknownBackup` when it is gone."""
    if not control_plane.rows("backup_hold", backup_id=backup_id, until=until, reason=reason):
        raise UnknownBackup(f"backup {backup_id} is not available")


def _deleting(control_plane: ControlPlane) -> Iterator[list[UUID]]:
    after = None
    while page := control_plane.rows("backups_deleting", after=after, limit=_PAGE):
        yield [row["backup_id"] for row in page]
        after = page[-1]["backup_id"]


def _decided(connection: Connection, settings: Settings, tenant_ids: list[str]) -> Iterator[Planned]:
    found = rows(connection, "retention_rows", tenant_ids=tenant_ids)
    for tenant_id, group in groupby(found, key=itemgetter("tenant_id")):
        of_tenant = list(group)
        first = of_tenant[0]
        if not first["plan_known"]:  # deleting by a guess cannot be undone
            yield Planned(tenant_id, first["plan_id"], (), (), f"there is no plan {first['plan_id']}; all are kept")
            continue
        items = [_item(row) for row in of_tenant if row["backup_id"] is not None]
        # Two clocks: what is young, or still to come, for one of them is not deleted.
        now = min(first["now"], datetime.now(UTC))
        decision: Decision = decide(items, policy_of(settings, first), now, deleted_at=first["deleted_at"])
        yield Planned(tenant_id, first["plan_id"], decision.keep, decision.delete)


def policy_of(settings: Settings, row: dict[str, Any]) -> Policy:
    """A plan's numbers and this installation's."""
    return Policy(
        **{name: row[name] for name in _COUNTS},
        corrupt_days=settings.retention_corrupt_days,
        deleted_tenant_days=settings.retention_deleted_tenant_days,
        min_age=timedelta(hours=settings.retention_min_age_hours),
    )


def _item(row: dict[str, Any]) -> Item:
    return Item(**{name: row[name] for name in Item.__struct_fields__})


class _Remover:
    """One run's removals, several at a time."""

    def __init__(self, control_plane: ControlPlane, objects: ObjectStore, settings: Settings) -> None:
        self._control_plane, self._objects, self._settings = control_plane, objects, settings
        self._lock = threading.Lock()
        self._silent = 0

    def remove(self, backup_id: UUID) -> Removed | None:
        """None when another run has it, or had it."""
        # The row stays locked while its object goes: nobody else removes it or takes it back meanwhile.
        with self._control_plane.transaction() as connection:
            found = rows(connection, "backup_deleting_lock", backup_id=backup_id)
            if not found:
                return None
            row = found[0]
            outcome, cause = self._decide(connection, row)
            if outcome == "deleted":
                rows(connection, "backup_deleted", backup_id=backup_id)
            elif outcome != "taken back":
                rows(connection, "backup_delete_failed", backup_id=backup_id, error=f"{outcome}: {cause}"[:500])
        log.info("backup_removed", backup_id=str(backup_id), tenant_id=row["tenant_id"], outcome=outcome, cause=cause)
        return Removed(backup_id, row["tenant_id"], row["key"], outcome, cause)

    def _decide(self, connection: Connection, row: dict[str, Any]) -> tuple[Outcome, str | None]:
        if row["held"]:
            return "held", "held since it was marked"
        if self._silent >= _SILENT_TRIES:
            return "unavailable", "not tried: the object store does not answer"
        try:
            if not row["expendable"]:
                return self._take_back(connection, row)
            self._objects.delete(row["key"])
            outcome: Outcome = "deleted"
            cause = None
        except ObjectLocked as e:
            outcome, cause = "locked", str(e)
        except ObjectStoreRefused as e:
            outcome, cause = "refused", str(e)
        except ObjectStoreUnavailable as e:
            outcome, cause = "unavailable", str(e)
        with self._lock:
            self._silent = self._silent + 1 if outcome == "unavailable" else 0
        return outcome, cause

    def _take_back(self, connection: Connection, row: dict[str, Any]) -> tuple[Outcome, str | None]:
        """The tenant has lost its other good backups: keep this one, as what it is."""
        if not self._objects.exists(row["key"]):
            status, reason = "corrupt", "missing when it was to be removed, and the tenant has no good one any more"
        elif row["status_before"] == "corrupt":
            status, reason = "corrupt", "the tenant has no good one any more"
        else:
            backup = Backup(**rows(connection, "backup_get", backup_id=row["backup_id"])[0])
            with workdir(self._settings.data_dir / "tmp", "verify") as directory:
                examined = examine(self._control_plane, self._objects, backup, directory)
            if examined.outcome == "inconclusive":
                return "unavailable", examined.cause
            status = "available" if examined.outcome == "good" else "corrupt"
            reason = examined.cause or "the tenant's only good one"
        rows(connection, "backup_taken_back", backup_id=row["backup_id"], status=status, reason=reason)
        log.warning("backup_taken_back", backup_id=str(row["backup_id"]), tenant_id=row["tenant_id"], status=status)
        return "taken back", f"{status}: {reason}"
