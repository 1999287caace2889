"""The Grafana dashboard as code: `python -m deployments.grafana.dashboard` writes `engram.json` beside this file.

Grafana itself needs only the JSON (Dashboards → New → Import, or a provisioning directory); whoever changes it needs
`grafana-foundation-sdk` of the extra `test`. What it shows is in `deployments.grafana.panels`.
"""

from __future__ import annotations

import itertools
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, stat, timeseries
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
)

from deployments.grafana.panels import ROWS, Panel

FILE = Path(__file__).with_name("engram.json")
_SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")


def build() -> str:
    """The dashboard as the JSON of `FILE`."""
    made = (
        dashboard.Dashboard("Engram")
        .uid("engram")
        .description("Service levels, traffic and what keeps the promises. Built by deployments/grafana/dashboard.py.")
        .tags(["engram"])
        .refresh("30s")
        .time("now-6h", "now")
        .timezone("utc")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(dashboard.DatasourceVariable("source").label("Prometheus").type("prometheus"))
        .annotation(
            dashboard.AnnotationQuery()
            .name("Alerts")
            .datasource(_SOURCE)
            .enable(True)
            .icon_color("red")
            .expr('ALERTS{alertname=~"Engram.*",alertstate="firing",severity!="none"}')
        )
    )
    ids = itertools.count(1)
    for title, panels in ROWS.items():
        made = made.with_row(dashboard.Row(title).id(next(ids)))
        for panel in panels:
            made = made.with_panel(_panel(panel).id(next(ids)))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> stat.Panel | timeseries.Panel:
    built: stat.Panel | timeseries.Panel
    if panel.kind == "number":
        built = stat.Panel().color_mode(BigValueColorMode.BACKGROUND).no_value("not measured").height(4)
    else:
        built = (
            timeseries.Panel()
            .height(8)
            .fill_opacity(8)
            .line_width(1)
            .axis_soft_min(0)
            .legend(
                common.VizLegendOptions()
                .display_mode(LegendDisplayMode.LIST)
                .placement(LegendPlacement.BOTTOM)
                .show_legend(True)
            )
            .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
        )
    built = built.title(panel.title).description(panel.about).unit(panel.unit).span(panel.width).datasource(_SOURCE)
    if panel.limit is not None:
        good, bad = ("green", "red") if panel.side == "above" else ("red", "green")
        steps = [Threshold(value=None, color=good), Threshold(value=panel.limit, color=bad)]
        built = built.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        if isinstance(built, timeseries.Panel):
            built = built.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    for n, (legend, query) in enumerate(panel.queries.items()):
        built = built.with_target(Dataquery().expr(query).legend_format(legend).ref_id(chr(65 + n)).datasource(_SOURCE))
    return built


if __name__ == "__main__":
    FILE.write_text(build())
