"""A tenant's own counters, from the control plane's hourly rollups, and the size of its database now.

The only request that asks PostgreSQL. It has its own two threads and a short queue: a control plane that takes
its connect time-out must not keep threads from the tenants' databases.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from gateway.problems import shed
from gateway.schemas import UsageBucket, UsageView
from shared import usage_report
from shared.control_plane import ControlPlane
from shared.settings import Settings
from shared.storage import storage_bytes
from shared.tenant import TenantPaths
from shared.usage_report import Granularity

_THREADS = 2
_QUEUE = 16


class UsageReport:
    def __init__(self, control_plane: ControlPlane, settings: Settings) -> None:
        self._control_plane = control_plane
        self._settings = settings
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="usage")
        self._queued = 0

    async def of(self, tenant_id: str, since: datetime, until: datetime, granularity: Granularity) -> UsageView:
        """Raises `ControlPlaneUnavailable`; sheds when too many wait."""
        if self._queued >= _QUEUE:
            raise shed("Too many usage reports are waiting.")
        self._queued += 1
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, self._read, tenant_id, since, until, granularity)
        future.add_done_callback(self._finished)
        return await asyncio.shield(future)

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _finished(self, _: asyncio.Future[UsageView]) -> None:
        self._queued -= 1

    def _read(self, tenant_id: str, since: datetime, until: datetime, granularity: Granularity) -> UsageView:
        found = usage_report.read(self._control_plane, self._settings, tenant_id, since, until, granularity)
        return UsageView(
            tenant_id=tenant_id,
            from_=since.isoformat(),
            to=until.isoformat(),
            **found.totals._asdict(),
            storage_bytes=storage_bytes(TenantPaths.of(self._settings.tenants_dir, tenant_id)),
            granularity=granularity,
            complete_until=found.complete_until.isoformat() if found.complete_until is not None else None,
            buckets=[
                UsageBucket(b.bucket.isoformat(), *b.counters, storage_bytes=b.storage_bytes) for b in found.buckets
            ],
        )
