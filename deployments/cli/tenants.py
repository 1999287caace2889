"""`engram tenant create | list | show | suspend | resume | delete`."""

from __future__ import annotations

import getpass
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import Refused

if TYPE_CHECKING:
    from shared.registry import Tenant

TenantId = Annotated[str, typer.Argument(metavar="TENANT", help="Lower-case letters, digits, - and _.")]
tenant = typer.Typer(name="tenant", help="Create, look at, suspend, resume and delete tenants.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(tenant)


@tenant.command()
def create(
    tenant_id: TenantId,
    plan: Annotated[str, typer.Option(help="Its plan, which sets quotas and retention.")] = "standard",
    as_json: Json = False,
) -> None:
    """Make a tenant and its empty database on this machine."""
    from shared import registry

    with beside.control_plane() as (settings, control_plane):
        _show(registry.create(control_plane, settings, tenant_id, plan_id=plan), as_json)


@tenant.command("list")
def list_tenants(as_json: Json = False) -> None:
    """Every tenant of the control plane."""
    from shared import registry

    with beside.control_plane() as (_, control_plane):
        tenants = registry.list_all(control_plane)
    if as_json:
        print_json([asdict(t) for t in tenants])
    else:
        _table(tenants)


@tenant.command()
def show(tenant_id: TenantId, as_json: Json = False) -> None:
    """One tenant."""
    from shared import registry

    with beside.control_plane() as (_, control_plane):
        _show(registry.get(control_plane, tenant_id), as_json)


@tenant.command()
def suspend(tenant_id: TenantId, as_json: Json = False) -> None:
    """Refuse its requests with 403; its data stays and keeps being backed up."""
    from shared import registry

    with beside.control_plane() as (_, control_plane):
        _show(registry.suspend(control_plane, tenant_id), as_json)


@tenant.command()
def resume(tenant_id: TenantId, as_json: Json = False) -> None:
    """Serve a suspended tenant again."""
    from shared import registry

    with beside.control_plane() as (_, control_plane):
        _show(registry.resume(control_plane, tenant_id), as_json)


@tenant.command()
def delete(
    tenant_id: TenantId,
    reason: Annotated[str, typer.Option(help="Written into the receipt.")],
    confirm: Annotated[str | None, typer.Option(metavar="TENANT", help="The tenant's id once more.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Instead of --confirm.")] = False,
    keep_backups: Annotated[
        bool, typer.Option("--keep-backups", help="Leave its backups to retention; nothing is proven erased then.")
    ] = False,
    machine_gone: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MACHINE", help="It kept files from before a move and exists no more: do not wait for it."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be removed; change nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a tenant's database, backups and keys, and prove it. There is no way back. Its usage is kept."""
    from deployments.running import running_settings
    from shared import deletion, log, registry
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore

    settings = running_settings("control_plane_url", "object_store_url")
    log.configure(settings.log_level)  # to stderr: stdout is the result's
    with ControlPlane(settings) as control_plane:
        objects = ObjectStore(settings)
        registry.get(control_plane, tenant_id)
        if dry_run:
            deletion.check(
                settings, control_plane, tenant_id, keep_backups=keep_backups, machines_gone=machine_gone or ()
            )
            found = deletion.look(settings, control_plane, objects, tenant_id)
            listed = {"tenant_id": tenant_id, "files": found.files, "objects": found.objects, "keys": found.keys}
            _show_removal(listed, keep_backups, as_json)
            return
        if not yes and confirm != tenant_id:
            raise Refused(f"nothing was deleted: give --confirm {tenant_id}, or --yes")
        done = deletion.delete(
            settings,
            control_plane,
            objects,
            tenant_id,
            reason=reason,
            requested_by=f"cli {getpass.getuser()}",
            keep_backups=keep_backups,
            machines_gone=machine_gone or (),
        )
    receipt = json.loads(done.receipt)
    if as_json:
        print_json(
            {
                "tenant_id": tenant_id,
                "deletion_id": str(done.deletion_id),
                "erased": done.erased,
                "receipt_sha256": done.receipt_sha256,
                "receipt": receipt,
            }
        )
        return
    _show_removal(receipt["removed"], keep_backups, as_json)
    note(f"{tenant_id} deleted, {'all of it erased' if done.erased else 'backups kept'}; receipt {done.receipt_sha256}")


def _show_removal(listed: dict[str, Any], keep_backups: bool, as_json: bool) -> None:
    if as_json:
        print_json(listed | {"keep_backups": keep_backups})
        return
    rows = [("file", name, size) for name, size in listed["files"].items()]
    if not keep_backups:
        rows += [("object", key, size) for key, size in listed["objects"].items()]
        rows += [("key", key, "") for key in listed["keys"]]
    print_table(("what", "name", "bytes"), rows)


def _show(found: Tenant, as_json: bool) -> None:
    if as_json:
        print_json(asdict(found))
    else:
        _table([found])


def _table(tenants: list[Tenant]) -> None:
    print_table(
        ("tenant", "state", "plan", "generation", "machine", "created"),
        [(t.tenant_id, t.state, t.plan_id, t.generation, t.machine_id, f"{t.created_at:%F %T}") for t in tenants],
    )
