"""Questions to Prometheus: an answer is a number or none, and what is no answer is an error that says why."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from shared.errors import Permanent
from shared.prometheus import Prometheus, PrometheusRefused, PrometheusUnavailable
from shared.settings import Settings
from tests.gateway_stack import Issuer
from tests.ports import free_ports
from tests.prometheus_fixtures import prometheus, write_past


def asked(url: str) -> Prometheus:
    return Prometheus(Settings(prometheus_url=url, prometheus_timeout_seconds=2))


def test_what_has_no_number_is_none_and_what_has_is_itself(tmp_path: Path) -> None:
    """Nothing by nothing, infinity and a name nobody knows are no 0; gaps of a range are left out, not filled."""
    now = datetime.now(UTC).replace(microsecond=0)
    hour = [now - timedelta(minutes=n) for n in range(60, -1, -1)]
    holes = [(at, float(n)) for n, at in enumerate(hour) if not 20 <= n < 40]
    write_past(tmp_path, {'seen{of="a"}': holes, 'seen{of="b"}': [(at, 1.0) for at in hour]})
    with prometheus(tmp_path, rules=False) as url, asked(f"{url}/") as server:
        assert server.value("1 + 1") == 2.0
        assert [server.value(query) for query in ("vector(0) / vector(0)", "vector(1) / vector(0)", "nobody")] == [
            None
        ] * 3
        assert server.value('seen{of="a"}', hour[10]) == 10.0
        assert {s.labels["of"]: s.value for s in server.samples("seen", hour[60])} == {"a": 60.0, "b": 1.0}
        [series] = server.series('seen{of="a"}', hour[0], hour[60], 600)
        carried = {20: 19.0}  # for five minutes, as Prometheus does; then there is a gap
        assert series.points == [(hour[n], carried.get(n, float(n))) for n in (0, 10, 20, 40, 50, 60)]
        with pytest.raises(PrometheusRefused, match="2 series"):
            server.value("seen", hour[60])
        with pytest.raises(PrometheusRefused, match="unclosed"):
            server.value("sum(seen")


def test_who_is_no_prometheus_or_not_there_is_said(tmp_path: Path) -> None:
    """Transient for one that is away, permanent for one that answers something else; a password is not repeated."""
    [port] = free_ports(1)
    with asked(f"http://me:secret@127.0.0.1:{port}") as away, pytest.raises(PrometheusUnavailable) as caught:
        away.value("1")
    assert str(port) in str(caught.value) and "secret" not in str(caught.value)
    other = Issuer()  # an HTTP server that knows no POST
    try:
        with asked(other.url) as wrong, pytest.raises((PrometheusUnavailable, PrometheusRefused), match="50"):
            wrong.value("1")
    finally:
        other.close()
    with pytest.raises(Permanent, match="ENGRAM_PROMETHEUS_URL"):
        asked("")
