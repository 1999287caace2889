"""Buckets in a file: exact over all processes that map it, whatever happens to one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import buckets
from gateway.buckets import Bucket, Table
from shared import boot
from tests.gateway_stack import eventually

SLOW = 0.001  # requests a second: nothing comes back while a test runs


def test_the_table_serves_more_keys_than_it_has_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest idle make room; the key in use keeps its state."""
    monkeypatch.setattr(buckets, "SLOTS", 64)
    table = Table(tmp_path / "t.rates")
    busy = Bucket.of("busy", SLOW, 3)
    assert [table.take([busy]).allowed for _ in range(4)] == [True, True, True, False]
    for n in range(1_000):
        assert table.take([Bucket.of(f"other {n}", 1e6, 1)]).allowed
    assert not table.take([busy]).allowed


def test_a_table_of_another_boot_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times are of a clock that no longer runs; whoever has it mapped is not disturbed."""
    bucket = Bucket.of("acme", SLOW, 1)
    before = Table(tmp_path / "t.rates")
    assert before.take([bucket]).allowed and not Table(tmp_path / "t.rates").take([bucket]).allowed
    monkeypatch.setattr(boot, "boot_id", lambda: "the next one")
    assert Table(tmp_path / "t.rates").take([bucket]).allowed
    assert not before.take([bucket]).allowed


def test_many_places_at_once_cost_what_they_would_one_by_one(tmp_path: Path) -> None:
    """All or none of them; more than a bucket ever holds wait until it is full, and are then owed."""
    table, bucket = Table(tmp_path / "t.rates"), Bucket.of("acme", SLOW, 10)
    assert table.take([bucket], 7).remaining == 3
    refused = table.take([bucket], 5)
    assert not refused.allowed and 1_990 <= refused.retry_seconds <= 2_000, "two of the five are missing"
    assert table.take([bucket], 3).allowed and not table.take([bucket]).allowed
    large = Bucket.of("large", SLOW, 10)
    assert table.take([large], 25).allowed
    assert 15_990 <= table.take([large]).retry_seconds <= 16_000
    touched = Bucket.of("touched", SLOW, 10)
    assert table.take([touched]).allowed and not table.take([touched], 25).allowed


@settings(max_examples=20)  # each has two tables of a megabyte
@given(gaps=st.lists(st.floats(0, 0.05), min_size=1, max_size=40))
def test_a_bucket_alone_is_judged_as_beside_another(
    tmp_path_factory: pytest.TempPathFactory, gaps: list[float]
) -> None:
    """Most requests have one bucket with room in it, and a shorter way through the table that must not be another."""
    path, now = tmp_path_factory.mktemp("rates"), [1_000.0]
    bucket, wide = Bucket.of("acme", 50, 3), Bucket.of("wide", 1e6, 1_000_000)
    with mock.patch.object(buckets.time, "monotonic", lambda: now[0]):
        alone, beside = Table(path / "alone.rates"), Table(path / "beside.rates")
        for gap in gaps:
            now[0] += gap
            assert alone.take([bucket]) == beside.take([bucket, wide])
    alone.close()
    beside.close()


@pytest.mark.parametrize(
    ("rps", "burst", "policy"),
    [
        (20, 20, b"20;w=1"),
        (20, 40, b"40;w=2"),
        (20, 0, b"20;w=1"),
        (20, 5, b"20;w=1"),  # a client that goes by 5 a second would use a quarter of what it may
        (20, 30, b"40;w=2"),
        (2.5, 3, b"5;w=2"),
        (0.3, 3, b"3;w=10"),  # 3 / 0.3 is a little more than 10
        (1.1, 11, b"11;w=10"),
        (8 * 0.3, 24, b"24;w=10"),
        (1 / 3, 1, b"1;w=3"),
        (SLOW, 20, b"20;w=20000"),
        (1e6, 1, b"1000000;w=1"),
    ],
)
def test_the_policy_says_how_many_become_free_in_whole_seconds(rps: float, burst: int, policy: bytes) -> None:
    """Whatever may come at once: that is the limit's to say."""
    fields = dict(Bucket.of("acme", rps, burst).fields)
    assert fields == {b"ratelimit-limit": b"%d" % (burst or rps), b"ratelimit-policy": policy}


_PROCESS = """
import sys, time
from gateway.buckets import Bucket, Table
table, bucket = Table(__import__("pathlib").Path(sys.argv[1])), Bucket.of("acme", 400, 20)
print("ready", flush=True)
begins, ends = (float(x) for x in sys.stdin.readline().split())
while time.monotonic() < begins:
    pass
count = 0
while time.monotonic() < ends:
    count += table.take([bucket]).allowed
print(count, flush=True)
"""

_HOLDER = """
import fcntl, sys, time
fd = open(sys.argv[1], "rb+")
fcntl.flock(fd, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(600)
"""


def _process(code: str, path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    return process


def test_processes_that_hammer_one_bucket_get_no_more_than_the_limit_together(tmp_path: Path) -> None:
    """At most 1.05 × (burst + rate · time), the worst contention there is."""
    processes = [_process(_PROCESS, tmp_path / "t.rates") for _ in range(3)]
    begins = time.monotonic() + 0.3
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(f"{begins} {begins + 1.5}\n")
        process.stdin.flush()
    total = sum(int(process.communicate(timeout=30)[0]) for process in processes)
    limit = 20 + 400 * 1.5
    assert 20 <= total <= 1.05 * limit


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_stops_or_dies_inside_the_lock_holds_up_nobody(tmp_path: Path, number: signal.Signals) -> None:
    """The others go on deciding, by the same numbers."""
    path = tmp_path / "t.rates"
    table, bucket = Table(path), Bucket.of("acme", SLOW, 100)
    holder = _process(_HOLDER, path)
    try:
        os.kill(holder.pid, number)
        assert sum(table.take([bucket]).allowed for _ in range(500)) == 100
    finally:
        holder.kill()
        holder.communicate()
    assert not table.take([bucket]).allowed

    def known_to_all() -> bool:
        """What was granted without the lock is written at the next one, which is not tried for at every request."""
        assert not table.take([bucket]).allowed
        return not Table(path).take([bucket], keep=False).allowed

    assert eventually(known_to_all)
