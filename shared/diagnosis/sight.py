"""What a diagnosis can see, opened when first asked for; nothing here writes.

Figures over time come from Prometheus (the last `PROMETHEUS_WINDOW_SECONDS`) when one is configured and answers. Else
the gateway's counters are read twice, `SAMPLE_SECONDS` apart: true, but of that moment alone, and it is said so.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import httpx
from prometheus_client.parser import text_string_to_metric_families

from shared.control_plane import ControlPlane
from shared.errors import Transient
from shared.prometheus import Prometheus, PrometheusRefused, PrometheusUnavailable
from shared.settings import Settings

SAMPLE_SECONDS = 3.0
PROMETHEUS_WINDOW_SECONDS = 600
HTTP_TIMEOUT_SECONDS = 5.0
Labels = frozenset[tuple[str, str]]


class NotSeen(Transient):
    """Something cannot be looked at here and now; the message is the cause."""


class Figures:
    """Counters over a window. `rate` and `by` are a second; `total` is since the gateway's counters began."""

    def __init__(
        self, window: str, rates: Callable[[str], Mapping[Labels, float]], now: Mapping[tuple[str, Labels], float]
    ) -> None:
        self.window = window
        self._rates = rates
        self._now = now

    def by(self, metric: str, label: str, *, routes: str = "") -> dict[str, float]:
        """The rate for each value of one label, summed over the others; without those that stand still. `routes` is
        how a counted route must begin."""
        rates = self._rates(metric)
        if routes:
            rates = {labels: rate for labels, rate in rates.items() if dict(labels).get("route", "").startswith(routes)}
        return _grouped(rates, label)

    def rate(self, metric: str) -> float:
        return sum(self._rates(metric).values())

    def total(self, metric: str) -> float:
        return sum(value for (name, _), value in self._now.items() if name == metric)

    def totals(self, metric: str, label: str) -> dict[str, float]:
        return _grouped({labels: value for (name, labels), value in self._now.items() if name == metric}, label)

    def gauge(self, metric: str) -> float | None:
        """What the gateway says now; None when it does not say."""
        return self._now.get((metric, frozenset()))

    def quantile(self, metric: str, q: float, **only: str) -> float | None:
        """A histogram's quantile over the window, interpolated as Prometheus does; None without an observation."""
        buckets: dict[float, float] = {}
        for labels, rate in self._rates(f"{metric}_bucket").items():
            found = dict(labels)
            if all(found.get(k) == v for k, v in only.items()):
                edge = float(found["le"])
                buckets[edge] = buckets.get(edge, 0.0) + rate
        return quantile(q, sorted(buckets.items()))


def _grouped(values: Mapping[Labels, float], label: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for labels, value in values.items():
        key = dict(labels).get(label)
        if key is not None and value > 0:
            found[key] = found.get(key, 0.0) + value
    return found


def quantile(q: float, buckets: list[tuple[float, float]]) -> float | None:
    """Of cumulative (edge, count) pairs in order; the last edge is infinite."""
    if not buckets or buckets[-1][1] <= 0:
        return None
    wanted, below_edge, below = q * buckets[-1][1], 0.0, 0.0
    for edge, count in buckets:
        if count >= wanted:
            if edge == float("inf"):
                return below_edge
            return below_edge + (edge - below_edge) * (wanted - below) / max(count - below, 1e-12)
        below_edge, below = edge, count
    return below_edge


class Sight:
    """For one diagnosis; its checks may run in several threads. Use as a context manager, or `close()` it."""

    def __init__(
        self, settings: Settings, tenant_id: str | None = None, *, sample_seconds: float = SAMPLE_SECONDS
    ) -> None:
        self.settings = settings
        self.tenant_id = tenant_id
        self._sample_seconds = sample_seconds
        self._sampling, self._opening = threading.RLock(), threading.Lock()
        self._answers: dict[str, Mapping[Labels, float]] = {}
        # This machine's own gateway: a proxy of the environment has no business there, and the certificate is for the
        # gateway's public name.
        self._http = httpx.Client(timeout=HTTP_TIMEOUT_SECONDS, trust_env=False, verify=False)

    def __enter__(self) -> Sight:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()
        if "_control_plane" in self.__dict__:
            self._control_plane.close()

    def gateway(self, path: str) -> httpx.Response:
        """Raises `NotSeen` when nothing answers."""
        try:
            return self._http.get(f"{self.settings.gateway_url}{path}")
        except httpx.HTTPError as e:
            raise NotSeen(f"no answer at {self.settings.gateway_url}{path}: {e or type(e).__name__}") from e

    @functools.cached_property
    def _control_plane(self) -> ControlPlane:
        return ControlPlane(self.settings)

    @property
    def control_plane(self) -> ControlPlane:
        with self._opening:
            return self._control_plane

    @property
    def figures(self) -> Figures:
        """Taken once, whoever asks first; raises `NotSeen`."""
        with self._sampling:
            return self._figures

    @functools.cached_property
    def _figures(self) -> Figures:
        first_at, first = time.monotonic(), self._scrape()
        if self.prometheus_answers():
            return Figures(f"last {PROMETHEUS_WINDOW_SECONDS // 60} min", self._asked, first)
        time.sleep(self._sample_seconds)
        second = self._scrape()
        seconds = time.monotonic() - first_at

        def rates(metric: str) -> dict[Labels, float]:
            return {
                labels: max(0.0, value - first.get((name, labels), 0.0)) / seconds
                for (name, labels), value in second.items()
                if name == metric
            }

        return Figures(f"last {seconds:.1f} s", rates, second)

    def prometheus_answers(self) -> bool:
        """False also when none is configured; why one does not answer is a check's business."""
        if not Prometheus.configured(self.settings):
            return False
        try:
            with Prometheus(self.settings) as prometheus:
                prometheus.value("vector(1)")
        except (PrometheusUnavailable, PrometheusRefused):
            return False
        return True

    def _asked(self, metric: str) -> Mapping[Labels, float]:
        """Of all machines that Prometheus scrapes. Raises `NotSeen`."""
        with self._sampling:
            if metric not in self._answers:
                query = f"sum without (instance, job) (rate({metric}[{PROMETHEUS_WINDOW_SECONDS}s]))"
                try:
                    with Prometheus(self.settings) as prometheus:
                        samples = prometheus.samples(query)
                except (PrometheusUnavailable, PrometheusRefused) as e:
                    raise NotSeen(str(e)) from e
                self._answers[metric] = {frozenset(one.labels.items()): one.value for one in samples}
            return self._answers[metric]

    def _scrape(self) -> dict[tuple[str, Labels], float]:
        answer = self.gateway("/metrics")
        if answer.status_code != 200:
            raise NotSeen(f"{self.settings.gateway_url}/metrics answers {answer.status_code}")
        try:
            return dict(_samples(answer.text))
        except ValueError as e:
            raise NotSeen(f"{self.settings.gateway_url}/metrics is not an exposition: {e}") from e


def _samples(text: str) -> Iterator[tuple[tuple[str, Labels], float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield (sample.name, frozenset(sample.labels.items())), sample.value
