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
    all_tenants: Annotated[
        bool, typer.Option("--all", help="Every tenant of this machine that changed since its last backup.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="With --all: also those that did not change.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --all: go on with the last run, that died or had failures.")
    ] = False,
    run_id: Annotated[
        str | None, typer.Option("--run", metavar="ID", help="With --all: go on with this run, or name a new one.")
    ] = None,
    shard: Annotated[str | None, typer.Option(metavar="N/M", help="With --all: part N of M, counted from 0.")] = None,
    as_json: Json = False,
) -> None:
    """Back up now: snapshot, store, read back, enter in the catalogue. Named tenants are stored even if unchanged."""
    if bool(tenants) == all_tenants:
        raise typer.BadParameter("name the tenants, or give --all")
    if not all_tenants and (force or resume or run_id or shard is not None):
        raise typer.BadParameter("--force, --resume, --run and --shard go with --all")
    if resume and run_id:
        raise typer.BadParameter("--resume finds the run itself; --run names it")
    chosen: dict[str, Any] = {"tenants": tenants or None, "all": all_tenants}
    if all_tenants:
        chosen |= {"force": force, "run_id": run_id} | _this_machine(resume, _part(shard) if shard is not None else {})

    def load() -> Any:
        from flows.backup import backup as flow

        return flow

    results, error = beside.run_flow(load, **chosen)
    results = results or []
    if as_json:
        print_json(results)
    else:
        print_table(
            ("tenant", "backup", "bytes", "key"),
            [
                (
                    r["tenant_id"],
                    r["error"] or r["backup_id"],
                    r["size_bytes"] or "",
                    "unchanged" if r["skipped"] else r["key"],
                )
                for r in results
            ],
        )
    if error:
        raise Permanent(error)


def _part(shard: str) -> dict[str, int]:
    number, _, of = shard.partition("/")
    if not (number.isdecimal() and of.isdecimal() and int(number) < int(of) <= 1000):
        raise typer.BadParameter(f"{shard!r} is not a part such as 0/4")
    return {"shard": int(number), "shards": int(of)}


def _this_machine(resume: bool, part: dict[str, int]) -> dict[str, Any]:
    """`--all` is this machine's tenants; says who has the others. With `resume`, the run to go on with, forced and
    divided as it was."""
    from shared import fleet_run

    with beside.control_plane() as (settings, control_plane):
        tenants = {row["machine_id"]: row["tenants"] for row in control_plane.rows("fleet_machines")}
        for machine_id, count in tenants.items():
            if machine_id != settings.machine_id:
                note(f"{count} tenants of machine {machine_id} are left to it, or to a run of the deployment `backup`")
        chosen: dict[str, Any] = {"machine_id": settings.machine_id} | part
        if resume:
            found = fleet_run.unfinished(control_plane, settings, **part)
            chosen |= {"run_id": found.run_id, "shards": found.shards} | ({"force": True} if found.force else {})
            note(f"going on with run {found.run_id}")
    return chosen


def backups(
    tenant_id: Annotated[str | None, typer.Argument(metavar="TENANT", help="Whose catalogue.")] = None,
    stale: Annotated[
        bool, typer.Option("--stale", help="Instead: tenants whose last good backup is older than it should be.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="At most this many.")] = 100,
    as_json: Json = False,
) -> None:
    """List a tenant's catalogue, newest first; or the tenants whose last good backup is too old."""
    from shared import catalogue, registry

    if (tenant_id is None) != stale:
        raise typer.BadParameter("name a tenant, or give --stale")
    if tenant_id is None:
        _print_stale(limit, as_json)
        return
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


def _print_stale(limit: int, as_json: bool) -> None:
    from shared import catalogue

    with beside.control_plane() as (settings, control_plane):
        found = catalogue.stale(control_plane, settings.backup_stale_hours * 3600, limit=limit)
    if as_json:
        print_json(found)
        return
    print_table(
        ("tenant", "machine", "last good (UTC)", "age in hours"),
        [
            (r["tenant_id"], r["machine_id"], f"{r['good_at']:%F %T}" if r["good_at"] else "never",
             round(r["age_seconds"] / 3600, 1))
            for r in found
        ],
    )  # fmt: skip


def restore_test(
    tenant_id: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="Without one, the selection policy picks.")
    ] = None,
    backup_id: Annotated[
        str | None, typer.Option("--backup", metavar="ID", help="Not the tenant's newest but this one.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", min=1, max=100_000, help="Without a tenant: how many; else the share set.")
    ] = None,
    never: Annotated[
        bool, typer.Option("--never", help="Test nothing: list the tenants with a backup that were never tested.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Restore backups into a sandbox and prove that they work."""
    if never:
        if tenant_id is not None or backup_id is not None or count is not None:
            raise typer.BadParameter("--never lists; it goes with nothing else")
        _print_never(as_json)
        return
    if tenant_id is None and backup_id is not None:
        raise typer.BadParameter("--backup needs its TENANT")
    if tenant_id is not None and count is not None:
        raise typer.BadParameter("--count is for a run without a TENANT")

    def load() -> Any:
        from flows.drill import restore_test as flow

        return flow

    result, error = beside.run_flow(load, tenant_id=tenant_id, backup_id=backup_id, count=count)
    if result is not None:
        _print_drills(result, as_json)
    if error:
        raise Permanent(error)


def _print_never(as_json: bool) -> None:
    from shared import drill

    with beside.control_plane() as (_, control_plane):
        found = drill.never(control_plane)
    if as_json:
        print_json(found)
    else:
        print_table(("never tested",), [(tenant_id,) for tenant_id in found])


def _print_drills(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    tests = result["tests"]
    print_table(
        ("tenant", "outcome", "RTO ms", "RPO s", "backup", "why"),
        [
            (t["tenant_id"], t["outcome"], round(t["rto_ms"]), round(t["rpo_seconds"]), t["backup_id"], t["reason"])
            for t in tests
        ],
    )
    for test in result.get("copies", []):
        failed = "; ".join(c["seen"] for c in test["checks"] if not c["passed"])
        note(f"Litestream's copy of {test['tenant_id']} at {test['at']}: {test['outcome']} {failed}".rstrip())
    for test in tests:
        if len(tests) > 1 and test["outcome"] == "pass":
            continue
        note(f"{test['tenant_id']}: {test['outcome']}")
        print_table(
            ("check", "held", "ms", "seen"),
            [(c["name"], "yes" if c["passed"] else "NO", c["ms"], c["seen"]) for c in test["checks"]],
        )
