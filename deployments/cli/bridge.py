"""`engram bridge` and `engram monitor`: Alertmanager's way to the diagnoses, alone or beside what sends the alerts."""

from __future__ import annotations

import os
import sys

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
    # Granian's threads may still be on their way out. One that asks for the interpreter while that is torn down aborts
    # the process (SIGABRT on a busy machine); everything is closed and written, so nothing need be torn down.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def monitor() -> None:
    """What watches an environment from a machine of its own: Prometheus, Alertmanager, the probe and the bridge.

    Ends when one of them does, with exit code 1, so that whoever started it starts all of them again.
    """
    from deployments.cli.process import settings_of_process
    from deployments.monitoring_process import run
    from shared.safety import NOT_WATCHERS

    run(settings_of_process("prefect_api_url", without=NOT_WATCHERS))
