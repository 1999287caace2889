"""Questions to Prometheus over its HTTP API, for whoever reports or diagnoses; never from the request path.

An answer that cannot be had is `PrometheusUnavailable` (nothing listens, a time-out, a server error) or
`PrometheusRefused` (a query it does not understand). What has no number has none: `value` is None where a ratio
divides nothing by nothing or no series matches, so no caller meets NaN or takes silence for 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx

from shared.errors import Permanent, Transient
from shared.receipt import Receipt
from shared.settings import Settings, redact_url


class PrometheusUnavailable(Transient):
    """Prometheus did not answer, or answered with a server error."""


class PrometheusRefused(Permanent):
    """Prometheus does not understand the query, or is no Prometheus."""


class Sample(Receipt, frozen=True):
    labels: Mapping[str, str]
    value: float


class Series(Receipt, frozen=True):
    """`points`: (time, value), oldest first, without those that have no number."""

    labels: Mapping[str, str]
    points: list[tuple[datetime, float]]


class Prometheus:
    """One server. Use as a context manager, or `close()` it. Without an address in the settings: see `configured`."""

    def __init__(self, settings: Settings) -> None:
        settings.require("prometheus_url")
        self.url = redact_url(settings.prometheus_url.rstrip("/"))
        self._client = httpx.Client(
            base_url=settings.prometheus_url.rstrip("/"), timeout=settings.prometheus_timeout_seconds
        )

    @staticmethod
    def configured(settings: Settings) -> bool:
        return bool(settings.prometheus_url)

    def __enter__(self) -> Prometheus:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._client.close()

    def samples(self, query: str, at: datetime | None = None) -> list[Sample]:
        """An instant query's vector, without the series that have no number. A scalar is one without labels."""
        data = self._get("query", {"query": query} | ({"time": _stamp(at)} if at else {}))
        if data["resultType"] == "scalar":
            data["result"] = [{"metric": {}, "value": data["result"]}]
        found = [Sample(one["metric"], float(one["value"][1])) for one in data["result"]]
        return [one for one in found if math.isfinite(one.value)]

    def value(self, query: str, at: datetime | None = None) -> float | None:
        """The number of a query that yields at most one. None: no series, or no number (nothing by nothing)."""
        found = self.samples(query, at)
        if len(found) > 1:
            raise PrometheusRefused(f"{len(found)} series where one was expected: {query}")
        return found[0].value if found else None

    def series(self, query: str, start: datetime, end: datetime, step_seconds: float) -> list[Series]:
        """A range query's matrix."""
        data = self._get(
            "query_range", {"query": query, "start": _stamp(start), "end": _stamp(end), "step": f"{step_seconds:g}"}
        )
        return [
            Series(
                one["metric"],
                [
                    (datetime.fromtimestamp(at, UTC), number)
                    for at, text in one["values"]
                    if math.isfinite(number := float(text))
                ],
            )
            for one in data["result"]
        ]

    def _get(self, what: str, parameters: dict[str, str]) -> dict[str, Any]:
        try:
            answer = self._client.post(f"/api/v1/{what}", data=parameters)  # a form: queries may be long
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise PrometheusUnavailable(f"Prometheus does not answer at {self.url}: {e or type(e).__name__}") from e
        if answer.status_code >= 500:
            raise PrometheusUnavailable(f"Prometheus at {self.url} answers {answer.status_code}: {answer.text[:200]}")
        try:
            document = answer.json()
            if document["status"] == "success":
                data: dict[str, Any] = document["data"]
                return data
            cause = str(document["error"])
        except (ValueError, KeyError, TypeError):
            cause = f"{answer.status_code}, which is no answer of Prometheus"
        raise PrometheusRefused(f"Prometheus at {self.url} refuses {parameters['query']!r}: {cause}")


def _stamp(at: datetime) -> str:
    return f"{at.timestamp():.3f}"
