"""`engram up | down | status`, the single processes `serve | worker | drain | litestream`, `migrate` and `token`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.output import Json, note, print_json, print_table

if TYPE_CHECKING:
    from shared.settings import Settings


def register(app: typer.Typer) -> None:
    for command in (up, down, status, serve, worker, drain, litestream, migrate, token):
        app.command()(command)


def up(
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once everything is ready.")] = False,
    monitoring: Annotated[
        bool, typer.Option("--monitoring", help="Also Prometheus, Alertmanager and what alerts start.")
    ] = False,
    as_json: Json = False,
    supervise: Annotated[bool, typer.Option(hidden=True, help="The other end of --detach.")] = False,
) -> None:
    """Start the whole stack on embedded defaults; Ctrl-C stops it in order."""
    from shared import log
    from shared.safety import refuse_unsafe
    from shared.settings import Settings

    settings = Settings()
    log.configure(settings.log_level)
    refuse_unsafe(settings)
    if detach:
        from deployments import detached

        detached.up(settings, note, monitoring=monitoring)
        _welcome(settings, as_json)
        return
    from deployments.stack import Stack

    Stack(settings, note, monitoring=monitoring).run(lambda: None if supervise else _welcome(settings, as_json))


def down(as_json: Json = False) -> None:
    """Stop the stack of this data directory, and whatever a killed one left behind."""
    from deployments import detached
    from shared.settings import Settings

    settings = Settings()
    stopped = detached.down(settings)
    if as_json:
        from deployments import running

        print_json(running.status(settings))
    else:
        note("stopped" if stopped else f"nothing runs in {settings.data_dir}")


def status(as_json: Json = False) -> None:
    """What runs, where, and how much memory it takes."""
    from deployments import running
    from shared.settings import Settings

    found = running.status(Settings())
    if as_json:
        print_json(found)
        return
    print_table(("", ""), [(name, value) for name, value in found.items() if name != "processes" and value])
    print_table(
        ("process", "pid", "state", "MiB"),
        [(p["name"], p["pid"], p["state"], p["rss_bytes"] >> 20) for p in found["processes"]],
    )


def serve() -> None:
    """The gateway alone, as production runs it."""
    from deployments.cli.process import settings_of_process
    from gateway.serve import serve as serve_gateway
    from shared.safety import NOT_A_GATEWAYS

    serve_gateway(settings_of_process(without=NOT_A_GATEWAYS))


def worker() -> None:
    """The Prefect workers of this machine alone, as production runs them: one, and one for what cannot wait."""
    from deployments import orchestration
    from deployments.cli.process import settings_of_process
    from shared.errors import Transient
    from shared.sweep import sweep_disk

    settings = settings_of_process("prefect_api_url")
    if not orchestration.ensure_queues(settings):
        raise Transient(f"no work pool {settings.prefect_work_pool} at {settings.prefect_api_url}: is it deployed?")
    sweep_disk(settings)  # a worker that comes back after a crash finds its tenants in order
    argv = orchestration.worker_argv()
    os.execve(argv[0], argv, {**os.environ, **orchestration.client_environment(settings)})


def drain() -> None:
    """The metering drain alone: usage segments into PostgreSQL until stopped, and once more then."""
    from deployments import orchestration
    from deployments.cli.process import settings_of_process

    settings = settings_of_process("control_plane_url")
    os.environ.update(orchestration.client_environment(settings))  # before Prefect reads it
    from flows.drain import main as drain_usage

    drain_usage(settings)


def litestream() -> None:
    """Litestream alone: kept on the active database of every tenant of this machine, for restores to any second."""
    from deployments.cli.process import settings_of_process
    from shared.errors import Permanent
    from shared.litestream import enabled
    from shared.litestream_follow import main as follow

    settings = settings_of_process("object_store_url")
    if not enabled(settings):
        raise Permanent("ENGRAM_POINT_IN_TIME is off")
    follow(settings)


def migrate(as_json: Json = False) -> None:
    """Bring the control plane's schema up to date."""
    from deployments.cli.process import settings_of_process
    from shared.control_plane import ControlPlane

    settings = settings_of_process("control_plane_url")
    with ControlPlane(settings) as control_plane:
        applied = control_plane.migrate()
    if as_json:
        print_json({"control_plane": applied})
    else:
        note(f"applied {', '.join(applied)}" if applied else "up to date")


def token(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    scope: Annotated[list[str] | None, typer.Option(help="Repeat, or separate by spaces.")] = None,
    ttl: Annotated[int, typer.Option(min=1, help="Seconds until it expires.")] = 3_600,
    as_json: Json = False,
) -> None:
    """A signed token for one tenant. Dev only."""
    from deployments import issuer
    from deployments.running import running_settings

    scopes = [word for given in scope or [] for word in given.replace(",", " ").split()]
    signed, expires_at = issuer.mint(running_settings(), tenant_id, scopes or issuer.DEFAULT_SCOPES, ttl)
    if as_json:
        print_json({"token": signed, "expires_at": expires_at})
    else:
        sys.stdout.write(signed + "\n")


def _welcome(settings: Settings, as_json: bool) -> None:
    """The addresses, and a request that works."""
    from deployments import running

    found = running.status(settings)
    if as_json:
        print_json(found)
        return
    shown: tuple[str, ...] = (
        "gateway_url",
        "prefect_ui_url",
        "control_plane_url",
        "object_store_url",
        "jwks_url",
        "data_dir",
    )
    shown += tuple(name for name in ("prometheus_url", "alertmanager_url") if found[name])
    print_table(("", ""), [(name.removesuffix("_url").replace("_", " "), found[name]) for name in shown])
    if settings.env == "dev":
        sys.stdout.write(
            "\nTry it:\n"
            "  engram tenant create demo\n"
            f'  curl -s {found["gateway_url"]}/v1/memories -H "Authorization: Bearer $(engram token demo)" \\\n'
            "    -H 'Content-Type: application/json' -d '{\"content\": \"hello\"}'\n"
        )
    sys.stdout.write("\nengram down stops it; in the foreground, Ctrl-C.\n")
    sys.stdout.flush()
