"""`engram retention`, `engram verify`: what the daily deployments do, now."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import Permanent


def register(app: typer.Typer) -> None:
    app.command()(retention)
    app.command()(verify)


def retention(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Delete what is kept no longer: backups without a place in their tenant's plan, and old usage events."""

    def load() -> Any:
        from flows.retention import retention as flow

        return flow

    result, error = beside.run_flow(load, dry_run=dry_run)
    if as_json and result is not None:
        print_json(result)
    elif result is not None:
        print_table(
            ("tenant", "plan", "kept", "kept as", "would go" if dry_run else "going", "why"),
            [(t["tenant_id"], t["plan_id"], t["kept"], t["kept_as"], t["going"], t["problem"] or t["why"])
             for t in result["tenants"]],
        )  # fmt: skip
        for removed in result["removed"]:
            if removed["outcome"] != "deleted":
                note(f"{removed['key']}: {removed['outcome']}: {removed['cause']}")
        for stray in result["strays"]:
            note(f"{stray['key']}: no row; {stray['outcome']}: {stray['cause']}")
        note(f"{result['backups']['deleted']} backups deleted, {result['backups']['kept']} kept")
    if error:
        raise Permanent(error)


def verify(
    limit: Annotated[int | None, typer.Option(min=1, help="How many; default: the share of a day.")] = None,
    as_json: Json = False,
) -> None:
    """Read stored backups again, those not read for longest first."""

    def load() -> Any:
        from flows.verify import verify as flow

        return flow

    result, error = beside.run_flow(load, limit=limit)
    if as_json and result is not None:
        print_json(result)
    elif result is not None:
        note(f"{result['examined']} of {result['available']} backups read, {len(result['bad'])} corrupt or missing")
        if result["bad"] or result["inconclusive"]:
            print_table(
                ("tenant", "outcome", "cause", "key"),
                [(e["tenant_id"], e["outcome"], e["cause"], e["key"]) for e in result["bad"] + result["inconclusive"]],
            )
    if error:
        raise Permanent(error)
