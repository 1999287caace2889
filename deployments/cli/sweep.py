"""`engram sweep`: the flow of that name, in this process. What it puts right on this machine needs no Prefect, so
without one that is done all the same, and what was left is said: Prefect's own records, and those of a control plane
that is away, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer

from deployments.cli import beside
from deployments.cli.output import Json, note, print_json, print_table
from shared.errors import Permanent

if TYPE_CHECKING:
    from shared.sweep import Swept


def register(app: typer.Typer) -> None:
    app.command()(sweep)


def sweep(as_json: Json = False) -> None:
    """Finish or undo whatever dead restores and moves left on this machine, now."""

    def load() -> Any:
        from flows.sweep import sweep as flow

        return flow

    try:
        result, error = beside.run_flow(load)
    except beside.PrefectAway as e:
        found, not_done = _without_prefect()
        not_done.append(f"runs of dead processes are not marked: {e}")
        stuck = [f"{one.tenant_id} {one.done}" for one in found if not one.ok]
        result = {"swept": [{"what": s.tenant_id, "found": s.found, "done": s.done} for s in found]}
        _print(result | {"not_done": not_done}, as_json)
        raise Permanent("; ".join((*stuck, *not_done))) from e
    if error:
        raise Permanent(error)
    _print(result, as_json)


def _without_prefect() -> tuple[list[Swept], list[str]]:
    """What the resident drain does as well; and what could not be looked at."""
    from deployments.running import running_settings
    from shared import log, move_settle
    from shared import sweep as core
    from shared.control_plane import ControlPlane
    from shared.errors import ControlPlaneUnavailable

    settings = running_settings("control_plane_url")
    log.configure(settings.log_level)  # to stderr: stdout is the result's
    found = core.sweep_disk(settings)
    try:
        with ControlPlane(settings) as control_plane:
            found += core.sweep_records(settings, control_plane)
            found += move_settle.sweep_moves(settings, control_plane)
    except ControlPlaneUnavailable as e:
        return found, [f"not all leases and rows of dead runs were looked at: {e}"]
    return found, []


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    print_table(("tenant or run", "found", "done"), [(s["what"], s["found"], s["done"]) for s in result["swept"]])
    note(f"{len(result['swept'])} traces of dead runs")
