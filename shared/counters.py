"""The counters of a gateway's processes, read from the files they share: no HTTP, and also when it has stopped.

{data_dir}/run/metrics-PORT/counter_PID.db   written by prometheus-client in each worker; outlives its death
                            since            when this gateway was started: what it counted, it counted after that
"""

from __future__ import annotations

import time
from pathlib import Path

from shared.settings import Settings

_SINCE = "since"


def directory(settings: Settings) -> Path:
    return settings.run_dir / f"metrics-{settings.gateway_port}"


def begin(directory_: Path) -> None:
    (directory_ / _SINCE).write_text(str(time.time_ns() // 1000))


def started_at_us(directory_: Path) -> int | None:
    """Microseconds since 1970; None when no gateway was started with this directory."""
    try:
        return int((directory_ / _SINCE).read_text())
    except (FileNotFoundError, ValueError):
        return None


def by_process(directory_: Path) -> dict[int, dict[str, float]]:
    """The counters without labels of every process, dead ones included, by pid."""
    from prometheus_client.multiprocess import MultiProcessCollector

    found: dict[int, dict[str, float]] = {}
    for path in directory_.glob("counter_*.db"):
        merged = MultiProcessCollector.merge([str(path)])  # type: ignore[no-untyped-call]
        samples = (sample for metric in merged for sample in metric.samples if not sample.labels)
        found[int(path.stem.removeprefix("counter_"))] = {sample.name: sample.value for sample in samples}
    return found
