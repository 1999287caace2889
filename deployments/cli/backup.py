"""`engram backup`, `engram backups`, `engram restore-test`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import Permanent


def register(app: typer.Typer) -> None:
    app.command()(backup)
    app.command()(backups)
    app.command("restore-test")(restore_test)


def backup(
    tenants: Annotated[list[str] | None, typer.Argument(metavar="TENANT…", help="Whom to back up.")] = None,
    all_tenants: Annotated[bool, typer.Option("--all", help="Every tenant of this machine.")] = False,
    as_json: Json = False,
) -> None:
    """Back up now: snapshot, store, read back, enter in the catalogue."""
    if bool(tenants) == all_tenants:
        raise typer.BadParameter("name the tenants, or give --all")

    def load() -> Any:
        from flows.backup import backup as flow

        return flow

    results, error = beside.run_flow(load, tenants=tenants or None, all=all_tenants)
    results = results or []
    if as_json:
        print_json(results)
    else:
        print_table(
            ("tenant", "backup", "bytes", "key"),
            [(r["tenant_id"], r["backup_id"] or r["error"], r["size_bytes"] or "", r["key"] or "") for r in results],
        )
    if error:
        raise Permanent(error)


def backups(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Newest first, at most this many.")] = 100,
    as_json: Json = False,
) -> None:
    """List a tenant's catalogue."""
    from shared import catalogue, registry

    with beside.control_plane() as (_, control_plane):
        registry.get(control_plane, tenant_id)
        found = catalogue.list_of(control_plane, tenant_id, limit=limit)
    if as_json:
        print_json([msgspec.structs.asdict(b) for b in found])
        return
    print_table(
        ("backup", "taken at (UTC)", "kind", "status", "memories", "bytes", "sha256"),
        [
            (b.backup_id, f"{b.ts:%F %T}", b.kind, b.status, b.manifest.get("memories"), b.size_bytes, b.sha256[:12])
            for b in found
        ],
    )


def restore_test(
    tenant_id: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="Without one, the selection policy picks.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Restore a backup into a sandbox and prove that it works."""

    def load() -> Any:
        from flows.drill import restore_test as flow

        return flow

    result, error = beside.run_flow(load, tenant_id=tenant_id)
    if error:
        raise Permanent(error)
    if as_json:
        print_json(result)
        return
    note(
        f"{result['tenant_id']}: {result['outcome']}, RTO {result['rto_ms']:.0f} ms, RPO {result['rpo_seconds']:.0f} s"
    )
    print_table(
        ("check", "held", "ms", "seen"),
        [(c["name"], "yes" if c["passed"] else "NO", c["ms"], c["seen"]) for c in result["checks"]],
    )
