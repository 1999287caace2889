"""Twenty restores under traffic: every acknowledged write is where the model says, and clients see only pauses."""

import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.acceptance.conftest import Stack
from tests.acceptance.slow_restore import Beside
from tests.core_fixtures import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
RESTORES = 20
THROUGH_THE_WORKER = (5, 10)  # the others run in a process beside the stack: the same flow, seconds faster
WRITERS = 3


@dataclass
class Load:
    """Clients of one tenant that never stop: writers, a reader, a searcher. Times are `time.monotonic()`."""

    client: httpx.Client
    pause_seconds: float
    acknowledged: dict[str, tuple[float, float]] = field(default_factory=dict)  # id: when sent, when answered
    gaps: list[tuple[float, float]] = field(default_factory=list)  # between two acknowledgements of one writer
    statuses: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    reads: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        loops = [self._write] * WRITERS + [self._read, self._search]
        threads = [threading.Thread(target=self._loop, args=(n, loop)) for n, loop in enumerate(loops)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stopping.set()
            for thread in threads:
                thread.join()

    def _loop(self, number: int, step: Any) -> None:
        while not self.stopping.is_set():
            try:
                step(number)
            except Exception as e:  # noqa: BLE001 - a client that stops would make the test easier
                self.wrong.append(f"{type(e).__name__}: {e}")

    def _write(self, number: int) -> None:
        last = sent = time.monotonic()
        while not self.stopping.is_set():
            sent = time.monotonic()
            answer = self.client.post("/v1/memories", json={"content": f"written under load by {number}"})
            now = time.monotonic()
            self._count(answer, "write", 201)
            if answer.status_code == 201:
                self.acknowledged[answer.json()["id"]] = (sent, now)
                self.gaps.append((now, now - last))
                last = now
            time.sleep(self.pause_seconds)

    def _read(self, _number: int) -> None:
        for memory_id in list(self.acknowledged.copy())[-5:]:
            answer = self.client.get(f"/v1/memories/{memory_id}")
            self._count(answer, "read", 200, 404)  # 404: a restore took it back
            self.reads += answer.status_code == 200
        time.sleep(2 * self.pause_seconds)

    def _search(self, _number: int) -> None:
        self._count(self.client.post("/v1/search", json={"query": "written"}), "search", 200)
        time.sleep(4 * self.pause_seconds)

    def _count(self, answer: httpx.Response, what: str, *good: int) -> None:
        maintenance = answer.status_code == 503 and answer.json()["reason"] == "maintenance"
        self.statuses[f"{what} {answer.status_code}"] += 1
        if answer.status_code not in good and not maintenance:
            self.wrong.append(f"{what}: {answer.status_code} {answer.text[:200]}")

    def sent_and_answered(self, since: float, until: float) -> set[str]:
        return {i for i, (sent, answered) in self.acknowledged.copy().items() if sent >= since and answered <= until}


def ids_of(file: Path) -> set[str]:
    with closing(sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)) as connection:
        return {row[0] for row in connection.execute("SELECT id FROM memories")}


@pytest.fixture
def beside(stack: Stack) -> Iterator[Beside]:
    with closing(Beside(stack)) as made:
        yield made


def test_twenty_restores_under_load_lose_no_acknowledged_write(stack: Stack, beside: Beside) -> None:
    """Backup and undo in turn, writes from many clients into two gateway workers: what a restore took away is in
    `engram.db.bak`, what came after it is live, and a client sees nothing but `503 maintenance`.
    """
    busy, calm = Load(stack.tenant("busy"), 0.005), Load(stack.tenant("calm"), 0.05)
    root = stack.data_dir / "tenants" / "busy"
    for content in ("first", "second", "third"):
        busy.client.post("/v1/memories", json={"content": content}).raise_for_status()
    backup = beside.run("backup", "busy")["result"][0]["backup_id"]
    base = ids_of(root / "engram.db")
    active, previous, released_at = set(base), set[str](), time.monotonic()
    locked_ms: list[float] = []
    windows: list[tuple[float, float]] = []

    with busy.running(), calm.running():
        wait_until(lambda: len(busy.acknowledged) > 50 and len(calm.acknowledged) > 10)
        for number in range(RESTORES):
            undo = number % 2 == 1
            began = time.monotonic()
            locked_ms.append(restore(stack, beside, backup, number, undo=undo))
            ended = time.monotonic()
            windows.append((began, ended))
            wait_until(lambda at=ended: bool(busy.sent_and_answered(at, time.monotonic())))  # type: ignore[misc]
            known = busy.acknowledged.copy()
            bak, live = ids_of(root / "engram.db.bak"), ids_of(root / "engram.db")

            before = active | busy.sent_and_answered(released_at, began)
            assert before <= bak, f"restore {number}: {len(before - bak)} writes are not in engram.db.bak"
            came_back = previous if undo else base
            assert came_back <= live, f"restore {number}: the {'undone' if undo else 'backed up'} rows are not there"
            after = {i for i, (sent, _) in known.items() if sent >= ended}
            assert after <= live, f"restore {number}: {len(after - live)} writes after the release are lost"
            during = {i for i, (_, answered) in known.items() if answered >= began} - after
            assert all((i in bak) != (i in live) for i in during - came_back)
            assert not (live - came_back) & (before - came_back), f"restore {number}: the two databases are mixed"
            assert busy.client.get(f"/v1/memories/{min(base)}").status_code == 200
            active, previous, released_at = live, bak, ended

    assert busy.wrong == [] and calm.wrong == []
    assert busy.statuses["write 201"] and busy.reads and busy.statuses["search 200"]
    assert not any(status.endswith(" 503") for status in calm.statuses), "another tenant noticed"
    assert set(calm.acknowledged) <= ids_of(stack.data_dir / "tenants" / "calm" / "engram.db")
    left = stack.rows("SELECT count(*) FROM maintenance_locks WHERE tenant_id = 'busy' AND holder IS NOT NULL")
    assert left == [(0,)] and not (root / "maintenance").exists()
    longest = [max((gap for at, gap in busy.gaps if b <= at <= e + gap), default=0.0) for b, e in windows]
    print(f"\n{len(busy.acknowledged)} writes acknowledged in {RESTORES} restores, {dict(busy.statuses)}")
    print(f"the other tenant: {len(calm.acknowledged)} writes, {dict(calm.statuses)}")
    print("locked_ms:", *(f"{ms:.1f}" for ms in sorted(locked_ms)))
    print("longest gap of a writer, ms:", *(f"{gap * 1000:.0f}" for gap in sorted(longest)))


def restore(stack: Stack, beside: Beside, backup_id: str, number: int, *, undo: bool) -> float:
    """One restore or undo through Prefect; its locked_ms."""
    if number in THROUGH_THE_WORKER:
        words = ("restore-undo", "busy") if undo else ("restore", "busy", "--backup", backup_id)
        return float(stack.json(*words)["locked_ms"])
    if undo:
        answer = beside.run("undo", "busy")
    else:
        answer = beside.run("restore", "busy", backup_id=backup_id, with_safety_backup=number == 0)
    assert answer["state"] == "COMPLETED", answer["message"]
    return float(answer["result"]["locked_ms"])
