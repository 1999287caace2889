"""Who may do what without a person. Pure, so that the whole rule is one table in a test.

| kind        | a person | by itself                                                    | by itself, dry run |
|-------------|----------|--------------------------------------------------------------|--------------------|
| read        | yes      | yes                                                          | yes                |
| reversible  | yes      | while automation is on and fewer than N ran in the last hour | yes                |
| destructive | yes      | never                                                        | never              |
"""

from __future__ import annotations

from shared.playbook.action import Kind, RequestedBy
from shared.receipt import Receipt


class Caps(Receipt, frozen=True):
    """The settings `automation` and `automation_actions_per_hour`."""

    enabled: bool
    per_hour: int


def refusal(kind: Kind, requested_by: RequestedBy, *, dry_run: bool, caps: Caps, in_last_hour: int) -> str | None:
    """Why not, in words; None: it may. `in_last_hour` counts reversible actions that no person asked for."""
    if requested_by == "person":
        return None
    if kind == "destructive":
        return "a destructive action is never done without a person"
    if kind == "read" or dry_run:
        return None
    if not caps.enabled:
        return "automation is switched off (ENGRAM_AUTOMATION=false); a person may do it"
    if in_last_hour >= caps.per_hour:
        return f"{in_last_hour} actions were done without a person within the last hour, {caps.per_hour} are allowed"
    return None


def is_counted(kind: Kind, requested_by: RequestedBy, *, dry_run: bool) -> bool:
    """Whether an action draws on the cap."""
    return requested_by == "automation" and kind == "reversible" and not dry_run
