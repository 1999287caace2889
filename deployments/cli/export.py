"""`engram export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import typer

from deployments.cli.output import Json, note, print_json


def register(app: typer.Typer) -> None:
    app.command()(export)


def export(
    tenant_id: Annotated[str, typer.Argument(metavar="TENANT")],
    out: Annotated[Path, typer.Option("--out", metavar="PATH", help="A file that is not there yet.")],
    format: Annotated[Literal["jsonl", "sqlite"], typer.Option("--format", help="One memory a line, or SQLite.")],
    backup_id: Annotated[
        str | None, typer.Option("--backup", metavar="ID", help="From this backup instead of the live database.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a tenant's data to a file."""
    from deployments.running import running_settings
    from shared import export as core
    from shared import log
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore

    settings = running_settings("control_plane_url", "object_store_url")
    log.configure(settings.log_level)  # to stderr: stdout is the result's
    with ControlPlane(settings) as control_plane:
        done = core.export(
            settings, control_plane, ObjectStore(settings), tenant_id, out, format=format, backup_id=backup_id
        )
    if as_json:
        print_json(msgspec.structs.asdict(done))
    else:
        note(f"{done.memories} memories of {tenant_id} as of {done.ts:%F %T} UTC: {done.path}, sha256 {done.sha256}")
