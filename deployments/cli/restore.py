"""`engram restore`, `engram restore-undo`.

A restore starts the Prefect deployment and follows it, so it survives this terminal; what is said in the end is what
its row in `restores` says (`deployments.cli.following`).
"""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import Permanent, Refused

if TYPE_CHECKING:
    from deployments.prefect_api import Run
    from shared.control_plane import ControlPlane
    from shared.plan import Plan
    from shared.settings import Settings


def register(app: typer.Typer) -> None:
    app.command()(restore)
    app.command("restore-undo")(restore_undo)


def restore(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    backup_id: Annotated[str | None, typer.Option("--backup", metavar="ID", help="From `engram backups`.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Newest state not after it; ISO 8601, UTC.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; change nothing.")] = False,
    safety_backup: Annotated[bool, typer.Option(help="Store a backup of the live database first.")] = True,
    reason: Annotated[str, typer.Option(help="Written into the lease and the restores table.")] = "",
    as_json: Json = False,
) -> None:
    """Replace a tenant's database by a verified backup; the one before stays as engram.db.bak."""
    from shared import plan as planning

    when = parse_time(at)
    with beside.control_plane() as (settings, control_plane):
        chosen = planning.plan(settings, control_plane, tenant_id, backup_id=backup_id, at=when)
        if dry_run:
            _show_plan(chosen, as_json)
            return
        source = {"at": when.isoformat()} if when and chosen.copy else {"backup_id": _backup_id(chosen)}
        parameters = {**source, "with_safety_backup": safety_backup}
        what = f"restore of {tenant_id} to {chosen.source_at:%F %T} UTC"
        _run(settings, control_plane, tenant_id, what, "restore/restore", parameters, reason, as_json)


def restore_undo(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; change nothing.")] = False,
    reason: Annotated[str, typer.Option(help="Written into the lease and the restores table.")] = "",
    as_json: Json = False,
) -> None:
    """Take the last restore back: engram.db.bak becomes the live database. Twice is an undo of the undo."""
    from shared import plan as planning
    from shared import registry

    with beside.control_plane() as (settings, control_plane):
        what = f"undo of the last restore of {tenant_id}"
        if (machine_id := registry.get_active(control_plane, tenant_id).machine_id) == settings.machine_id:
            chosen = planning.plan_undo(settings, control_plane, tenant_id)
            if dry_run:
                _show_plan(chosen, as_json)
                return
            what = f"undo of {tenant_id} to {chosen.source_at:%F %T} UTC"
        elif dry_run:
            raise Refused(f"the database before the last restore of {tenant_id} is on machine {machine_id}; look there")
        _run(settings, control_plane, tenant_id, what, "restore-undo/restore-undo", {}, reason, as_json)


def _run(
    settings: Settings,
    control_plane: ControlPlane,
    tenant_id: str,
    what: str,
    deployment: str,
    parameters: dict[str, Any],
    reason: str,
    as_json: bool,
) -> None:
    """Start the deployment on the tenant's machine, follow it, and print what its row says."""
    from deployments.cli.following import Following, look_at
    from deployments.prefect_api import PrefectApi
    from shared import registry

    following = Following(
        PrefectApi(settings),
        settings,
        read=lambda run_id: control_plane.row("restore_by_flow_run", flow_run_id=run_id),
        is_closed=lambda row: row["state"] != "running",
        look=look_at(tenant_id),
    )
    parameters |= {
        "tenant_id": tenant_id,
        "reason": reason,
        "requested_by": f"cli {getpass.getuser()}",
    }
    machine_id = registry.get_active(control_plane, tenant_id).machine_id
    run = following.start(deployment, parameters, machine_id)
    note(f"{what}{'' if machine_id == settings.machine_id else f', on machine {machine_id}'}: {run.url}")
    ended, row = following.end(run)
    row = _done(ended, row)
    said = _said(ended, row)
    previous = settings.tenants_dir / tenant_id / "engram.db.bak"
    result = {
        "restore_id": row["restore_id"],
        "tenant_id": tenant_id,
        "backup_id": row["backup_id"],
        "outcome": row["state"],
        "locked_ms": row["locked_ms"],
        "flow_run_id": ended.id,
        "flow_run_url": ended.url,
        "previous": str(previous) if previous.exists() else None,
        "source": row["source"],
        "source_at": row["source_at"],
        "note": said,
    }
    if said:
        note(said)
    if as_json:
        print_json(result)
    else:
        held = "an unknown time" if row["locked_ms"] is None else f"{row['locked_ms']:.1f} ms"
        note(f"done; writes were held for {held}; the database before is {result['previous']}")


def _done(ended: Run, row: dict[str, Any] | None) -> dict[str, Any]:
    """The row of a restore that was done. Raises the cause when it was not: nothing was changed, or it was put back."""
    if row is None:  # one that begins has a row before it touches anything
        how = f"{ended.name} ended {ended.state.lower()} and changed nothing itself: {ended.message or ended.url}"
        raise Permanent(ended.message if ended.state == "FAILED" and ended.message else how)
    if row["state"] != "restored":
        cause = row["error"] or (ended.message if ended.ended else "") or f"it was {row['state']}"
        raise (Refused if row["state"] == "refused" else Permanent)(cause)
    return row


def _said(ended: Run, row: dict[str, Any]) -> str | None:
    """What there is to know about a restore that was done."""
    died = ended.ended and ended.state != "COMPLETED"
    how = f"its run ended {ended.state.lower()} ({ended.message}), after the database was replaced" if died else None
    return "; ".join(filter(None, (row["note"], how, row["error"]))) or None


def _backup_id(chosen: Plan) -> str | None:
    return str(chosen.backup.backup_id) if chosen.backup and chosen.copy is None else None


def _show_plan(chosen: Plan, as_json: bool) -> None:
    from shared.plan import schema_change

    plan: dict[str, Any] = {
        "tenant_id": chosen.tenant_id,
        "backup_id": _backup_id(chosen),
        "outcome": "dry_run",
        "source": chosen.backup.key if chosen.backup and chosen.copy is None else chosen.source,
        "source_at": chosen.source_at,
        "age_seconds": round(chosen.age_seconds, 1),
        "size_bytes": chosen.size_bytes,
        "schema": schema_change(chosen.source_schema_version),
        "backup_memories": chosen.source_memories,
        "live_memories": chosen.live_memories,
        "writes_lost": chosen.writes_lost,
        "live_error": chosen.live_error,
        "window_ms": chosen.window_ms,
        "fallback": f"backup {chosen.backup.backup_id}" if chosen.backup and chosen.copy else None,
        "note": chosen.note,
    }
    if as_json:
        print_json(plan)
    else:
        print_table(("", ""), plan.items())


def parse_time(text: str | None) -> datetime | None:
    """ISO 8601; UTC unless it says otherwise. A bad one is a usage error."""
    if text is None:
        return None
    try:
        when = datetime.fromisoformat(text)
        return when if when.tzinfo else when.replace(tzinfo=UTC)
    except ValueError as e:
        raise typer.BadParameter(f"{text!r} is not a time such as 2026-11-23T02:00:00Z") from e
