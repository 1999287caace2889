"""A worker's open tenant databases: at most `tenant_pool_size`, the least recently used closed first.

Each open tenant has a fenced connection or two. `reader`, opened by the second lookup, serves lookups by id on the
event loop, in microseconds and without waiting for anything: when one would have to wait (a swap, a busy file, a new
generation to open) it takes the slow path instead. `worker` does everything else in a few threads: search, lists,
writes (they fsync), opening, closing (the last close of a database checkpoints it).

Writes that arrive while a tenant's last transaction is being fsynced wait together and become the next one
(`shared.engine.batch`): the busier a tenant, the fewer fsyncs a write costs it. Nobody is made to wait for company.

Nothing queues without a bound: one thread at a time per tenant, `PER_TENANT_QUEUE` jobs behind it, and
`gateway_threads * QUEUE_PER_THREAD` jobs in all; beyond that requests are shed. A hot tenant waits on its own
lock, not in the threads, so it cannot take them from the others.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from gateway.handles import Job, OpenTenant, Result, close, open_worker, read, read_and_renew, write
from gateway.problems import shed
from gateway.shed import bounded
from gateway.writes import again
from shared import metrics
from shared.errors import CorruptDatabase, InMaintenance, SchemaTooNew, TenantDatabaseUnavailable
from shared.settings import Settings
from shared.tenant import TenantPaths

QUEUE_PER_THREAD = 64
PER_TENANT_QUEUE = 64
BATCH = 64  # writes in one transaction: no more than may wait anyway
ROOM_WAIT_SECONDS = 0.5
_ROOM_POLL_SECONDS = 0.01


class TenantPool:
    """For one event loop. Callers must have checked that the tenant is active."""

    def __init__(self, settings: Settings) -> None:
        self._tenants_dir = settings.tenants_dir
        self._size = settings.tenant_pool_size
        self._lock_wait_seconds = settings.tenant_lock_wait_seconds
        self._busy_timeout_seconds = settings.sqlite_busy_timeout_seconds
        self._query_timeout_seconds = settings.query_timeout_seconds
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
                return tenant.reader.look_up(job)
            except (InMaintenance, TenantDatabaseUnavailable):
                pass  # it would have to wait, and a thread may
            except CorruptDatabase:
                metrics.db_open_failures_total.inc()
                self._discard(tenant)
                raise
        if tenant is None:
            return await self._run(tenant_id, read, job)
        return await self._run(tenant_id, read_and_renew, job)

    async def read(self, tenant_id: str, job: Job[Result]) -> Result:
        """Run `job` on a fenced connection in a thread. Raises what `TenantDatabase.read` raises."""
        return await self._run(tenant_id, read, bounded(job, self._query_timeout_seconds))

    async def write(self, tenant_id: str, job: Job[Result]) -> Result:
        """Run `job` in a transaction in a thread; when this returns it is committed and fsynced.

        The transaction may hold other callers' jobs, and `job` may be run a second time after a rollback. A caller
        that is cancelled before its transaction began leaves no trace; after that its job is stored all the same.
        """
        tenant = await self._admit(tenant_id)
        waiting = tenant.writes.put(job)
        if tenant.writing is None:
            tenant.writing = asyncio.get_running_loop().create_task(self._write_waiting(tenant))
        result: Result = await waiting
        return result

    def resize(self, size: int) -> None:
        """Keep at most so many open from now on; those in use stay until they are not."""
        self._size = size
        while len(self._open) > size and self._evict():
            pass

    async def close(self) -> None:
        """Close every database. Call when no request is running."""
        tenants = list(self._open.values())
        for tenant in tenants:
            if tenant.opening is not None:
                await asyncio.wait({tenant.opening})
        self._open.clear()
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._executor, close, t) for t in tenants if not t.closing))
        self._executor.shutdown(wait=True)

    async def _run(self, tenant_id: str, step: Callable[[OpenTenant, Job[Result]], Result], job: Job[Result]) -> Result:
        tenant = await self._admit(tenant_id)
        try:
            await tenant.lock.acquire()
        except BaseException:
            self._released(tenant)
            raise
        # From here the thread owns the handle: it is given back when the thread is done with it, not when this
        # coroutine is cancelled.
        if step is read_and_renew:
            tenant.inline = False
        future = asyncio.get_running_loop().run_in_executor(self._executor, step, tenant, job)
        future.add_done_callback(partial(self._finished, tenant))
        return await asyncio.shield(future)

    async def _write_waiting(self, tenant: OpenTenant) -> None:
        """Write what waits, one transaction after the other, until nothing does. One such task a tenant."""
        loop = asyncio.get_running_loop()
        while True:
            await tenant.lock.acquire()
            members, left = tenant.writes.take(BATCH)
            error: BaseException | None = None
            try:
                if members:
                    jobs = [job for job, _ in members]
                    outcomes = await loop.run_in_executor(self._executor, write, tenant, jobs)
            except BaseException as e:  # noqa: BLE001  it is the members' to raise
                error = e
                self._note(tenant, e)
            tenant.lock.release()
            for n, (_, waiting) in enumerate(members):
                if not waiting.done():  # its caller may have been cancelled
                    failed = error or outcomes[n].error
                    if failed is None:
                        waiting.set_result(outcomes[n].value)
                    else:
                        waiting.set_exception(again(failed))
            if not members:
                tenant.writing = None
            for _ in range(len(members) + left):
                self._released(tenant)
            if not members:
                return

    async def _admit(self, tenant_id: str) -> OpenTenant:
        """The open tenant with one user more, within the bounds on what may wait."""
        if self._queued >= self._queue_limit:
            raise shed("The server is busy.")
        self._queued += 1
        try:
            tenant = await self._acquire(tenant_id)
        except BaseException:
            self._queued -= 1
            raise
        if tenant.users > PER_TENANT_QUEUE:
            self._released(tenant)
            raise shed("The tenant has too many requests waiting.")
        return tenant

    def _finished(self, tenant: OpenTenant, future: asyncio.Future[Result]) -> None:
        self._note(tenant, None if future.cancelled() else future.exception())
        tenant.inline = tenant.link != ""
        tenant.lock.release()
        self._released(tenant)

    def _note(self, tenant: OpenTenant, error: BaseException | None) -> None:
        if isinstance(error, CorruptDatabase):
            metrics.db_open_failures_total.inc()
            self._discard(tenant)

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
            await loop.run_in_executor(
                self._executor, open_worker, tenant, self._busy_timeout_seconds, self._lock_wait_seconds
            )
        except BaseException as e:
            if isinstance(e, (TenantDatabaseUnavailable, CorruptDatabase, SchemaTooNew)):
                metrics.db_open_failures_total.inc()
            tenant.closing = True
            self._forget(tenant)
            raise
        tenant.opening = None

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
        self._executor.submit(close, tenant)
