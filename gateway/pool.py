"""A worker's open tenant databases: at most `tenant_pool_size`, the least recently used closed first.

Each open tenant has two fenced connections. `reader` serves a lookup by id on the event loop, in microseconds
and without waiting for anything: when it would have to wait (a swap, a busy file, a new generation to open) the
lookup takes the slow path instead. `worker` does everything else in a few threads: search, lists, writes (they
fsync), opening, closing (the last close of a database checkpoints it).

Nothing queues without a bound: one thread at a time per tenant, `PER_TENANT_QUEUE` jobs behind it, and
`gateway_threads * QUEUE_PER_THREAD` jobs in all; beyond that requests are shed. A hot tenant waits on its own
lock, not in the threads, so it cannot take them from the others.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from gateway.problems import shed
from shared import metrics
from shared.engine.database import TenantDatabase
from shared.errors import CorruptDatabase, InMaintenance, SchemaTooNew, TenantDatabaseUnavailable
from shared.log import get_logger
from shared.settings import Settings
from shared.tenant import TenantPaths

QUEUE_PER_THREAD = 64
PER_TENANT_QUEUE = 64
ROOM_WAIT_SECONDS = 0.5
_ROOM_POLL_SECONDS = 0.01
Result = TypeVar("Result")
Job = Callable[[sqlite3.Connection], Result]
log = get_logger("pool")


class OpenTenant:
    """One tenant's two handles. Only the event loop touches the fields; threads get the handles."""

    __slots__ = ("closing", "current", "inline", "link", "lock", "opening", "paths", "reader", "users", "worker")

    def __init__(self, paths: TenantPaths) -> None:
        self.paths = paths
        self.current = str(paths.current)
        self.worker: TenantDatabase | None = None
        self.reader: TenantDatabase | None = None
        self.link = ""  # what `current` said when the reader was opened
        self.inline = False  # the loop may use the reader: no thread is opening or closing it
        self.users = 0
        self.lock = asyncio.Lock()
        self.opening: asyncio.Task[None] | None = None
        self.closing = False


class TenantPool:
    """For one event loop. Callers must have checked that the tenant is active."""

    def __init__(self, settings: Settings) -> None:
        self._tenants_dir = settings.tenants_dir
        self._size = settings.tenant_pool_size
        self._lock_wait_seconds = settings.tenant_lock_wait_seconds
        self._busy_timeout_seconds = settings.sqlite_busy_timeout_seconds
        self._executor = ThreadPoolExecutor(settings.gateway_threads, thread_name_prefix="sqlite")
        self._queue_limit = settings.gateway_threads * QUEUE_PER_THREAD
        self._queued = 0
        self._open: OrderedDict[str, OpenTenant] = OrderedDict()

    async def look_up(self, tenant_id: str, job: Job[Result]) -> Result:
        """A read of a few rows by key: on the loop when it need not wait, else as `read`."""
        tenant = self._open.get(tenant_id)
        if tenant is not None and tenant.inline and tenant.reader is not None:
            self._open.move_to_end(tenant_id)
            try:
                if os.readlink(tenant.current) == tenant.link:
                    with tenant.reader.read() as connection:
                        return job(connection)
            except (InMaintenance, TenantDatabaseUnavailable, OSError):
                pass  # it would have to wait, and a thread may
            except CorruptDatabase:
                metrics.db_open_failures_total.inc()
                self._discard(tenant)
                raise
        return await self._run(tenant_id, self._read_and_renew, job)

    async def read(self, tenant_id: str, job: Job[Result]) -> Result:
        """Run `job` on a fenced connection in a thread. Raises what `TenantDatabase.read` raises."""
        return await self._run(tenant_id, _read, job)

    async def write(self, tenant_id: str, job: Job[Result]) -> Result:
        """Run `job` in a transaction in a thread; when this returns it is committed and fsynced."""
        return await self._run(tenant_id, _write, job)

    async def close(self) -> None:
        """Close every database. Call when no request is running."""
        tenants = list(self._open.values())
        for tenant in tenants:
            if tenant.opening is not None:
                await asyncio.wait({tenant.opening})
        self._open.clear()
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._executor, _close, t) for t in tenants if not t.closing))
        self._executor.shutdown(wait=True)

    async def _run(self, tenant_id: str, step: Callable[[OpenTenant, Job[Result]], Result], job: Job[Result]) -> Result:
        if self._queued >= self._queue_limit:
            raise shed("The server is busy.")
        self._queued += 1
        try:
            tenant = await self._acquire(tenant_id)
        except BaseException:
            self._queued -= 1
            raise
        try:
            if tenant.users > PER_TENANT_QUEUE:
                raise shed("The tenant has too many requests waiting.")
            await tenant.lock.acquire()
        except BaseException:
            self._released(tenant)
            raise
        # From here the thread owns the handle: it is given back when the thread is done with it, not when this
        # coroutine is cancelled.
        if step == self._read_and_renew:
            tenant.inline = False
        future = asyncio.get_running_loop().run_in_executor(self._executor, step, tenant, job)
        future.add_done_callback(partial(self._finished, tenant))
        return await asyncio.shield(future)

    def _finished(self, tenant: OpenTenant, future: asyncio.Future[Result]) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, CorruptDatabase):
            metrics.db_open_failures_total.inc()
            self._discard(tenant)
        tenant.inline = tenant.link != ""
        tenant.lock.release()
        self._released(tenant)

    def _released(self, tenant: OpenTenant) -> None:
        self._queued -= 1
        tenant.users -= 1
        if tenant.closing and tenant.users == 0:
            self._close_in_thread(tenant)

    async def _acquire(self, tenant_id: str) -> OpenTenant:
        """The open tenant with one user more. Raises what opening raises, or sheds when there is no room."""
        deadline = time.monotonic() + ROOM_WAIT_SECONDS
        while (tenant := self._open.get(tenant_id)) is None:
            if len(self._open) < self._size or self._evict():
                tenant = self._open[tenant_id] = OpenTenant(TenantPaths.of(self._tenants_dir, tenant_id))
                tenant.opening = asyncio.get_running_loop().create_task(self._open_in_thread(tenant))
                break
            if time.monotonic() >= deadline:
                raise shed("Too many tenants are in use at once.")
            await asyncio.sleep(_ROOM_POLL_SECONDS)
        self._open.move_to_end(tenant_id)
        tenant.users += 1
        if tenant.opening is not None:
            try:
                await asyncio.shield(tenant.opening)
            except BaseException:
                tenant.users -= 1
                raise
        return tenant

    async def _open_in_thread(self, tenant: OpenTenant) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._executor, self._open_handles, tenant)
        except BaseException as e:
            if isinstance(e, (TenantDatabaseUnavailable, CorruptDatabase, SchemaTooNew)):
                metrics.db_open_failures_total.inc()
            tenant.closing = True
            self._forget(tenant)
            raise
        tenant.inline = True
        tenant.opening = None

    def _open_handles(self, tenant: OpenTenant) -> None:
        """In a thread. The worker first: it may have to migrate, and may wait for that."""
        worker = TenantDatabase(
            tenant.paths,
            busy_timeout_seconds=self._busy_timeout_seconds,
            lock_wait_seconds=self._lock_wait_seconds,
        )
        try:
            with worker.read():
                pass
            tenant.worker = worker
            _renew_reader(tenant)
        except BaseException:
            _close(tenant)
            worker.close()
            raise

    def _read_and_renew(self, tenant: OpenTenant, job: Job[Result]) -> Result:
        """In a thread. The slow path of `look_up`: also opens the new generation for the reader."""
        result = _read(tenant, job)
        _renew_reader(tenant)
        return result

    def _evict(self) -> bool:
        for tenant in self._open.values():
            if tenant.users == 0 and tenant.opening is None:
                self._discard(tenant)
                return True
        return False

    def _discard(self, tenant: OpenTenant) -> None:
        """Forget it now, close it when its last user is gone."""
        if tenant.closing:
            return
        tenant.closing = True
        tenant.inline = False
        self._forget(tenant)
        if tenant.users == 0:
            self._close_in_thread(tenant)

    def _forget(self, tenant: OpenTenant) -> None:
        if self._open.get(tenant.paths.tenant_id) is tenant:
            del self._open[tenant.paths.tenant_id]

    def _close_in_thread(self, tenant: OpenTenant) -> None:
        tenant.inline = False
        self._executor.submit(_close, tenant)


def _read(tenant: OpenTenant, job: Job[Result]) -> Result:
    assert tenant.worker is not None
    with tenant.worker.read() as connection:
        return job(connection)


def _write(tenant: OpenTenant, job: Job[Result]) -> Result:
    assert tenant.worker is not None
    with tenant.worker.write() as connection:
        return job(connection)


def _renew_reader(tenant: OpenTenant) -> None:
    """In a thread. Leaves `link` empty, so that the loop keeps off, unless the reader is open and current."""
    tenant.link = ""
    if tenant.reader is None:
        tenant.reader = TenantDatabase(tenant.paths, busy_timeout_seconds=0, lock_wait_seconds=0)
    link = os.readlink(tenant.current)
    try:
        with tenant.reader.read():
            tenant.link = link
    except (InMaintenance, TenantDatabaseUnavailable):
        pass  # busy just now; the next lookup tries again


def _close(tenant: OpenTenant) -> None:
    for handle in (tenant.worker, tenant.reader):
        try:
            if handle is not None:
                handle.close()
        except sqlite3.Error as e:
            log.error("tenant_database_close_failed", tenant_id=tenant.paths.tenant_id, cause=str(e))
