"""`engram bridge`: Alertmanager's way to the diagnoses, as production runs it."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    app.command()(bridge)


def bridge() -> None:
    """The bridge alone: it takes alerts from Alertmanager and hands them to Prefect, which starts their diagnoses."""
    from deployments.bridge import serve
    from deployments.running import running_settings
    from shared import log

    settings = running_settings("prefect_api_url")
    log.configure(settings.log_level)
    serve(settings)
