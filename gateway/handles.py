"""One tenant's open handles, and what a pool's threads do with them (`gateway.pool`).

A tenant that is only read has one readonly handle; one that is searched while it is read or written has one more
(`gateway.turns`). The first write opens one that can write, and always beside a
readonly one that is closed after it: so an eviction neither checkpoints nor removes the `-wal` (two fsyncs, and
three more for the next write, which would have to make a new one). A `-wal` above `WAL_KEEP_BYTES` is folded into
the database all the same; an open reads all of it. Measured, small database: open, create, close 6.8 ms when each
close checkpoints, 1.6 ms so.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

from gateway.reads import ReadQueue
from gateway.writes import Member, WriteQueue
from shared import metrics
from shared.engine import batch
from shared.engine.database import TenantDatabase
from shared.errors import CorruptDatabase, EngramError, InMaintenance, SchemaTooNew, TenantDatabaseUnavailable
from shared.log import get_logger
from shared.tenant import TenantPaths

Result = TypeVar("Result")
Job = Callable[[sqlite3.Connection], Result]
PACE_SECONDS = 0.001
READ_SECONDS = 0.005  # for which a thread stays with one tenant's reads while others may want it
WAL_KEEP_BYTES = 256 << 10  # of some ten creates
CHECKPOINT_PAGES = 1_000  # when nobody waits to write
CHECKPOINT_PAGES_BUSY = 2_000  # when somebody does
CHECKPOINT_PAGES_WITHIN_COMMIT = 4_000  # SQLite's own, when the two others did not come about
log = get_logger("pool")


class OpenTenant:
    """One tenant's handles, opened as they are needed: `searcher` by the thread that searches, the others by the one
    that holds `lock`."""

    __slots__ = (
        "began",
        "busy_timeout_seconds",
        "checkpoint_due",
        "closing",
        "company",
        "current",
        "inline",
        "lent",
        "link",
        "lock",
        "lock_wait_seconds",
        "paths",
        "reader",
        "reading",
        "reads",
        "searcher",
        "searching",
        "users",
        "worker",
        "writes",
        "writing",
    )

    def __init__(self, paths: TenantPaths, busy_timeout_seconds: float, lock_wait_seconds: float) -> None:
        self.paths = paths
        self.busy_timeout_seconds = busy_timeout_seconds
        self.lock_wait_seconds = lock_wait_seconds
        self.current = str(paths.current)
        self.worker: TenantDatabase | None = None
        self.reader: TenantDatabase | None = None
        self.searcher: TenantDatabase | None = None  # of a turn for slow ones, with or without the lock
        self.link = ""  # what `current` said when the reader was opened
        self.inline = False  # the loop may use the reader: no thread is opening or closing it
        self.users = 0
        self.lock = asyncio.Lock()
        self.reads = ReadQueue()
        self.reading = False  # a turn for those that are not slow waits or runs (`gateway.turns`)
        self.searching = False  # the same for the slow ones
        self.lent: asyncio.TimerHandle | None = None  # the lock, to such a turn, until then
        self.writes = WriteQueue()
        self.writing: asyncio.Task[None] | None = None
        self.closing = False
        self.began = 0.0  # its last transaction, monotonic
        self.company = False  # that one had several members
        self.checkpoint_due = False

    @property
    def is_busy(self) -> bool:
        """Somebody waits for it, or a turn of reads or a task that writes goes on: its handles may be wanted."""
        return self.users > 0 or self.reading or self.searching or self.writing is not None


def read_and_renew(tenant: OpenTenant, job: Job[Result]) -> Result:
    """The slow path of a lookup: also opens the current generation for the reader."""
    result = read(tenant, job)
    _renew_reader(tenant)
    return result


def read(tenant: OpenTenant, job: Job[Result]) -> Result:
    if tenant.worker is None:
        tenant.worker = _open(tenant, readonly=True)
    with tenant.worker.read() as connection:
        return job(connection)


def read_apart(tenant: OpenTenant, job: Job[Result]) -> Result:
    """In a turn for slow ones (`gateway.turns`)."""
    if tenant.searcher is None:
        tenant.searcher = _open(tenant, readonly=True)
    with tenant.searcher.read() as connection:
        return job(connection)


def read_waiting(
    tenant: OpenTenant, settle: Callable[[asyncio.Future[Any], Any, BaseException | None], None], slow: bool
) -> None:
    """Serve the reads that wait, and those that come meanwhile; each is answered when it is done, not when all are.

    The way to a thread and back costs more than most reads: a busy tenant's share one. One whose caller has left
    before it began is settled unread. A thread that is not for `slow` ones stops when there are no others.
    """
    began = time.monotonic()
    while time.monotonic() - began < READ_SECONDS and (waiting := tenant.reads.next(slow=slow)) is not None:
        step, job, answer, _, _ = waiting
        result: Any = None
        failed: BaseException | None = None
        if not answer.done():
            try:
                result = read_apart(tenant, job) if slow else step(tenant, job)
            except BaseException as e:  # noqa: BLE001  it is the caller's to raise
                failed = e
        settle(answer, result, failed)


def write(tenant: OpenTenant, members: list[Member], most: int) -> list[batch.Outcome]:
    """One transaction of what waits in `tenant.writes`, and of what joins it while it runs; `members` gets who is in
    it, in order.

    One that had company is followed by the next after `PACE_SECONDS` at the earliest: a transaction costs something
    besides its members, so small ones in a row leave less CPU to other tenants (measured: 2,000 creates a second of one
    tenant take 73% of a core instead of 91, with a p95 of 2.4 ms instead of 2.1). Who writes alone never waits.

    When the transaction cannot begin, those who wait are its members, to be told why.
    """
    if tenant.company and (early_seconds := tenant.began + PACE_SECONDS - time.monotonic()) > 0:
        time.sleep(early_seconds)
    tenant.began = time.monotonic()

    def take() -> batch.Job | None:
        if len(members) == most or (member := tenant.writes.next()) is None:
            return None
        members.append(member)
        return member.job

    try:
        writer = _writer(tenant)
        outcomes = batch.commit(writer, take)
        tenant.company = len(members) > 1
        tenant.checkpoint_due = _is_long(writer, CHECKPOINT_PAGES_BUSY if tenant.writes else CHECKPOINT_PAGES)
        return outcomes
    except BaseException:
        if not members:
            while take() is not None:
                pass
        raise


def _is_long(writer: TenantDatabase, pages: int) -> bool:
    try:
        return writer.checkpoint_due(pages)
    except OSError:  # what was written is committed, whatever is wrong with looking at it; the checkpoint will tell
        return True


def checkpoint(tenant: OpenTenant) -> None:
    """After a transaction that found it due. No write depends on it: one that fails is tried after the next one."""
    tenant.checkpoint_due = False
    if tenant.worker is None or tenant.worker.readonly:
        return
    try:
        tenant.worker.checkpoint()
    except InMaintenance:
        pass  # the file is about to be another one
    except TenantDatabaseUnavailable as e:  # also when another worker writes, or it was deleted
        log.warning("checkpoint_failed", tenant_id=tenant.paths.tenant_id, cause=str(e))
    except Exception as e:  # noqa: BLE001  nobody waits for it, and whoever writes next must not wait for ever
        log.error("checkpoint_failed", tenant_id=tenant.paths.tenant_id, cause=str(e))


def _writer(tenant: OpenTenant) -> TenantDatabase:
    if tenant.worker is not None and not tenant.worker.readonly:
        return tenant.worker
    writer = _open(tenant, readonly=False)
    if tenant.worker is not None:
        tenant.worker.close()
    tenant.worker = writer
    if tenant.reader is None:
        with suppress(InMaintenance, TenantDatabaseUnavailable):  # it would only have made closing cheaper
            tenant.reader = _reader(tenant)
            tenant.reader.hold()
    return writer


def _reader(tenant: OpenTenant) -> TenantDatabase:
    """For the loop: it never waits."""
    return TenantDatabase(tenant.paths, busy_timeout_seconds=0, lock_wait_seconds=0, readonly=True)


def _open(tenant: OpenTenant, *, readonly: bool) -> TenantDatabase:
    """The handle with its generation open; it may have to migrate, and may wait for that."""
    try:
        opened = TenantDatabase(
            tenant.paths,
            busy_timeout_seconds=tenant.busy_timeout_seconds,
            lock_wait_seconds=tenant.lock_wait_seconds,
            readonly=readonly,
            autocheckpoint_pages=CHECKPOINT_PAGES_WITHIN_COMMIT,
        )
        try:
            with opened.read():
                return opened
        except BaseException:
            opened.close()
            raise
    except (TenantDatabaseUnavailable, CorruptDatabase, SchemaTooNew):
        metrics.db_open_failures_total.inc()
        raise


def _renew_reader(tenant: OpenTenant) -> None:
    """In a thread. Leaves `link` empty, so that the loop keeps off, unless the reader is open and current."""
    tenant.link = ""
    if tenant.reader is None:
        tenant.reader = _reader(tenant)
    link = os.readlink(tenant.current)
    try:
        with tenant.reader.read():
            tenant.link = link
    except (InMaintenance, TenantDatabaseUnavailable):
        pass  # busy just now; the next lookup tries again


def close(tenant: OpenTenant) -> None:
    """Close after an eviction: the `-wal` stays unless it has grown."""
    try:
        writers = (handle for handle in (tenant.worker, tenant.searcher) if handle is not None and not handle.readonly)
        _close(tenant, fold=any(writer.wal_bytes() > WAL_KEEP_BYTES for writer in writers))
    except (sqlite3.Error, OSError) as e:
        log.error("tenant_database_close_failed", tenant_id=tenant.paths.tenant_id, cause=str(e))


def close_and_fold(tenant: OpenTenant) -> None:
    """Close for good: everything is in the one file, unless another process has the database open."""
    try:
        if tenant.worker is None:
            tenant.worker, tenant.searcher = tenant.searcher, None
        if tenant.worker is not None:
            with suppress(InMaintenance, TenantDatabaseUnavailable):  # swapped or deleted just now
                _writer(tenant)
        _close(tenant, fold=True)
    except (EngramError, sqlite3.Error, OSError) as e:
        log.error("tenant_database_close_failed", tenant_id=tenant.paths.tenant_id, cause=str(e))
        _close(tenant, fold=False)


def _close(tenant: OpenTenant, *, fold: bool) -> None:
    """SQLite folds when the last handle that is closed can write."""
    handles = [handle for handle in (tenant.reader, tenant.searcher, tenant.worker) if handle is not None]
    tenant.reader = tenant.searcher = tenant.worker = None
    handles.sort(key=lambda handle: handle.readonly != fold)
    with ExitStack() as closing:  # runs backwards, and to its end even when one fails
        for handle in reversed(handles):
            closing.callback(handle.close)
