"""Backups of a whole machine: one run over all its tenants, or one shard of them.

A run (`shared.fleet_run`) holds a lock of its machine for as long as it lives. What it has finished is in the control
plane (`backup_marks.run_id`), so the same run after a crash goes on with the rest. One tenant that fails is listed with
its cause and the others go on.

A tenant is skipped only on proof, and only while its last good backup can still be trusted:

    no byte was written     `shared.fingerprint`, asked of all tenants at once: 5,000 cost a query and 15,000 stats
    the snapshot is equal   same sha256 as the last good backup: nothing is uploaded
    done by this run        before it was killed

The first two are off for a backup older than ENGRAM_BACKUP_FORCE_DAYS, packed in another way than is set now, or
encrypted with a key that was rotated since.
Whether the backup can be trusted is asked again by the statement that writes the mark: a backup that a verify run
found corrupt in the meantime is replaced, not skipped.

Threads, because SQLite's backup, hashing and the object store all let go of the interpreter; temporary disk is a
budget (`shared.staging`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

from shared import backup, fingerprint
from shared.control_plane import ControlPlane
from shared.errors import (
    ControlPlaneUnavailable,
    EngramError,
    ObjectStoreRefused,
    ObjectStoreUnavailable,
    Transient,
)
from shared.fingerprint import Seen
from shared.fleet_run import Chosen, Done, Last, Run
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.pack import Packing
from shared.settings import Settings
from shared.staging import Staging, reserve_bytes
from shared.tenant import TenantPaths

log = get_logger("fleet")

_RETRY_SECONDS = (1.0, 4.0, 10.0)  # between the tries of one tenant, for what may pass
_GIVE_UP_AFTER = 20  # tenants in a row for which the store or the control plane was away: the others are not tried
_OUTAGE = (ObjectStoreUnavailable, ObjectStoreRefused, ControlPlaneUnavailable)


@dataclass
class _Mark:
    """A tenant whose database is what `backup_id` holds, seen at `checked_at`."""

    tenant_id: str
    backup_id: UUID
    fingerprint: str | None
    checked_at: datetime


@dataclass
class Fleet:
    """One run at work in this process."""

    settings: Settings
    control_plane: ControlPlane
    objects: ObjectStore
    run: Run
    retry_seconds: Sequence[float] = _RETRY_SECONDS
    staging: Staging = field(init=False)
    _stop: threading.Event = field(init=False, default_factory=threading.Event)

    def back_up(self, chosen: Sequence[Chosen], directory: Path) -> Iterator[Done]:
        """Back up all of `chosen`, staging in `directory`; one `Done` each as they end, the unchanged first.

        Raises `ControlPlaneUnavailable` only before anything was done. Leaving the iterator early stops the run
        after the tenants at work.
        """
        reserve = reserve_bytes(self.settings, directory)
        self.staging = Staging(directory, self.settings.backup_staging_bytes, reserve)
        backup.repair_machine(self.objects, self.control_plane, self.run.machine_id)
        same, changed = self._skip(chosen)
        yield from same
        with ThreadPoolExecutor(self.settings.backup_parallel, "backup") as threads:
            try:
                yield from self._work(threads, changed, directory)
            finally:
                self._stop.set()

    def record(self, done: Sequence[Done]) -> None:
        """Close the run's row."""
        self.control_plane.execute(
            "fleet_run_finish",
            **{name: getattr(self.run, name) for name in ("run_id", "machine_id", "shard", "shards")},
            made=sum(not d.skipped and d.error is None for d in done),
            skipped=sum(d.skipped for d in done),
            failed=sum(d.error is not None for d in done),
        )

    # Unchanged

    def _skip(self, chosen: Sequence[Chosen]) -> tuple[list[Done], list[Chosen]]:
        """Those that need nothing, marked as seen now; and the others."""
        marks, finished = [], set()
        for tenant in chosen:
            if tenant.last is None:
                continue
            if tenant.run_id == self.run.run_id:
                finished.add(tenant.tenant_id)
            elif not self.run.force and (mark := self._unchanged(tenant, tenant.last)) is not None:
                marks.append(mark)
        confirmed = self._mark(marks) | finished
        same = [_skipped(t.tenant_id, t.last) for t in chosen if t.tenant_id in confirmed and t.last is not None]
        return same, [t for t in chosen if t.tenant_id not in confirmed]

    def _unchanged(self, tenant: Chosen, last: Last) -> _Mark | None:
        if tenant.fingerprint is None or not self._current(last):
            return None
        at = datetime.now(UTC)
        try:
            seen = fingerprint.look(self._paths(tenant.tenant_id))
        except OSError:  # to be found, and told, by the snapshot
            return None
        if seen.fingerprint != tenant.fingerprint:
            return None
        return _Mark(tenant.tenant_id, last.backup_id, tenant.fingerprint, at)

    def _current(self, last: Last) -> bool:
        """Whether the backup may stand for one more run."""
        age = datetime.now(UTC) - last.ts
        return (
            timedelta(0) <= age < timedelta(days=self.settings.backup_force_days)
            and last.packing == Packing.of(self.settings).name
            and last.key_current
        )

    def _mark(self, marks: Sequence[_Mark]) -> set[str]:
        """Write marks; the tenants whose backup can still be trusted. A refusal of the others is silent: do them."""
        if not marks:
            return set()
        rows = self.control_plane.rows(
            "backup_mark",
            tenant_ids=[m.tenant_id for m in marks],
            backup_ids=[m.backup_id for m in marks],
            fingerprints=[m.fingerprint for m in marks],
            checked_at=[m.checked_at for m in marks],
            run_id=self.run.run_id,
        )
        return {row["tenant_id"] for row in rows}

    # The others

    def _work(self, threads: ThreadPoolExecutor, tenants: Sequence[Chosen], directory: Path) -> Iterator[Done]:
        """At most twice as many tenants in hand as threads, so that stopping is quick and memory small."""
        waiting = iter(tenants)
        running: set[Future[Done]] = set()
        away = 0
        for tenant in waiting:
            running.add(threads.submit(self._one, tenant, directory))
            if len(running) < 2 * self.settings.backup_parallel:
                continue
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for done in (future.result() for future in ended):
                away = away + 1 if done.outage else 0
                yield done
                if away >= _GIVE_UP_AFTER:
                    log.error("backup_given_up", run_id=self.run.run_id, cause=done.error)
                    self._stop.set()
                    cause = f"not tried after {away} tenants in a row failed: {done.error}"
                    yield from (Done(left.tenant_id, error=cause, outage=True) for left in waiting)
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in ended)

    def _one(self, tenant: Chosen, directory: Path) -> Done:
        delays = iter(self.retry_seconds)
        while True:
            if self._stop.is_set():
                return Done(tenant.tenant_id, error="not tried: the run was stopped", outage=True)
            try:
                return self._back_up_one(tenant, directory)
            except Exception as e:  # the edge between tenants: one's failure, whatever it is, must not cost the others
                retried = isinstance(e, Transient) and (delay := next(delays, None)) is not None
                if retried and not self._stop.wait(delay):
                    continue
                if not isinstance(e, EngramError):
                    log.exception("backup_failed_unforeseen", tenant_id=tenant.tenant_id)
                cause = str(e) if isinstance(e, EngramError) else f"{type(e).__name__}: {e}"
                return Done(tenant.tenant_id, error=cause, outage=isinstance(e, _OUTAGE))

    def _back_up_one(self, tenant: Chosen, directory: Path) -> Done:
        seen = self._look(tenant.tenant_id)
        packed = 1 if Packing.of(self.settings).name == "none" else 2  # the packed file lies beside the plain one
        with self.staging.hold(packed * seen.size_bytes):
            try:
                return self._stage(tenant, seen, directory)
            finally:
                (directory / f"{tenant.tenant_id}.sqlite").unlink(missing_ok=True)

    def _stage(self, tenant: Chosen, seen: Seen, directory: Path) -> Done:
        taken = backup.take(self.settings, tenant.tenant_id, directory)
        last = tenant.last
        same = not self.run.force and last is not None and last.sha256 == taken.sha256 and self._current(last)
        if same and last and self._mark([_Mark(tenant.tenant_id, last.backup_id, seen.fingerprint, taken.ts)]):
            return _skipped(tenant.tenant_id, last)
        stored = backup.store(self.objects, taken, self.control_plane, kind=self.run.kind)
        made = backup.register(self.control_plane, stored, kind=self.run.kind, flow_run_id=self.run.flow_run_id)
        self._mark([_Mark(tenant.tenant_id, made.backup_id, seen.fingerprint, made.ts)])
        return Done(tenant.tenant_id, made.backup_id, made.key, made.sha256, made.size_bytes)

    def _look(self, tenant_id: str) -> Seen:
        """Before the snapshot. A tenant without a database here is told by the snapshot."""
        try:
            return fingerprint.look(self._paths(tenant_id))
        except OSError:
            return Seen(None, 0)

    def _paths(self, tenant_id: str) -> TenantPaths:
        return TenantPaths.of(self.settings.tenants_dir, tenant_id)


def _skipped(tenant_id: str, last: Last) -> Done:
    return Done(tenant_id, last.backup_id, last.key, last.sha256, last.size_bytes, skipped=True)
