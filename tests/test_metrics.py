"""Counting on the hot path: what `adder` and `observer` write is what prometheus-client would have written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Counts the same things both ways, beside so many other series that the library has to map a larger file meanwhile,
# and dies without closing anything.
COUNT = """
import os, sys
from shared import metrics
route, twin = "/v1/search", "/v1/memories"
seconds = (0.0, 0.0005, 0.001, 0.0011, 0.25, 0.3, 10.0, 11.0)
count = metrics.adder(metrics.requests_total.labels(route, "GET", "200"))
observe = metrics.observer(metrics.request_duration_seconds.labels(route))
for n in range(1_000):
    count(1.0)
    observe(seconds[n % 8])
    metrics.requests_total.labels(twin, "GET", "200").inc()
    metrics.request_duration_seconds.labels(twin).observe(seconds[n % 8])
    metrics.requests_total.labels(f"/filler/{n}", "GET", "200").inc()
os._exit(9)
"""
RENDER = "import sys; from shared import metrics; sys.stdout.buffer.write(metrics.render())"


def _run(code: str, directory: Path | None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PROMETHEUS_MULTIPROC_DIR"}
    if directory is not None:
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )


def _samples(text: str, route: str) -> dict[str, str]:
    lines = [x for x in text.splitlines() if f'route="{route}"' in x and "_created{" not in x]
    return dict(line.replace(route, "").rsplit(" ", 1) for line in lines)


def test_fast_counts_of_dead_workers_add_up_like_the_librarys_own(tmp_path: Path) -> None:
    """Every bucket, the sum and the counter, over two processes that died in the middle of it."""
    assert [_run(COUNT, tmp_path).returncode for _ in range(2)] == [9, 9]
    text = _run(RENDER, tmp_path).stdout
    fast, twin = _samples(text, "/v1/search"), _samples(text, "/v1/memories")
    assert fast == twin
    assert fast['engram_requests_total{method="GET",route="",status="200"}'] == "2000.0"
    assert len([name for name in fast if "_bucket" in name]) == 14


def test_without_shared_files_the_fast_way_counts_in_memory() -> None:
    """A process that counts for itself alone (a test, a tool) has no file to write to."""
    code = COUNT.replace("os._exit(9)", "sys.stdout.write(metrics.render().decode())")
    text = _run(code, None).stdout
    assert _samples(text, "/v1/search") == _samples(text, "/v1/memories") != {}
