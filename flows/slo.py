"""slo-report: ask → publish. Budgets, routes, tenants, RPO and RTO; Failed when a budget is spent or not measured."""

from typing import Any

from prefect import flow, get_run_logger, task
from prefect.client.schemas.objects import State
from prefect.states import Failed

from flows import artifact, chart, policy
from flows.core import configuration, control_plane
from flows.missed import superseded
from shared import slo_report as core
from shared.slo_report import Measured, Report
from shared.slo_tables import tables


@task(name="ask", **policy.READ)
def ask() -> Report:
    """Whoever does not answer is named in the report, and missing from it."""
    return core.make(configuration(), control_plane())


@task(name="publish", **policy.READ)
def publish(report: Report) -> Report:
    found = tables(report)
    artifact.report(
        "slo-report",
        "Service levels",
        report.sentence[:1].upper() + report.sentence[1:],
        {"made at": report.made_at, **{f"not measured: {what}": cause for what, cause in report.unread.items()}},
        *([_plot(report.measured)] if report.measured else []),
        *(f"## {t.title}\n\n{artifact.table(t.header, t.rows) if t.rows else 'none'}" for t in found),
    )
    if report.measured:
        budgets = found[0]
        artifact.rows(
            "slo-budgets", budgets.title, [dict(zip(budgets.header, row, strict=True)) for row in budgets.rows]
        )
    for what, cause in report.unread.items():
        get_run_logger().error("%s not measured: %s", what, cause)
    return report


def _plot(measured: Measured) -> str:
    title = "Error budget left, in percent"
    lines = [
        chart.Line(name, [(point.at, None if point.left is None else 100 * point.left) for point in points])
        for name, points in sorted(measured.history.items())
    ]
    return chart.markdown(chart.svg(title, lines, unit="%", least=0), title)


@flow(name="slo-report", flow_run_name="slo-report", **policy.FLOW)
def slo_report() -> dict[str, Any] | State[dict[str, Any]]:
    """How much of each error budget is left and when it will be spent, the worst routes, who uses most, and what a
    restore would cost and lose. It changes nothing."""
    if (missed := superseded()) is not None:
        return missed
    report = publish(ask())
    result = report.as_dict()
    if report.state != "kept":
        return Failed(message=report.sentence, data=result)
    return result
