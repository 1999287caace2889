"""A tenant's own counters, from the control plane's hourly rollups, and how many bytes it keeps now.

The only request that asks PostgreSQL. It has its own two threads and a short queue: a control plane that takes
its connect time-out must not keep threads from the tenants' databases. Nor places to work (`gateway.shed`) from other
requests: what is not there after `usage_report_wait_seconds` is not waited for any longer, what no thread has begun by
then never is, and while both threads are held up by what nobody waits for any more there is nothing to wait for.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from gateway.problems import shed
from gateway.schemas import UsageBucket, UsageView
from shared import usage_report
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable
from shared.settings import Settings
from shared.storage import UNREAD, storage_bytes
from shared.tenant import TenantPaths
from shared.usage_report import Granularity

_THREADS = 2
_QUEUE = 16


class UsageReport:
    def __init__(self, control_plane: ControlPlane, settings: Settings) -> None:
        self._control_plane = control_plane
        self._settings = settings
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="usage")
        self._wait_seconds = settings.usage_report_wait_seconds
        self._asked_at: dict[asyncio.Future[UsageView], float] = {}  # of those that wait and those in a thread

    async def of(self, tenant_id: str, since: datetime, until: datetime, granularity: Granularity) -> UsageView:
        """Raises `ControlPlaneUnavailable`, also when it has not answered in time; sheds when too many wait."""
        now = time.monotonic()
        if sum(now - asked_at > self._wait_seconds for asked_at in self._asked_at.values()) >= _THREADS:
            raise ControlPlaneUnavailable("control plane: it has not answered earlier reports yet")
        if len(self._asked_at) >= _QUEUE:
            raise shed("Too many usage reports are waiting.")
        job = self._executor.submit(self._read, tenant_id, since, until, granularity)
        answer = asyncio.wrap_future(job)
        self._asked_at[answer] = now
        answer.add_done_callback(self._finished)
        try:
            await asyncio.wait({answer}, timeout=self._wait_seconds)
        finally:
            job.cancel()  # which does nothing to one that a thread has begun
        if not answer.done():
            raise ControlPlaneUnavailable(f"control plane: no answer within {self._wait_seconds:g} s")
        return answer.result()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _finished(self, answer: asyncio.Future[UsageView]) -> None:
        del self._asked_at[answer]
        if not answer.cancelled():
            answer.exception()  # who waited for it has been told; asyncio would log what nobody looked at

    def _read(self, tenant_id: str, since: datetime, until: datetime, granularity: Granularity) -> UsageView:
        found = usage_report.read(self._control_plane, self._settings, tenant_id, since, until, granularity)
        return UsageView(
            tenant_id=tenant_id,
            from_=since.isoformat(),
            to=until.isoformat(),
            **found.totals._asdict(),
            storage_bytes=self._kept(tenant_id),
            granularity=granularity,
            complete_until=found.complete_until.isoformat() if found.complete_until is not None else None,
            buckets=[
                UsageBucket(b.bucket.isoformat(), *b.counters, storage_bytes=b.storage_bytes) for b in found.buckets
            ],
        )

    def _kept(self, tenant_id: str) -> int | None:
        """None when its database cannot be read just now: the counters are told all the same."""
        try:
            return storage_bytes(TenantPaths.of(self._settings.tenants_dir, tenant_id))
        except UNREAD:
            return None
