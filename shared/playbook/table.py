"""Every action of the playbook, by the name people type."""

from __future__ import annotations

import msgspec

from shared.playbook import limit
from shared.playbook.action import Action


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


_ALL = (
    Action(
        "set-rate-limit",
        "reversible",
        "Reduce the burst or tighten the rate of one tenant, or of each.",
        limit.set_rate_limit,
        limit.SetRateLimit,
        tenant="optional",
        ttl=True,
    ),
    Action(
        "cap-pool",
        "reversible",
        "Cap a tenant's requests at work at once, or the databases a worker keeps open.",
        limit.cap_pool,
        limit.CapPool,
        tenant="optional",
        ttl=True,
    ),
    Action("shed", "reversible", "Refuse expensive classes of routes with 503.", limit.shed, limit.Shed, ttl=True),
    Action(
        "set-limit",
        "reversible",
        "Set any run-time limit as it stands in limits.json.",
        limit.set_limit,
        limit.SetLimit,
        ttl=True,
        doors=("cli",),
    ),
    Action("clear-limit", "reversible", "Let the settings hold again.", limit.clear_limit, limit.ClearLimit),
)
ACTIONS: dict[str, Action] = {action.name: action for action in _ALL}
