"""The counters of a gateway's processes, read from the files they share: no HTTP, and also when it has stopped.

{data_dir}/run/metrics-PORT/counter_pN.db    written by prometheus-client in each worker; outlives its death, and goes
                            histogram_pN.db  on with its successor (`shared.metrics_files`)
                            since            when this gateway was started: what it counted, it counted after that
                            counter_before.db  what was lost before that (`engram_usage_lost_total`): a stop may lose
                                             usage when nobody can be told any more, so that count never starts anew
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from shared.durable import fsync_path
from shared.log import get_logger
from shared.settings import Settings

_SINCE = "since"
_BEFORE = "before"
_FILE_BYTES = 4_096
_LOST = "engram_usage_lost_total"
log = get_logger("counters")


class Route(msgspec.Struct, frozen=True):
    """Of all processes together. `buckets`: requests answered within so many seconds, by edge; fewer than `requests`,
    those without a good token are not timed."""

    requests: float = 0.0
    errors: float = 0.0
    buckets: dict[float, float] = {}


NOTHING = Route()


def directory(settings: Settings) -> Path:
    return settings.run_dir / f"metrics-{settings.gateway_port}"


def lost(directory_: Path) -> float:
    """Usage events that were lost until now, by this gateway and those before it; without those of a process whose
    file cannot be read."""
    return sum(counted.get(_LOST, 0.0) for counted in _by_file(directory_).values())


def carry_lost(directory_: Path, events: float) -> None:
    """Put what was lost before into the counters of the gateway that starts now. Raises `OSError`."""
    from prometheus_client.mmap_dict import MmapedDict, mmap_key

    from shared.metrics import usage_lost_total as metric

    path = directory_ / f"counter_{_BEFORE}.db"
    with path.open("wb") as empty:
        os.posix_fallocate(empty.fileno(), 0, _FILE_BYTES)  # on a full disk an error, not a SIGBUS
    file = MmapedDict(str(path))  # type: ignore[no-untyped-call]
    key = mmap_key(metric._name, _LOST, [], [], metric._documentation)
    file.write_value(key, events, 0.0)  # type: ignore[no-untyped-call]
    file.close()  # type: ignore[no-untyped-call]
    fsync_path(path)
    fsync_path(directory_)


def begin(directory_: Path) -> None:
    (directory_ / _SINCE).write_text(str(time.time_ns() // 1000))


def started_at_us(directory_: Path) -> int | None:
    """Microseconds since 1970; None when no gateway was started with this directory."""
    try:
        return int((directory_ / _SINCE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def _by_file(directory_: Path) -> dict[str, dict[str, float]]:
    from prometheus_client.multiprocess import MultiProcessCollector

    found: dict[str, dict[str, float]] = {}
    for path in directory_.glob("counter_*.db"):
        try:
            merged = MultiProcessCollector.merge([str(path)])  # type: ignore[no-untyped-call]
        except Exception as e:  # noqa: BLE001  whatever prometheus-client makes of a file that a power loss left half
            log.error("counters_unreadable", file=path.name, cause=repr(e))
            continue
        samples = (sample for metric in merged for sample in metric.samples if not sample.labels)
        found[path.stem.removeprefix("counter_")] = {sample.name: sample.value for sample in samples}
    return found


def by_route(directory_: Path) -> dict[str, Route]:
    """Requests, 5xx answers and times of every route since the gateway was started, dead workers included."""
    from prometheus_client.multiprocess import MultiProcessCollector

    requests: dict[str, float] = {}
    errors: dict[str, float] = {}
    buckets: dict[str, dict[float, float]] = {}
    files = [str(path) for pattern in ("counter_*.db", "histogram_*.db") for path in directory_.glob(pattern)]
    for metric in MultiProcessCollector.merge(files, accumulate=True):  # type: ignore[no-untyped-call]
        for sample in metric.samples:
            route = sample.labels.get("route", "")
            if sample.name == "engram_requests_total":
                requests[route] = requests.get(route, 0.0) + sample.value
                if sample.labels["status"].startswith("5"):
                    errors[route] = errors.get(route, 0.0) + sample.value
            elif sample.name == "engram_request_duration_seconds_bucket":
                buckets.setdefault(route, {})[float(sample.labels["le"])] = sample.value
    return {route: Route(count, errors.get(route, 0.0), buckets.get(route, {})) for route, count in requests.items()}
