"""Wiring: the parts of one gateway worker, in the order they start and, backwards, stop.

    Granian worker → Edge → Heads → Litestar → guard → handler → TenantPool → SQLite
                       └→ Spool, metrics, access log     └→ Authenticator, Routing, RateLimiter, Quotas, Gate

`create_app` imports and wires; nothing is opened before the ASGI lifespan starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import math
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence

import httpx
from litestar import Litestar
from litestar.exceptions import MethodNotAllowedException, NotFoundException
from litestar.routes import HTTPRoute

from gateway import admin, document, health, v1
from gateway.access_log import FLUSH_SECONDS, AccessLog
from gateway.auth import Authenticator
from gateway.busiest import LOOK_SECONDS, Busiest
from gateway.edge import ASGIApp, Edge
from gateway.exposition import Exposition
from gateway.forward import Forwarder
from gateway.headers import Heads
from gateway.jwks import Jwks
from gateway.mcp import route as mcp
from gateway.patience import Patience
from gateway.periodic import Periodic, stop_all
from gateway.pool import TenantPool
from gateway.problems import answer
from gateway.pulse import BEAT_SECONDS, Pulse
from gateway.quota import CountingSpool, Quotas
from gateway.ratelimit import RateLimiter
from gateway.routing import Routing
from gateway.self_report import SelfReport
from gateway.services import Services
from gateway.shed import Gate
from gateway.shortcut import Shortcut
from gateway.silence import CAN_LOOK, STOPPING, Silence
from gateway.silence import LOOK_SECONDS as SILENCE_SECONDS
from gateway.steering import steer_here
from gateway.tenants import Tenants
from gateway.unread import cut_off_unread
from gateway.unrouted import unrouted
from gateway.usage import UsageReport
from shared import metrics, metrics_files
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, SpoolUnavailable
from shared.limits import Limits, Watch
from shared.log import configure, get_logger
from shared.registry import KnownTenants
from shared.settings import Settings
from shared.settings import settings as settings_from_environment
from shared.sweep import sweep_disk
from shared.workers import Announcement

FLEET_SECONDS = 15.0
MEASURE_SECONDS = 1.0
METRICS_SECONDS = 1.0
PARENT_SECONDS = 0.5
READY_POLL_SECONDS = 0.05
WAIT_SAID_SECONDS = 1.0  # a worker that starts as usual is ready sooner
STOP_SECONDS = 2.0  # for what works every so often to end a turn
ACTIONS_SHARE = 2  # of the time a stopping worker has before it is killed, which its requests may have used up
GC_YOUNG_OBJECTS = 10_000  # at most: 0.2 ms of the event loop
log = get_logger("gateway")


def create() -> ASGIApp:
    """The factory for an ASGI server started by hand; `engram serve` goes through `gateway.serve`."""
    return create_app(settings_from_environment())


def create_app(settings: Settings, parent_pid: int | None = None, pulse: Pulse | None = None) -> ASGIApp:
    """One worker's ASGI application. With `parent_pid` it ends itself when that process is gone, with `pulse` that
    process can see that it lives."""
    settings.require("control_plane_url", "jwks_url", "jwt_issuer")
    configure(settings.log_level)
    metrics.initialise()
    metrics_files.settle()
    usage_spool = CountingSpool(settings)
    access_log = AccessLog()
    busiest = Busiest()

    @contextlib.asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with _running(app, settings, usage_spool, access_log, busiest, edge, parent_pid, pulse):
            yield

    app = Litestar(
        route_handlers=[v1.router(), admin.router(), mcp.router(), health.health, health.ready, health.prometheus],
        lifespan=[lifespan, mcp.lifespan],
        exception_handlers={Exception: answer, NotFoundException: unrouted, MethodNotAllowedException: unrouted},
        openapi_config=document.config() if settings.docs_pages else None,
        logging_config=None,  # Litestar would log headers and bodies
        debug=False,
        request_max_body_size=settings.body_limit_bytes,
    )
    methods = {route.path_format: route.methods for route in app.routes if isinstance(route, HTTPRoute)}
    heads = Heads(Shortcut(app), settings, methods)
    durable = settings.usage_durability == "sync"
    edge = Edge(heads, usage_spool, access_log, busiest, pulse, durable=durable)
    return edge


@contextlib.asynccontextmanager
async def _running(
    app: Litestar,
    settings: Settings,
    usage_spool: CountingSpool,
    access_log: AccessLog,
    busiest: Busiest,
    edge: Edge,
    parent_pid: int | None,
    pulse: Pulse | None,
) -> AsyncIterator[None]:
    _raise_file_limit()
    await asyncio.to_thread(sweep_disk, settings)  # what a restore that died with the machine left is settled first
    control_plane = ControlPlane(settings, pool_size=2)
    limits = Watch(settings)
    await asyncio.to_thread(limits.poll)
    rates = RateLimiter(settings, limits)
    patience = Patience(settings, STOPPING)
    forwarder = Forwarder(settings, patience)
    tenants = Tenants(KnownTenants.of(control_plane, settings.machine_id), settings.tenant_refresh_seconds)
    jwks = Jwks(settings, httpx.AsyncClient(timeout=settings.jwks_timeout_seconds))
    services = app.state.services = Services(
        settings=settings,
        spool=usage_spool,
        jwks=jwks,
        authenticator=Authenticator(settings, jwks),
        tenants=tenants,
        routing=Routing(settings, tenants, rates, forwarder),
        pool=TenantPool(settings),
        usage=UsageReport(control_plane, settings),
        rates=rates,
        quotas=Quotas(control_plane, settings),
        gate=Gate(settings, limits),
        operations=admin.Operations(settings, control_plane),
        patience=patience,
        exposition=Exposition(metrics.render, settings.metrics_cache_seconds),
    )
    usage_spool.quotas = services.quotas
    services.tenants.start()
    if pulse is not None:
        pulse.start()
        await _wait_while_others_serve(services, pulse)
    announcement = Announcement(settings)  # from here on there is somebody who obeys limits and has usage in hand
    report = SelfReport(services, busiest, announcement)
    limits.listen(_appliance(services, report))

    def look_at_limits() -> None:
        limits.poll()
        announcement.obeys(limits.version)
        announcement.has(usage_spool.spooled)
        report.publish()

    tick_seconds = min(settings.usage_fsync_seconds, settings.usage_flush_seconds) / 2
    work = [
        Periodic("access-log", FLUSH_SECONDS, access_log.drain).start(),
        Periodic("spool", tick_seconds, usage_spool.tick).start(),
        Periodic("metrics", METRICS_SECONDS, metrics_files.settle).start(),
        Periodic("spool-size", MEASURE_SECONDS, usage_spool.measure, at_once=True).start(),
        Periodic("limits", settings.limits_poll_seconds, look_at_limits, at_once=True).start(),
        Periodic("busiest", LOOK_SECONDS, busiest.look).start(),
        Periodic("quota", settings.quota_refresh_seconds, services.quotas.refresh, at_once=True).start(),
        Periodic("fleet", FLEET_SECONDS, lambda: _observe_fleet(control_plane), at_once=True).start(),
    ]
    if CAN_LOOK:
        work.append(Periodic("silence", SILENCE_SECONDS, Silence(settings, edge.is_idle).look).start())
    if parent_pid is not None:
        cut_off_unread(settings.gateway_port, settings.answer_stall_seconds)
        orphaned = _end_orphan(parent_pid, settings.gateway_kill_timeout_seconds)
        work.append(Periodic("parent", PARENT_SECONDS, orphaned).start())
    if pulse is not None:
        pulse.serve()
        work.append(Periodic("pulse", BEAT_SECONDS, pulse.observe).start())
        if pulse.steers_to >= 0:
            steer_here(settings.gateway_port, pulse.steers_to)
    _spare_the_collector()
    log.info("worker_started", pid=os.getpid(), port=settings.gateway_port)
    try:
        yield
    finally:
        try:
            await services.tenants.stop()
            await services.pool.close()
            await jwks.close()
            await forwarder.close()
            services.usage.close()
        finally:
            await asyncio.to_thread(_seal, usage_spool, work)
        await services.operations.close(settings.gateway_kill_timeout_seconds / ACTIONS_SHARE)
        await asyncio.to_thread(control_plane.close)
        services.rates.close()
        announcement.close()
        log.info("worker_stopped", pid=os.getpid())
        access_log.drain()


async def _wait_while_others_serve(services: Services, pulse: Pulse) -> None:
    """A worker that takes a dead or a leaving one's place listens once it can judge who calls. While PostgreSQL or the
    issuer is silent the others go on with what they know, and it would refuse its share of their connections."""
    if not (pulse.respawned or pulse.steers_to >= 0):
        return
    say_at = time.monotonic() + WAIT_SAID_SECONDS
    while pulse.others_serve() and not STOPPING.is_set() and (failing := await health.failing_checks(services)):
        if time.monotonic() >= say_at:
            log.warning("worker_waits", failing=failing)
            say_at = math.inf
        await asyncio.sleep(READY_POLL_SECONDS)


def _seal(usage_spool: CountingSpool, work: Sequence[Periodic]) -> None:
    """What must not be missing when a worker ends, whatever else went wrong before."""
    stop_all(work, STOP_SECONDS)
    try:
        usage_spool.close()
    except SpoolUnavailable as e:
        log.error("usage_events_unwritten", cause=str(e), lost=usage_spool.give_up())
    metrics_files.settle()  # the last chance of what was counted in memory


def _appliance(services: Services, report: SelfReport) -> Callable[[Limits], None]:
    """What takes a changed limit to the parts that do not look it up themselves. Called in a thread."""
    loop = asyncio.get_running_loop()
    begun: set[str] = set()  # entries that are carried out once

    def apply(limits: Limits) -> None:
        services.pool.resize(limits.pool_size or services.settings.tenant_pool_size)
        if limits.jwks_refresh and limits.jwks_refresh not in begun:
            services.jwks.refresh()
            log.info("jwks_refresh_forced")
        for tenant_id, entry_id in limits.restart_tenants.items():
            if entry_id not in begun:
                report.doing(entry_id, services.pool.restart(tenant_id))
                log.info("tenant_restarted", tenant_id=tenant_id)
        begun.clear()
        begun.update({limits.jwks_refresh, *limits.restart_tenants.values()})

    def listener(limits: Limits) -> None:
        loop.call_soon_threadsafe(apply, limits)

    return listener


def _observe_fleet(control_plane: ControlPlane) -> None:
    try:
        row = control_plane.row("fleet_ages") or {}
    except ControlPlaneUnavailable:
        return  # `tenants_unread` says so already; the gauges keep their last values
    metrics.backup_oldest_success_age_seconds.set(_number(row.get("backup_age_seconds")))
    metrics.backups_corrupt.set(_number(row.get("backups_corrupt")))
    metrics.restore_test_oldest_success_age_seconds.set(_number(row.get("drill_age_seconds")))
    metrics.restore_test_last_success_age_seconds.set(_number(row.get("drill_last_age_seconds")))
    metrics.maintenance_locks.set(_number(row.get("maintenance_locks")))
    metrics.maintenance_held_seconds.set(_number(row.get("maintenance_held_seconds")))
    metrics.maintenance_overdue_seconds.set(_number(row.get("maintenance_overdue_seconds")))
    metrics.usage_partitions_ahead_days.set(_number(row.get("usage_partitions_ahead_days")))


def _number(value: object) -> float:
    """NaN for "never": 0 would say "just now"."""
    return math.nan if value is None else float(str(value))


def _spare_the_collector() -> None:
    """What was imported and wired stays: the cycle collector need not look at it again. And 32 requests at once are
    more objects than the 700 after which it would look at the youngest; of theirs hardly any are cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_YOUNG_OBJECTS, 20, 20)


def _raise_file_limit() -> None:
    """An open tenant is four to nine descriptors; the usual soft limit of 1,024 would be the pool's real size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _end_orphan(parent_pid: int, patience_seconds: float) -> Callable[[], None]:
    """A SIGKILLed supervisor leaves its workers serving the port (FACTS): they must notice and go."""
    noticed_at: float | None = None

    def check() -> None:
        nonlocal noticed_at
        if os.getppid() == parent_pid:
            return
        if noticed_at is None:
            noticed_at = time.monotonic()
            log.error("worker_orphaned", parent_pid=parent_pid)
            os.kill(os.getpid(), signal.SIGTERM)
        elif time.monotonic() - noticed_at > patience_seconds:
            os._exit(1)

    return check
