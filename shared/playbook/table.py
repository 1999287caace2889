"""Every action of the playbook, by the name people type."""

from __future__ import annotations

import msgspec

from shared.playbook import busiest, jwks, limit, permissions, restore, token, volume, workers
from shared.playbook.action import Action


class Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """No arguments."""


_ALL = (
    Action(
        "jwks-status",
        "read",
        "The issuer's keys now, against those each worker holds.",
        jwks.status,
        Nothing,
    ),
    Action(
        "explain-token",
        "read",
        "Which check does this token fail? It is never shown, logged or stored.",
        token.explain,
        Nothing,
        doors=("cli", "api"),  # a Prefect parameter is readable by everybody
    ),
    Action(
        "volume-health",
        "read",
        "Space, inodes, read-only, write and fsync time, WAL sizes.",
        volume.health,
        Nothing,
        tenant="optional",
    ),
    Action(
        "check-permissions",
        "read",
        "Owner and mode of a tenant's directory and files.",
        permissions.check,
        Nothing,
        tenant="required",
    ),
    Action("top", "read", "Top routes and tenants by p95, rate and errors.", busiest.top, busiest.Top),
    Action(
        "propose-restore",
        "read",
        "Is the database corrupt; which backup would come back, what would be lost. A person restores.",
        restore.propose,
        Nothing,
        tenant="required",
    ),
    Action("refresh-jwks", "reversible", "Every worker fetches the issuer's keys now.", jwks.refresh, Nothing),
    Action(
        "fix-permissions",
        "reversible",
        "Bring owner and mode back; never outside of the tenant's directory.",
        permissions.fix,
        permissions.FixPermissions,
        tenant="required",
    ),
    Action(
        "restart-tenant",
        "reversible",
        "Close and reopen one tenant's database in every worker.",
        workers.restart_tenant,
        Nothing,
        tenant="required",
    ),
    Action(
        "restart-workers",
        "reversible",
        "Replace the gateway's workers, one after the other, without losing a request.",
        workers.restart_workers,
        Nothing,
    ),
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
