"""Requests that no route takes, 404 and 405: within the rate of whoever sends them, or 429.

The token of a tenant that was seen before says whose they are, and they take a place of its reads. No token is verified
for them; without one that is known they are of the client's address, and are limited with its bad tokens
(`gateway.ratelimit`), a bucket that good ones never see. They reach no tenant, so they are no usage.
"""

from __future__ import annotations

from typing import Any

from litestar import Request, Response

from gateway.exchange import exchange_of
from gateway.problems import Refusal, answer
from gateway.ratelimit import TOO_MANY_REQUESTS, too_many
from gateway.services import services_of

TOO_MANY_ELSEWHERE = "Too many requests for what is not there, or without a valid token, came from this address."


def unrouted(request: Request[Any, Any, Any], e: Exception) -> Response[bytes]:
    """Litestar's exception handler for a path or a method that it has no route for."""
    services = services_of(request)
    exchange = exchange_of(request.scope)
    caller = services.authenticator.known_caller(exchange.every(b"authorization"))
    if caller is not None:
        decision, detail = services.rates.tenant(caller.tenant_id, "read"), TOO_MANY_REQUESTS
    else:
        address = services.rates.address(request.scope.get("client"))
        decision, detail = services.rates.bad_token(address, None), TOO_MANY_ELSEWHERE
    if decision is None:
        return answer(request, e)
    exchange.headers.extend(decision.headers())
    return answer(request, e if decision.allowed else Refusal(too_many(decision, detail)))
