"""`engram diagnose`: the checks of `shared.diagnosis` in this process, so it works when Prefect does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.output import Json, print_json, print_table

if TYPE_CHECKING:
    from shared.diagnosis.finding import Diagnosis


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
    found = check.diagnose(settings, known, check_tenant_id(tenant_id) if tenant_id else None)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(found) | {"healthy": found.healthy, "sentence": found.sentence})
    else:
        _print(found)
    if not found.healthy:
        raise typer.Exit(1)


def _print(found: Diagnosis) -> None:
    said = {True: "ok", False: "NOT NORMAL", None: "not seen"}
    print_table(("check", "", "seen", "normal"), [(f.name, said[f.ok], f.seen, f.normal) for f in found.findings])
    proposal = found.proposal
    lines = [("found", found.sentence), ("propose", proposal.command if proposal else "nothing to do")]
    print_table(("", ""), [*lines, ("why", proposal.why)] if proposal else lines)
