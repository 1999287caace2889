"""What a command beside a running stack needs: its control plane, and its flows run in this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from shared.errors import Transient

if TYPE_CHECKING:
    from shared.control_plane import ControlPlane
    from shared.settings import Settings


class PrefectAway(Transient):
    """The flow could not be run, or could not be told of to its end: Prefect does not answer."""


@contextmanager
def control_plane() -> Iterator[tuple[Settings, ControlPlane]]:
    """The stack's settings and an open control plane."""
    from deployments.running import running_settings
    from shared import log
    from shared.control_plane import ControlPlane

    settings = running_settings("control_plane_url")
    log.configure(settings.log_level)  # to stderr: stdout is the result's
    with ControlPlane(settings) as opened:
        yield settings, opened


def run_flow(load: Callable[[], Any], /, **parameters: Any) -> tuple[Any, str | None]:
    """Run a flow in this process, visible in Prefect; its result and, if it failed, the cause in one line.

    `load` imports the flow: Prefect reads its environment when it is first imported. Raises `PrefectAway`.
    """
    from deployments.parts import child_environment
    from deployments.running import running_settings
    from shared.settings import settings as cached

    settings = running_settings("control_plane_url", "prefect_api_url", "object_store_url")
    # The console shows warnings and worse; the run's own log in Prefect keeps everything.
    os.environ.update(child_environment(settings) | {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"})
    cached.cache_clear()
    from deployments.orchestration import http_ok

    if not http_ok(f"{settings.prefect_api_url.rstrip('/')}/health"):
        raise PrefectAway(f"Prefect does not answer at {settings.prefect_api_url}")
    try:
        state = load()(**parameters, return_state=True)
    except Exception as e:  # a flow's own failure is a state
        if not _is_of_prefect(e):
            raise
        cause = " ".join(str(e).split())[:200] or type(e).__name__
        raise PrefectAway(f"Prefect does not answer any more ({cause}); what was done before is done") from e
    result = state.result(raise_on_failure=False)
    if state.is_completed():
        return result, None
    if isinstance(result, BaseException):
        return None, str(result)
    return result, str(state.message)


def _is_of_prefect(error: BaseException | None) -> bool:
    """Whether it came from asking Prefect: httpx's, or what Prefect's client makes of that before it asks anything."""
    import httpx

    while error is not None:
        if isinstance(error, httpx.HTTPError) or str(error).startswith("Failed to reach API"):
            return True
        error = error.__cause__ or error.__context__
    return False
