"""What a worker says of a tenant that its map does not hold, while PostgreSQL answers and while it does not."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway import tenants as module
from gateway.tenants import Tenants
from shared.errors import ControlPlaneUnavailable
from shared.registry import FULL_READ_EVERY, KnownTenants, Standings


def test_without_an_answer_of_postgresql_an_unknown_tenant_is_not_said_to_be_unknown() -> None:
    """It may have been made a second ago: 403 would be a claim that nobody has checked. Known ones are served on."""
    rows: list[dict[str, Any]] = [{"tenant_id": "acme", "state": "active", "elsewhere": None}]
    away = False

    def read(_since: str | None) -> Standings:
        if away:
            raise ControlPlaneUnavailable("away")
        return list(rows), "7"

    async def run() -> None:
        nonlocal away
        tenants = Tenants(KnownTenants(read), refresh_seconds=60)
        tenants.start()
        try:
            assert await tenants.standing("acme") == "active"
            assert await tenants.standing("made-later") is None
            away = True
            rows.append({"tenant_id": "made-later", "state": "active", "elsewhere": None})
            with pytest.raises(ControlPlaneUnavailable):
                await tenants.standing("made-later")
            assert await tenants.standing("acme") == "active"
            away = False
            rows.append({"tenant_id": "half-made", "state": "creating", "elsewhere": None})
            assert await tenants.standing("half-made") == "creating"
            away = True
            with pytest.raises(ControlPlaneUnavailable):  # it may be whole by now
                await tenants.standing("half-made")
            away = False
            assert await tenants.standing("made-later") == "active"
            assert await tenants.standing("nobody") is None
        finally:
            await tenants.stop()

    asyncio.run(asyncio.wait_for(run(), 60))


def test_tokens_for_tenants_that_are_not_there_do_not_bring_the_read_of_everything_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is the dear one: when it comes is the timer's to say, not a crowd's."""
    monkeypatch.setattr(module, "ON_DEMAND_SECONDS", 0.0)
    asked: list[str | None] = []

    def read(since: str | None) -> Standings:
        asked.append(since)
        return [], "7"

    known = KnownTenants(read)

    async def run() -> None:
        tenants = Tenants(known, refresh_seconds=60)
        tenants.start()
        try:
            for n in range(2 * FULL_READ_EVERY):
                assert await tenants.standing(f"nobody-{n}") is None
        finally:
            await tenants.stop()

    asyncio.run(asyncio.wait_for(run(), 60))
    assert len(asked) > 2 * FULL_READ_EVERY and asked.count(None) == 1
    for _ in range(FULL_READ_EVERY):
        known.refresh()
    assert asked.count(None) == 2
