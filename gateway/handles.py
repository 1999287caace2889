"""One tenant's open handles, and what a pool's threads do with them (`gateway.pool`)."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from typing import TypeVar

from gateway.writes import WriteQueue
from shared.engine import batch
from shared.engine.database import TenantDatabase
from shared.errors import InMaintenance, TenantDatabaseUnavailable
from shared.log import get_logger
from shared.tenant import TenantPaths

Result = TypeVar("Result")
Job = Callable[[sqlite3.Connection], Result]
log = get_logger("pool")


class OpenTenant:
    """One tenant's two handles. Only the event loop touches the fields; threads get the handles."""

    __slots__ = (
        "closing",
        "current",
        "inline",
        "link",
        "lock",
        "opening",
        "paths",
        "reader",
        "users",
        "worker",
        "writes",
        "writing",
    )

    def __init__(self, paths: TenantPaths) -> None:
        self.paths = paths
        self.current = str(paths.current)
        self.worker: TenantDatabase | None = None
        self.reader: TenantDatabase | None = None
        self.link = ""  # what `current` said when the reader was opened
        self.inline = False  # the loop may use the reader: no thread is opening or closing it
        self.users = 0
        self.lock = asyncio.Lock()
        self.writes = WriteQueue()
        self.writing: asyncio.Task[None] | None = None
        self.opening: asyncio.Task[None] | None = None
        self.closing = False


def open_worker(tenant: OpenTenant, busy_timeout_seconds: float, lock_wait_seconds: float) -> None:
    """The worker alone; it may have to migrate, and may wait for that. The reader would double the cost of opening
    (200 µs each, with the close): it waits for a second lookup."""
    worker = TenantDatabase(
        tenant.paths, busy_timeout_seconds=busy_timeout_seconds, lock_wait_seconds=lock_wait_seconds
    )
    try:
        with worker.read():
            pass
    except BaseException:
        worker.close()
        raise
    tenant.worker = worker


def read_and_renew(tenant: OpenTenant, job: Job[Result]) -> Result:
    """The slow path of a lookup: also opens the current generation for the reader."""
    result = read(tenant, job)
    _renew_reader(tenant)
    return result


def read(tenant: OpenTenant, job: Job[Result]) -> Result:
    assert tenant.worker is not None
    with tenant.worker.read() as connection:
        return job(connection)


def write(tenant: OpenTenant, jobs: list[batch.Job]) -> list[batch.Outcome]:
    assert tenant.worker is not None
    return batch.commit(tenant.worker, jobs)


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


def close(tenant: OpenTenant) -> None:
    for handle in (tenant.worker, tenant.reader):
        try:
            if handle is not None:
                handle.close()
        except sqlite3.Error as e:
            log.error("tenant_database_close_failed", tenant_id=tenant.paths.tenant_id, cause=str(e))
