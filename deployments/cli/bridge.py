"""`engram bridge`: Alertmanager's way to the diagnoses, as production runs it."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    app.command()(bridge)


def bridge() -> None:
    """The bridge alone: it takes alerts from Alertmanager and hands them to Prefect, which starts their diagnoses."""
    from deployments.bridge import serve
    from deployments.cli.process import settings_of_process
    from shared.safety import OF_BACKUPS

    serve(settings_of_process("prefect_api_url", without=OF_BACKUPS))
