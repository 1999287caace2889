"""Requests for a tenant that lies on another machine.

Which machine that is says the worker's snapshot of the control plane (`gateway.tenants`), nothing the client sent. Only
requests with a good token come here, before their body is read; the tenant's rate, scopes, quota and bill are the other
machine's, and so is the request in every count (`gateway.edge`). By `ENGRAM_ROUTING`:

    off         refused: 421, reason "other machine"
    fly-replay  the answer is a header, and Fly's proxy repeats the request at the other machine's app
    forward     this gateway asks the other machine's gateway and passes its answer on (`gateway.forward`)

Fly's proxy (https://fly.io/docs/networking/dynamic-request-routing, read November 2026) takes the header
`fly-replay: app=NAME;state=TEXT;timeout=5s;fallback=force_self` from an answer of any status. `app`, not `instance`:
each data machine is an app of its own (deployments/fly/engram.toml), and a Fly machine's id changes with the machine,
while a tenant's `machine_id` stays with the volume. The two must be in one organisation and private network. The
repeated request carries `fly-replay-src`. When no connection to the app comes about within `timeout`, `fallback` brings
the request back here with `fly-replay-failed`, and its client reads a problem document instead of the proxy's error.

Repeated once. Who gets a request that was passed on already, and thinks that its tenant lies elsewhere, asks the
control plane anew (all who wait share a read, at most one every 0.5 s) and serves what is here by then: after a move
that is the usual case. What still lies elsewhere is answered 503 with Retry-After, never passed on again. A client may
send these fields itself: all that it gets is that 503 where a request would have been passed on, within its rate.

"Requests larger than 1MB cannot be replayed", and without Content-Length nobody knows that in time. So from
`routing_replay_bytes` on, or without a length, the other gateway is asked over the private network instead
(`ENGRAM_ROUTING_URLS`; without it 413, or 411). Not a redirect: clients drop their token when the host changes. Not
Fly's replay cache: it is no guarantee, it cannot carry `state` or `fallback`, and what comes through it lacks
`fly-replay-src`. A request that did not come through a proxy we trust is forwarded too: nobody would repeat it.
"""

from __future__ import annotations

import re
from typing import Any

from gateway.exchange import exchange_of
from gateway.forward import FORWARDED_BY, UNREACHABLE, Forwarder
from gateway.limits import RateClass
from gateway.problems import Detour, Problem, Refusal
from gateway.proxies import PROXIED
from gateway.ratelimit import TOO_MANY_REQUESTS, RateLimiter, too_many
from gateway.raw_body import announced_length, too_large
from gateway.tenants import Tenants
from shared import metrics
from shared.log import get_logger
from shared.registry import Elsewhere, Standing
from shared.settings import Settings, by_machine

REPLAY_TIMEOUT = "5s"
_REPLAY_FAILED = b"fly-replay-failed"
PASSED_ON = frozenset({b"fly-replay-src", _REPLAY_FAILED, FORWARDED_BY})
_MACHINE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")  # fit for a header and for a host
_APP = re.compile(r"[a-z0-9][a-z0-9-]{0,62}\Z")
OTHER_MACHINE = "The tenant's data is on another machine, to which this one passes nothing on."
DISAGREEMENT = Problem(503, "The tenant is being moved between machines.", reason="machines disagree", retry_after=1)
NO_LENGTH = Problem(411, "For this tenant a request needs a Content-Length.", reason="length required")
log = get_logger("routing")


class Routing:
    """For one event loop. False when nothing is passed on."""

    def __init__(self, settings: Settings, tenants: Tenants, rates: RateLimiter, forwarder: Forwarder) -> None:
        self._settings = settings
        self._tenants = tenants
        self._rates = rates
        self._forwarder = forwarder
        self._apps = by_machine(settings.routing_apps)
        self._urls = by_machine(settings.routing_urls)
        self._state = re.sub(r"[^A-Za-z0-9._-]", "", settings.machine_id)[:100]

    def __bool__(self) -> bool:
        return self._settings.routing != "off"

    async def arrived(self, scope: Any, tenant_id: str, elsewhere: Elsewhere, rate_class: RateClass) -> Standing | None:
        """Raises what becomes of the request; returns how the tenant stands when it is not elsewhere after all."""
        passed_on = PASSED_ON.intersection(exchange_of(scope).fields)
        if passed_on:
            standing = await self._tenants.look_again(tenant_id)
            if not isinstance(standing, Elsewhere):
                return standing
            decision = self._rates.tenant(tenant_id, rate_class)  # what is passed on costs its rate where it is served
            if decision is not None and not decision.allowed:
                exchange_of(scope).headers.extend(decision.headers())
                raise Refusal(too_many(decision, TOO_MANY_REQUESTS))
            if _REPLAY_FAILED in passed_on:
                raise self._refusal("unreachable", UNREACHABLE, elsewhere)
            raise self._refusal("disagreement", DISAGREEMENT, elsewhere)
        raise self._way(scope, elsewhere)

    def _way(self, scope: Any, elsewhere: Elsewhere) -> Exception:
        settings, machine_id = self._settings, elsewhere.machine_id
        if settings.routing == "off" or not _MACHINE.match(machine_id):
            return self._refusal("off", Problem(421, OTHER_MACHINE, reason="other machine"), elsewhere)
        length = announced_length(scope)
        if length is not None and length > settings.body_limit_bytes:
            return self._refusal("too_large", too_large(settings.body_limit_bytes), elsewhere)
        replays = settings.routing == "fly-replay" and PROXIED in scope
        app = _of(self._apps, machine_id) if replays else ""
        if _APP.match(app) and length is not None and length <= settings.routing_replay_bytes:
            exchange_of(scope).routed = "replay"
            fields = f"app={app};state={self._state};timeout={REPLAY_TIMEOUT};fallback=force_self"
            # 421 is for who reads it all the same: nothing was done here, nor will be.
            return Refusal(Problem(421, OTHER_MACHINE, reason="other machine", headers={"fly-replay": fields}))
        if url := _of(self._urls, machine_id):
            return Detour(self._forwarder.to(url))
        if not _APP.match(app):
            return self._refusal("off", Problem(421, OTHER_MACHINE, reason="other machine"), elsewhere)
        if length is None:
            return self._refusal("no_length", NO_LENGTH, elsewhere)
        return self._refusal("too_large", too_large(settings.routing_replay_bytes), elsewhere)

    @staticmethod
    def _refusal(reason: str, problem: Problem, elsewhere: Elsewhere) -> Refusal:
        metrics.requests_unrouted_total.labels(reason).inc()
        if problem.status == 503:
            log.warning("request_unrouted", reason=reason, machine_id=elsewhere.machine_id)
        return Refusal(problem)


def _of(named: tuple[str, dict[str, str]], machine_id: str) -> str:
    """What the setting says of this machine; empty when nothing."""
    pattern, of_one = named
    return of_one.get(machine_id) or pattern.replace("{machine_id}", machine_id)
