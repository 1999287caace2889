"""Which tenants are active, here or on another machine, known to this worker without asking PostgreSQL in a request.

What changed is read every `tenant_refresh_seconds`; when the control plane does not answer the last map stands. A
tenant the map does not hold (or holds half-made) triggers one read for everybody who waits for it, at most
every `ON_DEMAND_SECONDS`: a tenant works the moment it was created, and a flood of tokens for tenants that do
not exist costs two queries a second. A read that began before the question was asked does not answer it: who is not in
the map is unknown (403) only after one that did not, else nobody knows (503).
`look_again` asks for such a read when somebody else says that the map is old (`gateway.routing`).
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

import psycopg

from shared.errors import ControlPlaneUnavailable
from shared.log import get_logger
from shared.registry import KnownTenants, Standing

ON_DEMAND_SECONDS = 0.5
PATIENCE_SECONDS = 3.0
log = get_logger("tenants")


class Tenants:
    """For one event loop; the reads run in a thread of its own, one at a time."""

    def __init__(self, known: KnownTenants, refresh_seconds: float) -> None:
        self._known = known
        self._refresh_seconds = refresh_seconds
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="tenants")
        self._loop_task: asyncio.Task[None] | None = None
        self._asked: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()
        self._asked_at = self._read_at = float("-inf")  # of the last read that succeeded: when it began
        self._failing = False

    @property
    def loaded(self) -> bool:
        return self._known.loaded

    def knows(self, tenant_id: str) -> bool:
        """Whether there is such a tenant, as far as was read."""
        return tenant_id in self._known.standings

    def is_active(self, tenant_id: str) -> bool:
        """Whether it is active and here, as far as was read. False is no answer: ask for its `standing` then."""
        return self._known.standings.get(tenant_id) == "active"

    def start(self) -> None:
        self._loop_task = asyncio.get_running_loop().create_task(self._refresh_for_ever())

    async def stop(self) -> None:
        tasks = [t for t in (self._loop_task, *self._running) if t is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def standing(self, tenant_id: str) -> Standing | None:
        """How the tenant stands, None if there is none. Raises `ControlPlaneUnavailable` when that is not known."""
        standing = self._known.standings.get(tenant_id)
        if standing is None or standing == "creating":
            asked_at = time.monotonic()
            standing = await self.look_again(tenant_id)
            if standing in (None, "creating") and self._read_at < asked_at:
                raise ControlPlaneUnavailable("how the tenant stands could not be read")
        return standing

    async def look_again(self, tenant_id: str) -> Standing | None:
        """As `standing`, by a read that begins now, or what was known when none ends in time."""
        await asyncio.wait({self._ask()}, timeout=PATIENCE_SECONDS)
        return self._known.standings.get(tenant_id)

    def _ask(self) -> asyncio.Task[None]:
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_task(self._read_on_demand())
            self._running.add(self._asked)
            self._asked.add_done_callback(self._running.discard)
        return self._asked

    async def _read_on_demand(self) -> None:
        async with self._turn:  # one reads, at most one waits, also while each takes until its time-out
            await asyncio.sleep(max(0.0, self._asked_at + ON_DEMAND_SECONDS - time.monotonic()))
            self._asked_at = time.monotonic()
            self._asked = None  # whoever asks from here on needs a later read
            await self._read(on_demand=True)

    async def _refresh_for_ever(self) -> None:
        while True:
            await self._read(on_demand=False)
            await asyncio.sleep(self._refresh_seconds)

    async def _read(self, *, on_demand: bool) -> None:
        try:
            began = await asyncio.get_running_loop().run_in_executor(self._executor, self._refresh, on_demand)
        except (ControlPlaneUnavailable, psycopg.Error) as e:
            if not self._failing:
                log.error("tenants_unread", cause=str(e)[:300], tenants=len(self._known.standings))
            self._failing = True
        else:
            self._read_at = began
            if self._failing:
                log.info("tenants_read_again", tenants=len(self._known.standings))
            self._failing = False

    def _refresh(self, on_demand: bool) -> float:
        """In the thread; when the read began."""
        began = time.monotonic()
        self._known.refresh(on_demand=on_demand)
        return began
