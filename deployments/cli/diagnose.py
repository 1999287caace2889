"""`engram diagnose`: the checks of `shared.diagnosis` in this process, so it works when Prefect does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.output import Json, print_json, print_table

if TYPE_CHECKING:
    from shared.diagnosis.finding import Diagnosis
    from shared.settings import Settings


def register(app: typer.Typer) -> None:
    app.command()(diagnose)


def diagnose(
    subject: Annotated[str, typer.Argument(help="auth, tenant-db, latency, metering or backups")],
    tenant_id: Annotated[str | None, typer.Argument(metavar="[TENANT]")] = None,
    as_json: Json = False,
) -> None:
    """Look at all a subject depends on and propose one action. Changes nothing; exit code 1 when something is wrong."""
    from deployments.running import running_settings
    from shared import log
    from shared.diagnosis import check
    from shared.diagnosis.finding import SUBJECTS
    from shared.tenant import check_tenant_id

    known = next((s for s in SUBJECTS if s == subject), None)
    if known is None:
        raise typer.BadParameter(f"{subject!r:.40}: one of {', '.join(SUBJECTS)}")
    settings = running_settings()
    log.configure("error")  # to stderr; what could not be seen is in the table
    if tenant_id is not None:
        _check_place(settings, check_tenant_id(tenant_id))
    found = check.diagnose(settings, known, tenant_id)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found) | {"healthy": found.healthy, "sentence": found.sentence})
    else:
        _print(found)
    if not found.healthy:
        raise typer.Exit(1)


def _check_place(settings: Settings, tenant_id: str) -> None:
    """Raises `UnknownTenant`, or `Refused` when another machine has the tenant; nothing when nobody can say."""
    from shared import registry
    from shared.control_plane import ControlPlane
    from shared.errors import ControlPlaneUnavailable, Refused

    if not settings.control_plane_url.get_secret_value():
        return
    try:
        with ControlPlane(settings) as control_plane:
            machine_id = registry.get(control_plane, tenant_id).machine_id
    except ControlPlaneUnavailable:
        return  # a finding, not an error
    if machine_id != settings.machine_id:
        raise Refused(f"tenant {tenant_id} is on machine {machine_id}: look there, or start the deployment `diagnose`")


def _print(found: Diagnosis) -> None:
    said = {True: "ok", False: "NOT NORMAL", None: "not seen"}
    print_table(("check", "", "seen", "normal"), [(f.name, said[f.ok], f.seen, f.normal) for f in found.findings])
    proposal = found.proposal
    lines = [("found", found.sentence), ("propose", proposal.command if proposal else "nothing to do")]
    print_table(("", ""), [*lines, ("why", proposal.why)] if proposal else lines)
