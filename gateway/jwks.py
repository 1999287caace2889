"""The issuer's public keys: a small async cache, because PyJWT's blocks the loop and refuses rotated keys.

    fresh (younger than the TTL)        serve
    the TTL has passed                  a timer fetches, whether or not anybody asks: a dropped key is gone after
                                        the TTL even in a worker that had nothing to do
    the fetch fails                     serve what there is (stale-if-error), try again after each cool-down
    `jwks_stale_max_seconds` later,     wait for a fetch; none to be had → `JwksUnavailable`
    or never loaded
    unknown `kid`                       one fetch, then a cool-down: a rotated key works at once, a flood of
                                        invented kids costs one fetch per cool-down, and who is there in between
                                        waits for the next (`find`); only tokens that are good otherwise ask
    forced (`refresh`)                  fetch now, and again when a fetch was already under way: it may have
                                        been answered before the keys changed

There is one fetch at a time, it ends within `jwks_timeout_seconds` however slowly the issuer drips, and everybody
waits for the same one; more than `MAX_WAITING` do not wait, so that requests waiting for a hanging issuer never fill
the server. Without any keys they are told that we cannot judge; with keys, that theirs is none of them. After a failure
nothing is fetched for `jwks_cooldown_seconds`. An empty key set is a failure: it is what a broken issuer publishes.

So a new key is accepted from its first token on, if somebody's invented kid had used up the fetch of that cool-down,
or it failed, then within `LATER_SECONDS`: unless `MAX_LATER` others wait too. An issuer that publishes a key one
cool-down (at the most one TTL) before it signs is never refused.

`generation` counts changes of the key set and forced refreshes: whoever caches what a key said watches it.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx

from shared import jwk, metrics
from shared.jwk import MAX_BYTES, VerificationKey, usable_keys
from shared.log import get_logger
from shared.settings import Settings, redact_url

MAX_WAITING = 256
MAX_LATER = 256  # beyond, an unknown kid is refused: whoever invents them must not make us answer 503
LATER_SECONDS = 7.5  # more than the usual cool-down, which who asked before a fetch that failed waits out
MIN_RETRY_SECONDS = 0.05
log = get_logger("jwks")


class JwksUnavailable(Exception):
    """There are no keys to judge a token by."""


class Jwks:
    """For one event loop. `client` is closed by `close`."""

    def __init__(self, settings: Settings, client: httpx.AsyncClient) -> None:
        self._url = settings.jwks_url
        self._ttl = settings.jwks_ttl_seconds
        self._cooldown = settings.jwks_cooldown_seconds
        self._stale_max = settings.jwks_stale_max_seconds
        self._client = client
        self._keys: dict[str | None, VerificationKey] = {}
        self._published: list[dict[str, Any]] = []
        self._timeout = settings.jwks_timeout_seconds
        self._expires_at = self._quiet_until = self._unknown_quiet_until = 0.0
        self._fetching: asyncio.Task[None] | None = None
        self._again = False
        self._next: asyncio.TimerHandle | None = None
        self._waiting = self._later = 0
        self._answered_at = float("-inf")  # when the fetch that gave these keys was sent
        self.generation = 0
        self.asked_at: float | None = None  # seconds since 1970: when the fetch that gave these keys was sent
        self.failed = ""  # why the newest fetch gave none

    async def close(self) -> None:
        self._again = False
        if self._fetching is not None:
            self._fetching.cancel()
            await asyncio.wait({self._fetching})
        if self._next is not None:
            self._next.cancel()
        await self._client.aclose()

    @property
    def kids(self) -> list[str]:
        """The ids of the keys held; the key without one is `-`."""
        return sorted(kid or "-" for kid in self._keys)

    def usable(self) -> bool:
        """Whether the keys may still be relied on."""
        return time.monotonic() < self._expires_at

    async def load(self) -> None:
        """Return with usable keys, or raise `JwksUnavailable`."""
        if not self.usable():
            if self._fetching is not None or time.monotonic() >= self._quiet_until:
                await self._wait(self._fetch_once())
            if not self.usable():
                raise JwksUnavailable(f"no keys from {redact_url(self._url)}")

    def known(self, kid: str | None) -> VerificationKey | None:
        """The key of that id, or without an id the only key there is, if it is at hand."""
        return self._find(kid) if self.usable() else None

    async def find(self, kid: str | None) -> VerificationKey | None:
        """As `known`, after asking the issuer, by the next fetch that the cool-down allows if that is soon. Raises
        `JwksUnavailable` when there are no keys at all."""
        asked_at = time.monotonic()
        await self.load()
        key = self._find(kid)
        if key is None and kid is not None and self._later < MAX_LATER:
            self._later += 1
            try:
                key = await self._find_later(kid, asked_at)
            finally:
                self._later -= 1
        return key

    async def _find_later(self, kid: str, asked_at: float) -> VerificationKey | None:
        """By a fetch that was sent after `asked_at`: one that was under way may have been answered before this key was
        published."""
        until = asked_at + LATER_SECONDS
        while (key := self._keys.get(kid)) is None and self._answered_at < asked_at:
            now = time.monotonic()
            quiet_until = max(self._unknown_quiet_until, self._quiet_until)
            if now >= until:
                break
            if self._fetching is not None:
                await asyncio.shield(self._fetching)
            elif now >= quiet_until:
                self._unknown_quiet_until = now + self._cooldown
                await asyncio.shield(self._fetch_once())
            elif quiet_until <= until:
                await asyncio.sleep(quiet_until - now)
            else:
                break
        return key

    def refresh(self) -> None:
        """Fetch now, whatever the TTL and the cool-down say: an operator knows that the keys changed."""
        self.generation += 1
        if self._fetching is not None:
            self._again = True
        else:
            self._fetch_once()

    async def _wait(self, fetch: asyncio.Task[None]) -> None:
        if self._waiting >= MAX_WAITING:
            raise JwksUnavailable(f"{MAX_WAITING} requests are waiting for {redact_url(self._url)}")
        self._waiting += 1
        try:
            await asyncio.shield(fetch)
        finally:
            self._waiting -= 1

    def _find(self, kid: str | None) -> VerificationKey | None:
        if kid is not None:
            return self._keys.get(kid)
        return next(iter(self._keys.values())) if len(self._keys) == 1 else None

    def _fetch_once(self) -> asyncio.Task[None]:
        if self._fetching is None:
            if self._next is not None:
                self._next.cancel()
            self._fetching = asyncio.get_running_loop().create_task(self._fetch())
        return self._fetching

    async def _fetch(self) -> None:
        wait_seconds = max(self._cooldown, MIN_RETRY_SECONDS)
        asked_at, began = time.time(), time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                published = await self._get()
            keys = usable_keys(published)
            if not keys:
                raise ValueError("the issuer published no usable key")
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, OSError, ValueError, RecursionError) as e:
            metrics.jwks_fetch_total.labels("error").inc()
            self._quiet_until = time.monotonic() + wait_seconds
            cause = redact_url(str(e))[:300]
            self.failed = f"{type(e).__name__}: {cause}"
            log.error("jwks_fetch_failed", error=type(e).__name__, cause=cause, keys=len(self._keys))
        else:
            metrics.jwks_fetch_total.labels("ok").inc()
            wait_seconds = self._ttl
            self._expires_at = time.monotonic() + self._ttl + self._stale_max
            changed = published != self._published
            if changed:
                self._keys, self._published = keys, published
                self.generation += 1
            self.asked_at, self.failed, self._answered_at = asked_at, "", began
            if changed:
                log.info("jwks_loaded", keys=len(keys), generation=self.generation)
        finally:
            self._fetching = None
            if self._again:
                self._again = False
                self._fetch_once()
            else:
                self._next = asyncio.get_running_loop().call_later(wait_seconds, self._fetch_once)

    async def _get(self) -> list[dict[str, Any]]:
        body = b""
        # Uncompressed: one piece of a compressed answer can unpack to a thousand times its size.
        async with self._client.stream("GET", self._url, headers={"Accept-Encoding": "identity"}) as response:
            response.raise_for_status()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MAX_BYTES:
                    raise ValueError(f"the key set is larger than {MAX_BYTES} bytes")
        return jwk.published(body)
