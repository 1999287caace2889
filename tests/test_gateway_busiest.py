"""The busiest tenants: counted exactly while there are few, bounded when there are many."""

from __future__ import annotations

import pytest

from gateway import busiest
from gateway.busiest import Busiest


def test_a_tenants_requests_errors_and_times_are_counted() -> None:
    """p95 is the upper edge of its bucket; 429 is a refusal, 5xx an error, 404 neither."""
    seen = Busiest()
    for n in range(100):
        seen.count("a", 0.3 if n < 6 else 0.0009, 200)
    for status in (429, 500, 503, 404):
        seen.count("b", 20.0, status)
    seen.look()
    a, b = seen.tenants
    assert (a.tenant_id, a.requests, a.errors, a.refused, a.slow_ms) == ("a", 100, 0, 0, 500.0)
    assert (b.tenant_id, b.requests, b.errors, b.refused, b.slow_ms) == ("b", 4, 2, 1, None)
    assert a.busy_seconds == pytest.approx(6 * 0.3 + 94 * 0.0009) and (seen.requests, seen.unseen) == (104, 0)


def test_what_is_older_than_the_window_is_forgotten() -> None:
    """Who was busy ten minutes ago is not who is busy."""
    seen = Busiest()
    seen.count("a", 0.1, 200)
    for _ in range(int(busiest.WINDOW_SECONDS / busiest.LOOK_SECONDS)):
        seen.look()
        assert [b.tenant_id for b in seen.tenants] == ["a"]
    seen.look()
    assert seen.tenants == [] and seen.requests == 0


def test_many_tenants_cost_a_bounded_amount_and_the_busy_ones_are_still_found() -> None:
    """A crawler over thousands of tenants must neither fill the memory nor hide who asks for one request in five."""
    seen = Busiest()
    for n in range(20_000):
        seen.count(f"seldom-{n}" if n % 5 else "often", 0.001, 200)
    assert len(seen._rows) <= busiest.TENANTS + 1
    seen.look()
    assert (seen.tenants[0].tenant_id, seen.tenants[0].requests) == ("often", 4_000)
    assert len(seen.tenants) <= 5 * busiest.KEPT and seen.requests == 20_000
    assert seen.unseen == 16_000 - (busiest.TENANTS - 1)
