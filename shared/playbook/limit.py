"""Actions that are entries of the run-time limits (`shared.limits`): in force in every worker of this machine within
a poll of theirs, gone by themselves at their end whatever dies meanwhile, and back to what held before by `undo`."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from shared import limits, workers
from shared.errors import Refused
from shared.limits import Inflight, PoolSize, Rate, RouteClass
from shared.playbook.action import DEFAULT_TTL_SECONDS, BadRequest, Context, Outcome, Request
from shared.settings import Settings
from shared.tenant import TENANT_ID_PATTERN

OBEYED_SECONDS = 3.0
ALL_CLASSES = frozenset({"search", "list", "write", "get"})
_ENTRY = rf"^(rate_limit_mode|shed|pool_size|(rate_limit|inflight)(:{TENANT_ID_PATTERN.strip('^$')})?)$"
Rps = Annotated[float, Meta(ge=0.001, le=1e6)]
Burst = Annotated[int, Meta(ge=1, le=1_000_000)]
Classes = Annotated[list[RouteClass], Meta(min_length=1, max_length=3)]


class SetRateLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Requests a second of one tenant, or of each; what is not given stays as it is."""

    rps: Rps | None = None
    burst: Burst | None = None
    read_rps: Rps | None = None
    write_rps: Rps | None = None
    search_rps: Rps | None = None


class CapPool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`in_flight`: requests of one tenant, or of each, at work at once in a worker. `open_databases`: tenant databases
    that a worker keeps open. One of the two."""

    in_flight: Inflight | None = None
    open_databases: PoolSize | None = None


class Shed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Classes of routes that are answered 503; never all four of them, that is what stopping is for."""

    classes: Classes = msgspec.field(default_factory=lambda: ["search"])


class SetLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Any entry of `shared.limits`, as it stands there."""

    limit: str
    value: Any


class ClearLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    limit: Annotated[str, Meta(pattern=_ENTRY, max_length=80)]


def set_rate_limit(context: Context, request: Request, arguments: SetRateLimit) -> Outcome:
    """Refuses where it would refuse nobody: in shadow and off."""
    settings = context.settings
    active = limits.active(settings)
    if (mode := _value(active, "rate_limit_mode", settings.rate_limit_mode)) != "enforce":
        raise Refused(
            f"the rate limit mode is {mode}: nobody would be refused; `engram act limits set rate_limit_mode`"
        )
    name = _name("rate_limit", request.tenant_id)
    changes = {key: value for key, value in msgspec.structs.asdict(arguments).items() if value is not None}
    if not changes:
        raise BadRequest("set-rate-limit: give a rate or a burst")
    held = _value(active, name, _value(active, "rate_limit", _rate_of_settings(settings)))
    rate = msgspec.convert(dict(held) | changes, Rate)
    if "burst" in changes and not rate.rps:
        raise BadRequest("set-rate-limit: there is no rate whose burst could be changed; give `rps` too")
    given = {key: value for key, value in msgspec.structs.asdict(rate).items() if value is not None}
    return change(context, request, name, given)


def cap_pool(context: Context, request: Request, arguments: CapPool) -> Outcome:
    given = [value for value in (arguments.in_flight, arguments.open_databases) if value is not None]
    if len(given) != 1:
        raise BadRequest("cap-pool: give either in_flight or open_databases")
    if arguments.in_flight is not None:
        return change(context, request, _name("inflight", request.tenant_id), arguments.in_flight)
    if request.tenant_id is not None:
        raise BadRequest("cap-pool: open_databases is of all tenants together; in_flight can be one tenant's")
    return change(context, request, "pool_size", arguments.open_databases)


def shed(context: Context, request: Request, arguments: Shed) -> Outcome:
    return change(context, request, "shed", sorted(set(arguments.classes)))


def set_limit(context: Context, request: Request, arguments: SetLimit) -> Outcome:
    """Refuses to shed everything, and what is not a limit but a command."""
    if arguments.limit.partition(":")[0] in limits.ONCE:
        raise BadRequest(f"{arguments.limit:.80} is an action of its own, not a limit")
    limits.check_name(arguments.limit)
    return change(context, request, arguments.limit, arguments.value)


def clear_limit(context: Context, request: Request, arguments: ClearLimit) -> Outcome:
    """What the settings say holds again. Not set is not an error: the state that was asked for is there."""
    return change(context, request, arguments.limit, None)


def change(context: Context, request: Request, name: str, value: object) -> Outcome:
    """Set one entry, or with None clear it, and wait until every worker obeys. Raises `BadLimit`."""
    settings = context.settings
    limits.check_name(name)
    before = limits.active(settings).get(name)
    after: limits.Entry | None = None
    if value is not None:
        ttl_seconds = request.ttl_seconds or DEFAULT_TTL_SECONDS
        after = limits.entry(settings, name, value, ttl_seconds=ttl_seconds, reason=request.reason)
        if name == "shed" and isinstance(value, list) and set(value) >= ALL_CLASSES:
            raise Refused("shedding every class of routes would be an outage; stop the gateway if that is meant")
    if not request.dry_run:
        if after is not None:
            limits.put(settings, name, after)
        elif before is not None:
            limits.clear(settings, name)
    obeying: dict[int, bool] = {}
    if not request.dry_run:
        version = limits.version_of(limits.active(settings))
        patience_seconds = OBEYED_SECONDS + settings.limits_poll_seconds
        obeying = dict(workers.wait_until_obeyed(settings, version, patience_seconds))
    return Outcome(
        action=request.action,
        kind="reversible",
        target=name,
        summary=f"{name}: {said(after)}" + (f", was {said(before)}" if before != after else ""),
        before=None if before is None else before.value,
        after=None if after is None else after.value,
        undo=_undo(settings, name, before, after),
        expires_at=None if after is None else datetime.fromtimestamp(after.expires_at, UTC),
        dry_run=request.dry_run,
        verified=all(obeying.values()) if obeying else None,
        workers=obeying,
    )


def once(
    context: Context, request: Request, name: str, value: object = True, ttl_seconds: float = 60.0
) -> limits.Entry:
    """Have every worker do something once; the entry is gone after `ttl_seconds`, and not before each has looked."""
    ttl_seconds = max(ttl_seconds, limits.least_ttl_seconds(context.settings))
    new = limits.entry(context.settings, name, value, ttl_seconds=ttl_seconds, reason=request.reason)
    limits.put(context.settings, name, new)
    return new


def said(entry: limits.Entry | None) -> str:
    return "as the settings say" if entry is None else msgspec.json.encode(entry.value).decode()


def _undo(settings: Settings, name: str, before: limits.Entry | None, after: limits.Entry | None) -> list[str]:
    """Back to what held before, for as long as it would have held, in whole seconds."""
    if before is None:
        return [] if after is None else ["engram", "act", "limits", "clear", name]
    value = msgspec.json.encode(before.value).decode()
    left = max(math.ceil(limits.least_ttl_seconds(settings)), round(before.expires_at - datetime.now(UTC).timestamp()))
    return ["engram", "act", "limits", "set", name, value, "--ttl", str(left), "--reason", before.reason]


def _name(kind: Literal["rate_limit", "inflight"], tenant_id: str | None) -> str:
    return kind if tenant_id is None else f"{kind}:{tenant_id}"


def _value(active: dict[str, limits.Entry], name: str, otherwise: Any) -> Any:
    return active[name].value if name in active else otherwise


def _rate_of_settings(settings: Settings) -> dict[str, Any]:
    return {"rps": settings.rate_limit_rps, "burst": settings.rate_limit_burst}
