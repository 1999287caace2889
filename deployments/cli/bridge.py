"""`engram bridge` and `engram monitor`: Alertmanager's way to the diagnoses, alone or beside what sends the alerts."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    app.command()(bridge)
    app.command()(monitor)


def bridge() -> None:
    """The bridge alone: it takes alerts from Alertmanager and hands them to Prefect, which starts their diagnoses."""
    from deployments.bridge import serve
    from deployments.cli.process import settings_of_process
    from shared.safety import NOT_WATCHERS

    serve(settings_of_process("prefect_api_url", without=NOT_WATCHERS))


def monitor() -> None:
    """What watches an environment from a machine of its own: Prometheus, Alertmanager, the probe and the bridge.

    Ends when one of them does, with exit code 1, so that whoever started it starts all of them again.
    """
    from deployments.cli.process import settings_of_process
    from deployments.monitoring_process import run
    from shared.safety import NOT_WATCHERS

    run(settings_of_process("prefect_api_url", without=NOT_WATCHERS))
