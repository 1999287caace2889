"""How often a tenant, and a client without a good token, may ask: exact over all workers of a machine.

A tenant has one bucket (`gateway.buckets`), and one more for reads, writes or searches where a rate is set for them;
a request needs a place in all of its buckets or takes none. What a request is refused for costs no place. A batch
needs one for each of its parts. With more than the tenant's bucket ever holds it is refused for good; a class's, which
may hold very few, must be full for it, and is empty afterwards for as long as the parts would have taken.

Tokens that fail are limited by the client's address (IPv6: its /64) in two steps, so that a flood costs few
signatures and does not, unless it forges for many tenants at once, shut out those who share the address (NAT, a proxy):
  - a missing token, or one that is bad whatever its signature says, takes a place of the address; without a place
    the answer is 429 instead of 401. Good tokens never see that bucket.
  - a token that is good but for its signature takes a place of that address and that tenant; without a place the
    tokens of that tenant from that address are answered 429 before their signature is verified. Tokens that this
    worker has verified before go on, and so do other tenants behind the same address. But the tenant is what the forger
    wrote: all that nobody knows are one, and an address has `FORGED_TENANTS` buckets' worth in all. Who forges for
    that many tenants at once and goes on uses it up, and then every token from that address that this worker has not
    verified before is answered 429, of whatever tenant it is: the price of a bound on the signatures.
"""

from __future__ import annotations

import ipaddress
import math
import time

from gateway.buckets import Bucket, Decision, Table
from gateway.limits import RateClass
from gateway.problems import Problem
from shared import metrics
from shared.limits import Limits, Rate, Watch
from shared.log import get_logger
from shared.settings import Settings

SHADOW_LOG_SECONDS = 60.0
NO_TENANT = "?"  # no tenant's id
FORGED_TENANTS = 8  # at prod's rate a flood of forgeries then costs a worker at most 3% of its loop
TOO_MANY_REQUESTS = "The tenant's rate limit is reached."
_MAX_PLANS = 100_000
log = get_logger("ratelimit")


class RateLimiter:
    """For one event loop."""

    def __init__(self, settings: Settings, limits: Watch) -> None:
        self._settings = settings
        self._watch = limits
        self._limits: Limits | None = None
        self._plans: dict[tuple[str, str], tuple[Bucket, ...]] = {}
        self._tenants = Table(settings.run_dir / "tenants.rates")
        self._addresses = Table(settings.run_dir / "addresses.rates")
        self._logged: dict[str, float] = {}

    def close(self) -> None:
        self._tenants.close()
        self._addresses.close()

    def tenant(self, tenant_id: str, rate_class: RateClass) -> Decision | None:
        """None: no limit. A refusal is counted; in shadow it is let through and says nothing to the client."""
        buckets = self._buckets(tenant_id, rate_class)
        if not buckets:
            return None
        return self._judged(self._tenants.take(buckets), "tenant", tenant_id)

    def within(self, tenant_id: str, rate_class: RateClass, places: int) -> Decision | None:
        """As `tenant`, inside a request that has a place of the tenant's bucket already and does so many things at
        once: that place is one of them, and is given back when they are refused."""
        own = self._buckets(tenant_id, "")
        buckets = self._buckets(tenant_id, rate_class)
        if not buckets or (buckets == own and places == 1):
            return None
        held = buckets[0] if own else None
        decision = self._judged(self._tenants.take(buckets, places, held=held), "tenant", tenant_id)
        if held is not None and decision is not None and not decision.allowed:
            self._tenants.give_back(held)
        return decision

    def operators(self) -> Decision:
        """Of the admin API: all operators of this machine together, whatever the mode."""
        settings = self._settings
        return self._addresses.take((Bucket.of("operators", settings.admin_rps, settings.admin_burst),))

    def bad_token(self, address: str, tenant_id: str | None) -> Decision | None:
        """Count a failed token; of `tenant_id` when only its signature was wrong (`NO_TENANT` when there is no such
        tenant). None when it may be told 401."""
        if not self._settings.unauthenticated_rps or self._mode == "off":
            return None
        decision = self._addresses.take(self._failures(address, tenant_id))
        judged = self._judged(decision, "unauthenticated", None)
        return None if judged is None or judged.allowed else judged

    def may_verify(self, address: str, tenant_id: str | None) -> Decision | None:
        """Before a signature is verified, of a token for this tenant (as in `bad_token`) if its claims are good. None
        when it may be."""
        if not self._settings.unauthenticated_rps or self._mode != "enforce":
            return None
        decision = self._addresses.take(self._failures(address, tenant_id), keep=False)
        if decision.allowed:
            return None
        metrics.rate_limited_total.labels("unauthenticated").inc()
        return decision

    @staticmethod
    def address(client: tuple[str, int] | None) -> str:
        """Whose failures these are: the scope's client (behind a trusted proxy the one it names); of IPv6 its /64."""
        text = client[0] if client else ""
        if ":" not in text:
            return text[:64]
        try:
            found = ipaddress.IPv6Address(text.strip("[]").partition("%")[0])
        except ValueError:
            return text[:64]
        return str(found.ipv4_mapped or found.packed[:8].hex())

    def _buckets(self, tenant_id: str, rate_class: RateClass) -> tuple[Bucket, ...]:
        if self._limits is not self._watch.now:
            self._limits = self._watch.now
            self._plans.clear()
        buckets = self._plans.get((tenant_id, rate_class))
        if buckets is None:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            buckets = self._plans[tenant_id, rate_class] = self._plan(tenant_id, rate_class)
        return buckets

    @property
    def _mode(self) -> str:
        return self._watch.now.rate_limit_mode or self._settings.rate_limit_mode

    def _plan(self, tenant_id: str, rate_class: RateClass) -> tuple[Bucket, ...]:
        if self._mode == "off":
            return ()
        settings, limits = self._settings, self._watch.now
        rate = limits.tenant_rates.get(tenant_id) or limits.rate_limit
        rate = rate or Rate(settings.rate_limit_rps, settings.rate_limit_burst)
        buckets = [Bucket.of(f"tenant/{tenant_id}", rate.rps, rate.burst)] if rate.rps else []
        of_class = getattr(rate, f"{rate_class}_rps") if rate_class else 0.0
        if of_class is None:
            of_class = getattr(settings, f"rate_limit_{rate_class}_rps")
        if of_class:
            burst = math.ceil(rate.burst * min(1.0, of_class / rate.rps)) if rate.rps else 0
            buckets.append(Bucket.of(f"{rate_class}/{tenant_id}", of_class, burst))
        return tuple(buckets)

    def _failures(self, address: str, tenant_id: str | None) -> tuple[Bucket, ...]:
        rps, burst = self._settings.unauthenticated_rps, self._settings.unauthenticated_burst
        if tenant_id is None:
            return (Bucket.of(address, rps, burst),)
        of_all = Bucket.of(f"signatures/{address}", FORGED_TENANTS * rps, FORGED_TENANTS * burst)
        return Bucket.of(f"{address} {tenant_id}", rps, burst), of_all

    def _judged(self, decision: Decision, scope: str, tenant_id: str | None) -> Decision | None:
        if self._mode == "enforce":
            if not decision.allowed:
                metrics.rate_limited_total.labels(scope).inc()
            return decision
        if not decision.allowed:
            metrics.rate_limit_shadowed_total.labels(scope).inc()
            self._log_shadowed(scope, tenant_id)
        return None

    def _log_shadowed(self, scope: str, tenant_id: str | None) -> None:
        who, now = tenant_id or "", time.monotonic()
        if self._logged.get(who, -math.inf) + SHADOW_LOG_SECONDS <= now:
            if len(self._logged) >= 10_000:
                self._logged.clear()
            self._logged[who] = now
            log.warning("rate_limit_shadowed", scope=scope, tenant_id=tenant_id)


def too_many(decision: Decision, detail: str) -> Problem:
    return Problem(429, detail, reason="rate limited", retry_after=decision.retry_after)
