"""A worker's open tenant databases: at most `tenant_pool_size`; who was used once and longest ago is closed first.

Each open tenant has one to three fenced connections (`gateway.handles`). `reader`, there from the second lookup on,
serves lookups by id on the event loop, in microseconds and without waiting for anything: when one would have to wait
(a swap, a busy file, a new generation to open) it takes the slow path instead. `worker` does everything else in a few
threads: search, lists, writes (they fsync), opening, closing. A search that takes long goes on with it alone
(`gateway.turns`).

Writes that arrive while a tenant's last transaction is being fsynced wait together and become the next one
(`shared.engine.batch`), and those that arrive while it still runs statements join it: the busier a tenant, the fewer
fsyncs a write costs it. Nobody is made to wait for company, nor who has written for the checkpoint of what
is committed.

Nothing queues without a bound: one thread at a time per tenant and one for a long search, `PER_TENANT_QUEUE` jobs
behind them, and `gateway_threads * QUEUE_PER_THREAD` jobs in all; beyond that requests are shed. A hot tenant waits on
its own lock, not in the threads, so it cannot take them from the others (`gateway.turns`). What no thread has begun
within `database_wait_seconds` is shed, and never begun, unless its tenant's handles are being given up meanwhile.

What an open tenant costs (measured): 0.2 MB and 4 descriptors with one connection, 0.35 MB and 9 with two, 14 with
three, and 0.1 MB more for one that writes many memories at a time. Page caches come on top, up to 2 MB a connection,
until all of SQLite's memory in this process reaches `sqlite_heap_bytes`; then a cache that needs a page takes its own
oldest (searches over 5,000 memories cost 7% more CPU with 0.5 MB each).
The pool never grows past what the file limit allows, whatever its size is set to.
"""

from __future__ import annotations

import asyncio
import resource
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing

from gateway.handles import (
    Job,
    OpenTenant,
    Result,
    checkpoint,
    close,
    close_and_fold,
    read,
    read_and_renew,
    read_apart,
    write,
)
from gateway.problems import shed
from gateway.reads import Read
from gateway.recency import Recency
from gateway.shed import bounded
from gateway.threads import Threads
from gateway.turns import ReadTurns
from gateway.writes import Member, again
from shared import metrics
from shared.engine.batch import Outcome
from shared.errors import CorruptDatabase, InMaintenance, TenantDatabaseUnavailable
from shared.settings import Settings
from shared.tenant import TenantPaths

QUEUE_PER_THREAD = 64
PER_TENANT_QUEUE = 64
# Writes in one transaction: no more than may wait anyway. With 8 at most a tenant's creates are 43% fewer a second, and
# their p95 at the same load is the same 2.0 ms.
BATCH = 64
ROOM_WAIT_SECONDS = 0.5
FILES_PER_TENANT = 14
FILES_FOR_THE_REST = 200  # sockets, spool, control plane; each request may bring a socket more
LOOK_SECONDS = 0.1  # between two looks at who has waited for too long
_POLL_SECONDS = 0.01


class TenantPool:
    """For one event loop. Callers must have checked that the tenant is active."""

    def __init__(self, settings: Settings) -> None:
        self._tenants_dir = settings.tenants_dir
        self._lock_wait_seconds = settings.tenant_lock_wait_seconds
        self._busy_timeout_seconds = settings.sqlite_busy_timeout_seconds
        self._query_timeout_seconds = settings.query_timeout_seconds
        self._threads = Threads(settings.gateway_threads, "sqlite")
        self._turns = ReadTurns(self._threads, settings.gateway_threads, self._answered, self._close_if_left)
        self._queue_limit = settings.gateway_threads * QUEUE_PER_THREAD
        self._queued = 0
        self._wait_seconds = settings.database_wait_seconds
        self._looking = False
        self._writing: set[asyncio.Task[None]] = set()
        self._open: Recency[OpenTenant] = Recency(_within_file_limit(settings.tenant_pool_size))
        self._leaving: set[OpenTenant] = set()  # discarded, not yet closed
        with closing(sqlite3.connect(":memory:")) as any_database:  # the limit is the process's
            any_database.execute(f"PRAGMA soft_heap_limit = {settings.sqlite_heap_bytes}")

    async def look_up(self, tenant_id: str, job: Job[Result]) -> Result:
        """A read of a few rows by key: on the loop when it need not wait, else as `read`."""
        tenant = self._open.get(tenant_id)
        if tenant is not None and tenant.inline and tenant.reader is not None:
            self._open.use(tenant_id)
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

    async def read(self, tenant_id: str, job: Job[Result], *, brief: bool = False) -> Result:
        """Run `job`, which never takes long if it is `brief`, on a fenced connection in a thread. Raises what
        `TenantDatabase.read` raises."""
        return await self._run(tenant_id, read if brief else read_apart, bounded(job, self._query_timeout_seconds))

    async def write(self, tenant_id: str, job: Job[Result]) -> Result:
        """Run `job` in a transaction in a thread; when this returns it is committed and fsynced.

        The transaction may hold other callers' jobs, and `job` may be run a second time after a rollback. A caller
        that is cancelled before its job began leaves no trace; after that the job is stored all the same.
        """
        tenant = await self._admit(tenant_id)
        waiting = tenant.writes.put(job, time.monotonic())
        if tenant.writing is None:
            tenant.writing = asyncio.get_running_loop().create_task(self._write_waiting(tenant))
            self._writing.add(tenant.writing)
            tenant.writing.add_done_callback(self._writing.discard)
        result: Result = await waiting
        return result

    def resize(self, size: int) -> None:
        """Keep at most so many open from now on; those in use stay until they are not."""
        self._open.size = _within_file_limit(size)
        while len(self._open) > self._open.size and self._evict():
            pass

    def restart(self, tenant_id: str) -> Callable[[], bool]:
        """Let the tenant's next request open its database anew. The answer says whether what was open is closed: it is
        once who uses it now is done."""
        tenant = self._open.get(tenant_id)
        if tenant is not None:
            self._discard(tenant)
        # Those that were evicted before, too; and not by their handles, which are let go of before they are closed.
        leaving = [each for each in self._leaving if each.paths.tenant_id == tenant_id]
        return lambda: self._leaving.isdisjoint(leaving)

    async def close(self) -> None:
        """Close every database. Call when no request is running."""
        # Who closes a database last folds it, so what was evicted is closed before what took its place; and a thread
        # may still be busy for a caller that has left.
        while self._leaving or any(tenant.is_busy for tenant in self._open.leaving()):
            await asyncio.sleep(_POLL_SECONDS)
        await asyncio.gather(*(self._close_for_good(tenant) for tenant in self._open.clear()))
        self._threads.close()

    async def _close_for_good(self, tenant: OpenTenant) -> None:
        async with tenant.lock:  # the thread that answered its last user may not be done with it
            await self._threads.run(close_and_fold, tenant)

    async def _run(self, tenant_id: str, step: Callable[[OpenTenant, Job[Result]], Result], job: Job[Result]) -> Result:
        tenant = await self._admit(tenant_id)
        answer: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        # From here the thread owns the handle: it is given back when the thread is done with it, not when this
        # coroutine is cancelled.
        slow, renews = step is read_apart, step is read_and_renew
        tenant.reads.put(Read(step, job, answer, slow, time.monotonic()), renews=renews)
        if renews:
            tenant.inline = False
        await self._turns.begin(tenant, slow)
        return await answer

    async def _write_waiting(self, tenant: OpenTenant) -> None:
        """Write what waits, one transaction after the other, until nothing does. One such task a tenant."""
        try:
            while tenant.writes:
                async with tenant.lock:
                    await self._write_together(tenant)
                    if tenant.checkpoint_due:
                        await self._threads.run(checkpoint, tenant)
                self._release_unwritten(tenant)
        finally:
            tenant.writing = None
            self._close_if_left(tenant)

    async def _write_together(self, tenant: OpenTenant) -> None:
        members: list[Member] = []
        outcomes: list[Outcome] = []
        error: BaseException | None = None
        try:
            outcomes = await self._threads.run(write, tenant, members, BATCH)
        except BaseException as e:  # noqa: BLE001  it is the members' to raise
            error = e
            self._note(tenant, e)
        for n, (_, waiting, _) in enumerate(members):
            if not waiting.done():  # its caller may have been cancelled
                failed = error or outcomes[n].error
                if failed is None:
                    waiting.set_result(outcomes[n].value)
                else:
                    waiting.set_exception(again(failed))
        for _ in members:
            self._released(tenant)

    def _release_unwritten(self, tenant: OpenTenant) -> None:
        """Give back the places of those that no transaction met."""
        unwritten = tenant.writes.left + tenant.writes.overdue
        tenant.writes.left = tenant.writes.overdue = 0
        for _ in range(unwritten):
            self._released(tenant)

    async def _admit(self, tenant_id: str) -> OpenTenant:
        """The open tenant with one user more, within the bounds on what may wait."""
        if self._queued >= self._queue_limit:
            raise shed("The server is busy.")
        self._queued += 1
        if not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)
        try:
            tenant = self._open.use(tenant_id) or await self._make_room(tenant_id)
        except BaseException:
            self._queued -= 1
            raise
        tenant.users += 1
        if tenant.users > PER_TENANT_QUEUE:
            self._released(tenant)
            raise shed("The tenant has too many requests waiting.")
        return tenant

    def _look(self) -> None:
        """Shed what has waited for too long. Writes keep their places until the one that is under way is done."""
        asked_before = time.monotonic() - self._wait_seconds
        for tenant in [tenant for tenant in self._open.leaving() if tenant.users]:
            reads = tenant.reads.take_overdue(asked_before)
            writes = tenant.writes.take_overdue(asked_before)
            for answer in [*(each.answer for each in reads), *(each.answer for each in writes)]:
                if not answer.done():
                    answer.set_exception(shed("The request waited too long for its tenant's database."))
            for _ in reads:
                self._released(tenant)
        self._looking = self._queued > 0
        if self._looking:
            asyncio.get_running_loop().call_later(LOOK_SECONDS, self._look)

    def _answered(self, tenant: OpenTenant, error: BaseException | None) -> None:
        self._note(tenant, error)
        self._released(tenant)

    def _note(self, tenant: OpenTenant, error: BaseException | None) -> None:
        if error is not None and tenant.worker is None and tenant.searcher is None:
            self._discard(tenant)  # it could not be opened; the place is free
        elif isinstance(error, CorruptDatabase):
            metrics.db_open_failures_total.inc()
            self._discard(tenant)

    def _released(self, tenant: OpenTenant) -> None:
        self._queued -= 1
        tenant.users -= 1
        self._close_if_left(tenant)

    async def _make_room(self, tenant_id: str) -> OpenTenant:
        """A place for the tenant, once one is free; its first user's thread opens it. Sheds when none becomes free."""
        deadline = time.monotonic() + ROOM_WAIT_SECONDS
        while len(self._open) >= self._open.size and not self._evict():
            if time.monotonic() >= deadline:
                raise shed("Too many tenants are in use at once.")
            await asyncio.sleep(_POLL_SECONDS)
            if (tenant := self._open.use(tenant_id)) is not None:
                return tenant
        paths = TenantPaths.of(self._tenants_dir, tenant_id)
        tenant = OpenTenant(paths, self._busy_timeout_seconds, self._lock_wait_seconds)
        self._open.add(tenant_id, tenant)
        return tenant

    def _evict(self) -> bool:
        for tenant in self._open.leaving():
            if tenant.users == 0:
                self._discard(tenant)
                return True
        return False

    def _discard(self, tenant: OpenTenant) -> None:
        """Forget it now, close it when its last user is gone."""
        if tenant.closing:
            return
        tenant.closing = True
        tenant.inline = False
        self._leaving.add(tenant)
        self._forget(tenant)
        self._close_if_left(tenant)

    def _forget(self, tenant: OpenTenant) -> None:
        if self._open.get(tenant.paths.tenant_id) is tenant:
            self._open.remove(tenant.paths.tenant_id)

    def _close_if_left(self, tenant: OpenTenant) -> None:
        """Once its last user is gone, what they wrote is where it belongs, and no turn is left that wants a handle."""
        if tenant.closing and not tenant.is_busy:
            tenant.inline = False
            self._threads.run(close, tenant, then=lambda _error: self._leaving.discard(tenant))


def _within_file_limit(size: int) -> int:
    """At most `size`; fewer when the process may not open so many files: an open database that cannot get its
    `-wal` fails the request, and a place less only costs time."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return size
    return max(1, min(size, (soft - FILES_FOR_THE_REST) // FILES_PER_TENANT))
