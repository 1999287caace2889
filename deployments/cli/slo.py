"""`engram slo-report`: what the daily deployment says, now. It needs no Prefect: this is asked when things are down."""

from __future__ import annotations

import typer

from deployments.cli import beside
from deployments.cli.output import Json, print_json, print_table
from shared.errors import Permanent


def register(app: typer.Typer) -> None:
    app.command("slo-report")(slo_report)


def slo_report(as_json: Json = False) -> None:
    """Error budgets, burn and forecast, worst routes, top tenants, RPO and RTO. Exit code 1 when a budget is spent or
    could not be measured."""
    from shared import slo_report as core
    from shared.slo_tables import tables

    with beside.control_plane() as (settings, control_plane):
        report = core.make(settings, control_plane)
    if as_json:
        print_json(report.as_dict())
    else:
        for table in tables(report):
            typer.echo(f"\n{table.title}")
            print_table(table.header, table.rows)
    if report.state != "kept":
        raise Permanent(report.sentence)
