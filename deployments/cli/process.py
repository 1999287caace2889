"""Settings of a process the command line becomes. In staging and prod it does not start while one is unsafe."""

from __future__ import annotations

from collections.abc import Collection

from deployments.running import running_settings
from shared import log
from shared.safety import refuse_unsafe
from shared.settings import Settings


def settings_of_process(*needed: str, without: Collection[str] = ()) -> Settings:
    """Those of the stack beside it where there is one; logs are configured. Raises `Refused` naming every unsafe value
    but of the settings in `without`, which this process does not use, and `Permanent` for a missing one of `needed`."""
    refuse_unsafe(Settings(), without)
    settings = running_settings(*needed)
    log.configure(settings.log_level)
    return settings
