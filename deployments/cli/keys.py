"""`engram keys new | list | rotate`: the keys of encrypted backups."""

from __future__ import annotations

from typing import Annotated

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import KeyUnavailable

keys = typer.Typer(name="keys", help="The keys of encrypted backups.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(keys)


@keys.command()
def new() -> None:
    """Print a new master key for ENGRAM_BACKUP_MASTER_KEY. It is kept nowhere: without it no backup opens."""
    from shared.keys import new_master

    key, recipient = new_master()
    note(f"public key: {recipient}")
    typer.echo(key)


@keys.command("list")
def list_keys(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    as_json: Json = False,
) -> None:
    """A tenant's keys: which is current, and the public key of the master key each is wrapped with."""
    from shared import keys as core

    with beside.control_plane() as (_, control_plane):
        found = core.list_of(control_plane, tenant_id)
    if as_json:
        print_json(found)
        return
    columns = ("key_id", "recipient", "master", "created_at", "retired_at", "backups")
    print_table(columns, [[row[c] if row[c] is not None else "" for c in columns] for row in found])


@keys.command()
def rotate(
    tenant_id: Annotated[
        str | None, typer.Argument(metavar="[TENANT]", help="None: wrap every key with the current master key.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A new key for a tenant's next backups; or, without a tenant, every key wrapped with the current master key."""
    from shared import keys as core

    with beside.control_plane() as (settings, control_plane):
        if tenant_id is not None:
            made = core.rotate(control_plane, settings, tenant_id)
            result = {"tenant_id": made.tenant_id, "key_id": made.key_id, "recipient": made.recipient}
            text = f"{tenant_id}: the next run stores it anew with key {made.key_id}; older backups stay readable"
            failed: tuple[object, ...] = ()
        else:
            done = core.rewrap(control_plane, settings)
            failed = done.failed
            result = {"rewrapped": done.rewrapped, "current": done.current, "failed": list(failed)}
            text = f"{done.rewrapped} keys wrapped anew; {done.current} open with the current master key"
    if as_json:
        print_json(result)
    else:
        typer.echo(text)
    if failed:
        raise KeyUnavailable(
            f"{len(failed)} keys are opened by no configured master key: keep the older ones; {failed[0]} is the first"
        )
