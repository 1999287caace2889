"""The one way to carry an action out, whichever door it is asked for through."""

from __future__ import annotations

from shared.control_plane import ControlPlane
from shared.playbook.action import BadRequest, Outcome, Request
from shared.settings import Settings


def perform(settings: Settings, control_plane: ControlPlane | None, request: Request) -> Outcome:
    """Judge, record as begun, do, verify, record.

    Raises `BadRequest` (nonsense), `Refused` (not now, or not by you), and what the action itself raises.
    """
    raise BadRequest(f"there is no action {request.action!r:.80}")
