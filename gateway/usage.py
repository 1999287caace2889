"""A tenant's own counters, from the control plane's hourly rollups, and the size of its database.

The only request that asks PostgreSQL. It has its own two threads and a short queue: a control plane that takes
its connect time-out must not keep threads from the tenants' databases.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from gateway.problems import shed
from gateway.schemas import UsageView
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.storage import storage_bytes
from shared.tenant import TenantPaths

_THREADS = 2
_QUEUE = 16


class UsageReport:
    def __init__(self, control_plane: ControlPlane, settings: Settings) -> None:
        self._control_plane = control_plane
        self._tenants_dir = settings.tenants_dir
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="usage")
        self._queued = 0

    async def of(self, tenant_id: str, since: datetime, until: datetime) -> UsageView:
        """Raises `ControlPlaneUnavailable`; sheds when too many wait."""
        if self._queued >= _QUEUE:
            raise shed("Too many usage reports are waiting.")
        self._queued += 1
        future = asyncio.get_running_loop().run_in_executor(self._executor, self._read, tenant_id, since, until)
        future.add_done_callback(self._finished)
        return await asyncio.shield(future)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _finished(self, _: asyncio.Future[UsageView]) -> None:
        self._queued -= 1

    def _read(self, tenant_id: str, since: datetime, until: datetime) -> UsageView:
        row = self._control_plane.row("usage_totals", **{"tenant_id": tenant_id, "from": since, "to": until})
        assert row is not None  # an aggregate without GROUP BY always has one row
        return UsageView(
            tenant_id=tenant_id,
            from_=since.isoformat(),
            to=until.isoformat(),
            api_calls=row["api_calls"],
            search_queries=row["search_queries"],
            memories_created=row["memories_created"],
            storage_bytes=storage_bytes(TenantPaths.of(self._tenants_dir, tenant_id)),
        )
