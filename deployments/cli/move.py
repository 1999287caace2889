"""`engram move`. Starts the Prefect deployment and follows it, so a move survives this terminal."""

from __future__ import annotations

import getpass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import Permanent

if TYPE_CHECKING:
    from shared.move_plan import MovePlan


def register(app: typer.Typer) -> None:
    app.command()(move)


def move(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    machine_id: Annotated[str, typer.Argument(metavar="MACHINE", help="Its ENGRAM_MACHINE_ID.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; change nothing.")] = False,
    reason: Annotated[str, typer.Option(help="Written into the lease and the moves table.")] = "",
    as_json: Json = False,
) -> None:
    """Move a tenant to another machine without losing a write."""
    from deployments.cli.following import Following, look_at
    from deployments.prefect_api import PrefectApi
    from shared import move_journal, move_plan, registry

    with beside.control_plane() as (settings, control_plane):
        if dry_run:
            _show_plan(move_plan.plan(settings, control_plane, tenant_id, machine_id), as_json)
            return
        tenant = registry.get_active(control_plane, tenant_id)
        move_plan.check_route(tenant, machine_id)
        following = Following(
            PrefectApi(settings),
            settings,
            read=lambda run_id: move_journal.of_flow_run(control_plane, run_id),
            is_closed=lambda row: row.state in ("done", "undone"),
            look=look_at(tenant_id),
        )
        parameters = {
            "tenant_id": tenant_id,
            "machine_id": machine_id,
            "reason": reason,
            "requested_by": f"cli {getpass.getuser()}",
        }
        run = following.start("move/move", parameters, tenant.machine_id)
        note(f"move of {tenant_id} from {tenant.machine_id} to {machine_id}: {run.url}")
        ended, row = following.end(run)
    if row is None or row.state != "done":
        said = ended.message if ended.ended or row is None else f"the move is {row.state}"
        raise Permanent((row and row.error) or said)
    if ended.ended and ended.state != "COMPLETED":
        note(f"its run ended {ended.state.lower()} ({ended.message}); the move was done all the same")
    result: dict[str, Any] = {
        "move_id": row.move_id,
        "tenant_id": tenant_id,
        "source": row.source,
        "target": row.target,
        "outcome": "moved",
        "held_ms": row.held_ms,
        "memories": row.memories,
        "size_bytes": row.size_bytes,
        "backup_id": row.final_backup_id,
        "flow_run_id": ended.id,
        "flow_run_url": ended.url,
        "kept_until": row.remove_after,
    }
    if as_json:
        print_json(result)
    else:
        note(
            f"done; writes were held for {row.held_ms:.0f} ms; {row.source} keeps its files until"
            f" {row.remove_after:%F %T} UTC"
        )


def _show_plan(chosen: MovePlan, as_json: bool) -> None:
    plan = {
        "tenant_id": chosen.tenant_id,
        "outcome": "dry_run",
        "source": chosen.source,
        "target": chosen.target,
        "target_tenants": chosen.target_tenants,
        "memories": chosen.memories,
        "size_bytes": chosen.size_bytes,
        "window_ms": chosen.window_ms,
    }
    if as_json:
        print_json(plan)
    else:
        print_table(("", ""), plan.items())
