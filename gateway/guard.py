"""What every request under /v1 must pass before its handler runs; the order is the meaning.

1. Can we record usage?  no → 503, before anything is done that would have to be billed; for writes it is "no" while
                         there still is room for the events of reads (`shared.spool_limit`)
2. A good token?         no → 401, one body for every cause; the reason goes to a metric and the access line.
                         Too many bad ones from an address → 429, and no signature is verified for them
3. Its tenant active?    no → 403. On another machine → it goes there (`gateway.routing`), and all that follows with it.
                         From here on the request is a usage event, whatever becomes of it
4. Is its class of routes shed by an operator?  yes → 503
5. Within its rate?      no → 429
6. X-Engram-Tenant agrees, the scope is there?  no → 403
7. Within its quota?     no → 402
8. A place to work?      none in time → 503. A request with a body is first read (`gateway.body`): until its body is
                         there it holds no place, only one of those for bodies (`gateway.patience`)
"""

from __future__ import annotations

from typing import Any

from litestar import Request
from litestar.handlers import HTTPRouteHandler

from gateway.auth import Caller, Unauthenticated
from gateway.exchange import Exchange, exchange_of
from gateway.jwks import JwksUnavailable
from gateway.limits import cost_of
from gateway.problems import INACTIVE_TENANT, SPOOL_FULL, Problem, Refusal, forbidden
from gateway.quota import WARNING_HEADER
from gateway.ratelimit import NO_TENANT, TOO_MANY_REQUESTS, too_many
from gateway.services import Services, services_of
from shared.registry import Elsewhere

UNAUTHENTICATED = Problem(401, "A valid bearer token is required.", headers={"WWW-Authenticate": "Bearer"})
NO_KEYS = Problem(503, "Tokens cannot be verified at the moment.", reason="jwks unavailable", retry_after=5)
TOO_MANY_FAILURES = "Too many requests without a valid token came from this address."


async def guard(request: Request[Any, Any, Any]) -> None:
    """Let the request through to its tenant, or refuse it. A route's scope is its `opt["scope"]`.

    A `before_request` hook, which Litestar calls before it reads the body; for a Litestar guard it would copy
    the route handler with its 66 attributes for each request, an eighth of a lookup's time. async on purpose: a
    synchronous one would run in the thread pool.
    """
    await admit(services_of(request), request.scope, *terms(request.route_handler))


def terms(handler: HTTPRouteHandler) -> tuple[str | None, bool]:
    """What the guard wants to know of a route: the scope it needs, and whether its requests have a body."""
    return handler.opt.get("scope"), handler.parsed_data_field is not None


async def admit(services: Services, scope: Any, needed_scope: str | None, has_body: bool) -> None:
    """The eight steps for one ASGI scope, of which the last is left to be done when it has a body. What was found out
    is in its exchange."""
    exchange = exchange_of(scope)
    cost = cost_of(scope["method"], scope.get("path_template", ""))
    full = not services.spool.available or (cost.rate == "write" and not services.spool.takes_writes)
    if full and not services.routing:
        raise Refusal(SPOOL_FULL)
    caller = services.authenticator.known_caller(exchange.every(b"authorization"))
    if caller is None:
        caller = await caller_of(services, exchange, scope)
    tenant_id, scopes, _, exchange.subject = caller
    exchange.tenant_id, exchange.scopes = tenant_id, scopes
    if not services.tenants.is_active(tenant_id):
        standing = await services.tenants.standing(tenant_id)
        if isinstance(standing, Elsewhere):
            standing = await services.routing.arrived(scope, tenant_id, standing, cost.rate)
        if standing != "active":
            raise Refusal(INACTIVE_TENANT)
    if full:  # of what another machine would have recorded nothing had to be said
        raise Refusal(SPOOL_FULL)
    exchange.reached = True
    services.gate.check(cost.route_class)
    decision = services.rates.tenant(tenant_id, cost.rate)
    if decision is not None:
        exchange.headers.extend(decision.headers())
        if not decision.allowed:
            raise Refusal(too_many(decision, TOO_MANY_REQUESTS))
    for named in exchange.every(b"x-engram-tenant"):
        if named.decode("latin-1") != tenant_id:
            raise forbidden("X-Engram-Tenant is not the token's tenant.")
    if needed_scope is not None and needed_scope not in scopes:
        raise forbidden(f"The token lacks the scope {needed_scope}.")
    warning = services.quotas.check(tenant_id, cost.counters)
    if warning is not None:
        exchange.headers.append((WARNING_HEADER, warning))
    if has_body:
        exchange.works_as = cost.route_class
    else:
        gate = services.gate
        exchange.leave = gate.enter_now(tenant_id, cost.route_class) or await gate.enter(tenant_id, cost.route_class)


async def caller_of(services: Services, exchange: Exchange, scope: Any) -> Caller:
    """Whose token it is and what it may; from here on the exchange knows the tenant."""
    rates = services.rates
    exchange.unproven = True

    def known(tenant_id: str | None) -> str | None:
        if tenant_id is None or services.tenants.knows(tenant_id) or tenant_id == services.settings.operator_tenant:
            return tenant_id
        return NO_TENANT

    def before_signature(tenant_id: str | None) -> None:
        decision = rates.may_verify(rates.address(scope.get("client")), known(tenant_id))
        if decision is not None:
            exchange.headers.extend(decision.headers())
            raise Refusal(too_many(decision, TOO_MANY_FAILURES))

    try:
        caller = await services.authenticator.caller(exchange.every(b"authorization"), before_signature)
    except Unauthenticated as e:
        exchange.auth_failure = e.reason
        decision = rates.bad_token(rates.address(scope.get("client")), known(e.tenant_id))
        if decision is not None:
            exchange.headers.extend(decision.headers())
            raise Refusal(too_many(decision, TOO_MANY_FAILURES)) from None
        raise Refusal(UNAUTHENTICATED) from None
    except JwksUnavailable as e:
        exchange.auth_failure = "jwks_unavailable"
        raise Refusal(NO_KEYS) from e
    exchange.tenant_id, exchange.scopes, exchange.subject = caller.tenant_id, caller.scopes, caller.subject
    exchange.unproven = False
    return caller
