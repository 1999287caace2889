"""`engram tenant create | list | show | suspend | resume`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli import beside
from deployments.cli.output import Json, print_json, print_table

if TYPE_CHECKING:
    from shared.registry import Tenant

TenantId = Annotated[str, typer.Argument(metavar="TENANT", help="Lower-case letters, digits, - and _.")]
tenant = typer.Typer(name="tenant", help="Create, look at, suspend and resume tenants.", no_args_is_help=True)


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
