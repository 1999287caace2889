"""What the stack consists of: settings and ports resolved once, then a `Child` for every part that is ours.

A part the person brings (`ENGRAM_CONTROL_PLANE_URL`, `PREFECT_API_URL`, `ENGRAM_JWKS_URL`) is not started. In
staging and prod there are no embedded parts at all: each must be brought.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from deployments import monitoring as watch
from deployments import orchestration
from deployments.issuer import issuer_dir, issuer_url
from deployments.issuer_server import JWKS_PATH
from deployments.orchestration import http_ok
from deployments.ports import PortReservations
from deployments.postgres import EmbeddedPostgres
from deployments.process import STACK_MARK, Child, catches_sigterm
from deployments.running import resolved_values
from shared import litestream
from shared.errors import Permanent
from shared.safety import NOT_A_GATEWAYS, OF_BACKUPS
from shared.settings import Settings, variable

_LOOPBACK = "127.0.0.1"
_WORKER_POLL_SECONDS = 0.3  # each time Prefect's server is asked, which takes 10 ms of a core
_ENGRAM = (sys.executable, "-m", "deployments.cli")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts in order of start; None is a part somebody else runs."""

    settings: Settings
    postgres: EmbeddedPostgres | None
    issuer: Child | None
    prefect: Child | None
    deploy: Child
    worker: Child
    drain: Child
    litestream: Child | None
    gateway: Child
    monitoring: list[tuple[Child, str]]  # with the settings of their ports


def plan(settings: Settings, ports: PortReservations, *, monitoring: bool = False) -> Parts:
    """Decide everything before anything starts. Raises `PortBusy`, or `Permanent` for a missing setting."""
    if settings.env != "dev":
        settings.require("control_plane_url", "prefect_api_url", "jwks_url", "jwt_issuer", "object_store_url")
    logs = settings.data_dir / "logs"
    own_postgres = not settings.control_plane_url.get_secret_value()
    own_prefect = not settings.prefect_api_url
    own_issuer = not settings.jwks_url

    wanted = {"gateway_port": settings.gateway_host}
    wanted |= {"prefect_port": _LOOPBACK} if own_prefect else {}
    wanted |= {"issuer_port": _LOOPBACK} if own_issuer else {}
    wanted |= {"postgres_port": _LOOPBACK} if own_postgres else {}
    if monitoring:
        if settings.prometheus_url:
            raise Permanent("ENGRAM_PROMETHEUS_URL names a Prometheus that is there: leave it empty with --monitoring")
        wanted |= dict.fromkeys(watch.PORTS, _LOOPBACK)
    found: dict[str, Any] = {}
    for name in sorted(wanted, key=settings.is_set, reverse=True):  # a default must not take what was asked for
        found[name] = ports.reserve(settings, name, wanted[name])
    if own_prefect:
        found["prefect_api_url"] = f"http://{_LOOPBACK}:{found['prefect_port']}/api"
    if own_issuer:
        found["jwks_url"] = f"http://{_LOOPBACK}:{found['issuer_port']}{JWKS_PATH}"
        found["jwt_issuer"] = issuer_url(settings.model_copy(update={"issuer_port": found["issuer_port"]}))
    if monitoring:
        found["prometheus_url"] = f"http://{_LOOPBACK}:{found['prometheus_port']}"
        found["alertmanager_url"] = f"http://{_LOOPBACK}:{found['alertmanager_port']}"
    postgres = None
    if own_postgres:
        postgres = EmbeddedPostgres(
            settings.data_dir,
            found["postgres_port"],
            log_path=logs / "postgres.log",
            env=os.environ | {STACK_MARK: str(settings.data_dir)},
        )
        found["control_plane_url"] = SecretStr(postgres.url("engram"))
    resolved = settings.model_copy(update=found)
    environment = child_environment(resolved)
    if own_prefect:  # it is this very installation, and every client would ask for its version
        environment["PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED"] = "false"

    return Parts(
        settings=resolved,
        postgres=postgres,
        issuer=_issuer(resolved, environment) if own_issuer else None,
        prefect=_prefect(resolved, environment, postgres) if own_prefect else None,
        deploy=Child(
            "deployments",
            orchestration.deploy_argv(resolved),
            env=environment,
            log_path=logs / "deployments.log",
            ready=lambda: False,
        ),
        worker=_worker(resolved, environment),
        drain=_drain(resolved, environment),
        litestream=_litestream(resolved, environment) if litestream.enabled(resolved) else None,
        gateway=Child(
            "gateway",
            [*_ENGRAM, "serve"],
            env=_without(environment, NOT_A_GATEWAYS),
            log_path=logs / "gateway.log",
            ready=lambda: http_ok(f"{resolved.gateway_url}/ready", own=True),
        ),
        monitoring=watch.children(resolved, _without(environment, OF_BACKUPS), resolved.gateway_url)
        if monitoring
        else [],
    )


def child_environment(settings: Settings) -> dict[str, str]:
    """This process's environment completed with everything resolved, so that a child never guesses."""
    ours = {variable(name): str(value) for name, value in resolved_values(settings).items()}
    ours |= {"ENGRAM_ENV": settings.env, "ENGRAM_DATA_DIR": str(settings.data_dir)}
    ours |= {STACK_MARK: str(settings.data_dir), "PYTHONUNBUFFERED": "1"}
    ours["PYTHONSAFEPATH"] = "1"  # a folder called `gateway` or `flows` where `up` was typed is not ours
    direct = [os.environ.get("NO_PROXY") or os.environ.get("no_proxy", ""), _LOOPBACK, "localhost"]
    ours["NO_PROXY"] = ours["no_proxy"] = ",".join(filter(None, direct))  # a proxy cannot reach our loopback
    return {**os.environ, **ours, **orchestration.client_environment(settings)}


def _without(environment: dict[str, str], names: Collection[str]) -> dict[str, str]:
    """The environment but for these settings, however their variables are spelt."""
    left_out = {variable(name) for name in names}
    return {key: value for key, value in environment.items() if key.upper() not in left_out}


def _issuer(settings: Settings, environment: dict[str, str]) -> Child:
    return Child(
        "issuer",
        [
            *(sys.executable, "-m", "deployments.issuer_server", str(issuer_dir(settings.data_dir))),
            *(str(settings.issuer_port), settings.jwt_issuer),
        ],
        env=environment,
        log_path=settings.data_dir / "logs" / "issuer.log",
        ready=lambda: http_ok(settings.jwks_url),
    )


def _prefect(settings: Settings, environment: dict[str, str], postgres: EmbeddedPostgres | None) -> Child:
    # Measured, PostgreSQL | SQLite: first start 8.1 | 11.5 s, later ones 5.3 | 5.4 s, idle 2.0 | 1.9% of a core,
    # 247 | 183 MB PSS. PostgreSQL, because concurrent flow runs then never meet "database is locked".
    database_url = postgres.url("prefect") if postgres else ""
    return Child(
        "prefect",
        orchestration.server_argv(settings.prefect_port),
        env=environment | orchestration.server_environment(settings, database_url),
        log_path=settings.data_dir / "logs" / "prefect.log",
        ready=lambda: http_ok(f"{settings.prefect_api_url}/health"),
        stop_signal=signal.SIGINT,
    )


def _worker(settings: Settings, environment: dict[str, str]) -> Child:
    started_at = 0.0

    def note_start() -> None:
        nonlocal started_at
        started_at = time.time()
        orchestration.ensure_queues(settings)  # a worker whose queue is missing does not start, and is started again

    return Child(
        "worker",
        orchestration.worker_argv(),
        env=environment,
        log_path=settings.data_dir / "logs" / "worker.log",
        ready=lambda: orchestration.worker_online(settings, started_at),
        before_start=note_start,
        poll_seconds=_WORKER_POLL_SECONDS,
    )


def _drain(settings: Settings, environment: dict[str, str]) -> Child:
    child = Child(
        "drain",
        [*_ENGRAM, "drain"],
        env=environment,
        log_path=settings.data_dir / "logs" / "drain.log",
        ready=lambda: catches_sigterm(child.pid),  # from then on SIGTERM means "once more", not its end
    )
    return child


def _litestream(settings: Settings, environment: dict[str, str]) -> Child:
    litestream.program(settings)  # or nothing is started
    litestream.socket_path(settings)
    return Child(
        "litestream",
        [*_ENGRAM, "litestream"],
        env=_without(environment, {"backup_master_key", "backup_master_keys_older", "bridge_token", "heartbeat_url"}),
        log_path=settings.data_dir / "logs" / "litestream.log",
        ready=lambda: litestream.answers(settings),
    )
