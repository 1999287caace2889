"""`engram act …`: the incident playbook from a terminal. What the actions do is `shared.playbook`'s."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deployments.cli import limits
from deployments.cli.output import Json, note, print_json, print_table
from deployments.cli.playbook import DryRun, Reason, run

LOOK, CHANGE, AFTERWARDS = "Look (changes nothing)", "Change (reversible, recorded)", "Afterwards"
act = typer.Typer(
    name="act",
    help="The incident playbook: look, then change what a running gateway does. Every action is recorded with its"
    " reason (`engram act history`), says how to undo it, and can be tried with --dry-run. A restore is not here: only"
    " a person starts one, with `engram restore` or the form of that deployment.",
    no_args_is_help=True,
)
act.add_typer(limits.limits, rich_help_panel=CHANGE)

Tenant = Annotated[str, typer.Argument(metavar="TENANT")]
MaybeTenant = Annotated[str | None, typer.Argument(metavar="[TENANT]", help="None: of the whole machine.")]
Ttl = Annotated[float, typer.Option(help="Seconds until it is gone by itself.")]
Rps = Annotated[float | None, typer.Option(help="Requests a second.")]


def register(app: typer.Typer) -> None:
    app.add_typer(act)


@act.command("top", rich_help_panel=LOOK)
def top(
    seconds: Annotated[float, typer.Option(help="To watch the routes for; 0: since the gateway's start.")] = 5.0,
    as_json: Json = False,
) -> None:
    """Top routes and tenants by p95, rate and errors."""
    run("top", as_json=as_json, arguments={"seconds": seconds})


@act.command("jwks-status", rich_help_panel=LOOK)
def jwks_status(as_json: Json = False) -> None:
    """The token issuer's keys now, against those each worker holds."""
    run("jwks-status", as_json=as_json)


@act.command("explain-token", rich_help_panel=LOOK)
def explain_token(
    file: Annotated[Path, typer.Argument(metavar="[FILE]", help="With the token in it; - is stdin.")] = Path("-"),
    as_json: Json = False,
) -> None:
    """Which check does this token fail? It is never shown, logged or stored."""
    from pydantic import SecretStr

    if str(file) == "-" and sys.stdin.isatty():
        note("paste the token, then Ctrl-D")
    raw = sys.stdin.read(65_536) if str(file) == "-" else file.read_text()[:65_536]
    if not raw.strip():
        raise typer.BadParameter("there is no token in it")
    run("explain-token", as_json=as_json, token=SecretStr(raw.strip()))


@act.command("volume-health", rich_help_panel=LOOK)
def volume_health(tenant_id: MaybeTenant = None, as_json: Json = False) -> None:
    """Space, inodes, read-only, write and fsync time, WAL sizes."""
    run("volume-health", tenant_id, as_json=as_json)


@act.command("check-permissions", rich_help_panel=LOOK)
def check_permissions(tenant_id: Tenant, as_json: Json = False) -> None:
    """Owner and mode of a tenant's directory and files; can its database be read and written?"""
    run("check-permissions", tenant_id, as_json=as_json)


@act.command("propose-restore", rich_help_panel=LOOK)
def propose_restore(tenant_id: Tenant, as_json: Json = False) -> None:
    """Is the database corrupt; which backup would come back, what would be lost? Proposes only."""
    run("propose-restore", tenant_id, as_json=as_json)


@act.command("refresh-jwks", rich_help_panel=CHANGE)
def refresh_jwks(reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Have every worker fetch the token issuer's keys now."""
    run("refresh-jwks", reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("fix-permissions", rich_help_panel=CHANGE)
def fix_permissions(
    tenant_id: Tenant,
    reason: Reason,
    put_back: Annotated[
        str | None, typer.Option(metavar="ACTION_ID", help="Take an earlier fix back; from `engram act history`.")
    ] = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Bring owner and mode of a tenant's directory and files back."""
    arguments = {} if put_back is None else {"put_back": put_back}
    run("fix-permissions", tenant_id, arguments=arguments, reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("restart-tenant", rich_help_panel=CHANGE)
def restart_tenant(tenant_id: Tenant, reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Close and reopen one tenant's database in every worker."""
    run("restart-tenant", tenant_id, reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("restart-workers", rich_help_panel=CHANGE)
def restart_workers(reason: Reason, dry_run: DryRun = False, as_json: Json = False) -> None:
    """Replace the gateway's workers one after the other, each by one that serves already."""
    run("restart-workers", reason=reason, dry_run=dry_run, as_json=as_json)


@act.command("set-rate-limit", rich_help_panel=CHANGE)
def set_rate_limit(
    reason: Reason,
    tenant_id: MaybeTenant = None,
    rps: Rps = None,
    burst: Annotated[int | None, typer.Option(help="Requests at once.")] = None,
    read_rps: Rps = None,
    write_rps: Rps = None,
    search_rps: Rps = None,
    ttl: Ttl = 3600,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Reduce the burst or tighten the rate of one tenant, or of each. What is not given stays."""
    given = {"rps": rps, "burst": burst, "read_rps": read_rps, "write_rps": write_rps, "search_rps": search_rps}
    arguments = {name: value for name, value in given.items() if value is not None}
    run("set-rate-limit", tenant_id, arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@act.command("cap-pool", rich_help_panel=CHANGE)
def cap_pool(
    reason: Reason,
    tenant_id: MaybeTenant = None,
    in_flight: Annotated[int | None, typer.Option(help="Of a tenant's requests at work at once, a worker.")] = None,
    open_databases: Annotated[int | None, typer.Option(help="That a worker keeps open.")] = None,
    ttl: Ttl = 3600,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Cap one tenant's requests at work, or each tenant's, or the open databases."""
    given = {"in_flight": in_flight, "open_databases": open_databases}
    arguments = {name: value for name, value in given.items() if value is not None}
    run("cap-pool", tenant_id, arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@act.command("shed", rich_help_panel=CHANGE)
def shed(
    classes: Annotated[str, typer.Argument(metavar="CLASSES", help="Of search,list,write,get; never all.")],
    reason: Reason,
    ttl: Ttl = 600,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Refuse expensive classes of routes with 503."""
    arguments = {"classes": limits.parsed("shed", classes)}
    run("shed", arguments=arguments, reason=reason, ttl=ttl, dry_run=dry_run, as_json=as_json)


@act.command("history", rich_help_panel=AFTERWARDS)
def history(
    tenant_id: Annotated[str | None, typer.Option("--tenant", metavar="TENANT")] = None,
    action: Annotated[str | None, typer.Option(metavar="NAME")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000)] = 20,
    as_json: Json = False,
) -> None:
    """What was done, by whom, why, and what became of it. Newest first."""
    from deployments.cli import beside
    from shared.playbook import audit

    with beside.control_plane() as (_, control_plane):
        rows = audit.history(control_plane, tenant_id=tenant_id, action=action, limit=limit)
    if as_json:
        print_json(rows)
        return
    print_table(
        ("begun", "action", "tenant", "by", "state", "reason", "id"),
        [
            (
                f"{row['begun_at']:%m-%d %H:%M:%S}",
                row["action"] + (" (dry run)" if row["dry_run"] else ""),
                row["tenant_id"] or "",
                f"{row['who']} ({row['door']}{', by itself' if row['requested_by'] == 'automation' else ''})",
                _became(row),
                row["reason"],
                row["action_id"],
            )
            for row in rows
        ],
    )


def _became(row: dict[str, Any]) -> str:
    if row["interrupted"]:
        return "INTERRUPTED: nobody knows whether it took effect"
    if row["error"]:
        return f"{row['state']}: {row['error']}"
    return f"{row['state']}, effect not there" if row["verified"] is False else str(row["state"])
