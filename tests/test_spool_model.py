"""Any life of a spool, against a model: every acknowledged event is in exactly one place.

Two workers append, seal, die and come back; a drainer adopts, drains, dies between commit and unlink; bytes rot; the
disk is full or fails a call. The disk is a real small tmpfs where mounting is permitted.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from shared import durable, segment, spool, spool_dir
from shared.errors import SpoolUnavailable
from shared.spool import Spool
from shared.usage import UsageEvent
from tests.core_fixtures import event, settings_in

WORKERS = st.integers(0, 1)
TENANTS = ["a", "tenant-of-63-characters".ljust(63, "x")]  # frames of different lengths


class SpoolLife(RuleBasedStateMachine):
    """`events` is every acknowledged one; `rotten` those whose bytes were damaged; `died` those a death took from
    memory, where they waited because the disk had refused them (docstring of `shared.spool`)."""

    disk: Path
    fails: set[str]
    happened: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        self._directory = tempfile.TemporaryDirectory(dir=self.disk, ignore_cleanup_errors=True)
        self.settings = settings_in(
            Path(self._directory.name),
            "",
            usage_flush_events=80,
            usage_flush_seconds=3600,
            usage_backlog_events=100,
        )
        self.directory = self.settings.spool_dir
        self.workers = [Spool(self.settings), Spool(self.settings)]
        self.events: dict[bytes, UsageEvent] = {}
        self.billed: Counter[bytes] = Counter()
        self.rotten: set[bytes] = set()
        self.died: set[bytes] = set()
        self.lost: set[bytes] = set()
        self.torn = False  # an interrupted write could not be taken back
        self.damaged: set[str] = set()  # segments
        self.ballast = Path(self._directory.name) / "ballast"

    def teardown(self) -> None:
        self.fails.clear()
        self.ballast.unlink(missing_ok=True)
        for worker in self.workers:
            worker.tick()
            worker.close()
        self.drain(-1)
        assert self.billed.keys() | self.rotten | self.died | self.lost == self.events.keys()
        assert set(self.billed) - self.rotten == self.events.keys() - self.rotten - self.died - self.lost
        assert not list(self.directory.glob("*.*"))
        self._directory.cleanup()

    @rule(worker=WORKERS, tenant=st.sampled_from(TENANTS), count=st.sampled_from([1, 5, 35, 60]))
    def append(self, worker: int, tenant: str, count: int) -> None:
        for _ in range(count):
            one = event(tenant)
            before = len(self.workers[worker]._backlog)
            name = self.workers[worker].append(one)
            self.events[one.request_id] = one
            self.happened["refused by the disk"] += not name
            if not name and len(self.workers[worker]._backlog) == before:
                self.happened["dropped"] += 1
                self.lost.add(one.request_id)
                assert before == 100, "only the full backlog loses"

    @rule(worker=WORKERS)
    def tick(self, worker: int) -> None:
        self.workers[worker].tick()

    @rule(worker=WORKERS)
    def sync(self, worker: int) -> None:
        """When nothing is left to be made durable, the gateway is open."""
        its = self.workers[worker]
        its.sync()
        assert its.available or its._backlog or its._sealing

    @rule(worker=WORKERS)
    def restart(self, worker: int) -> None:
        try:
            self.workers[worker].close()
        except SpoolUnavailable:
            return  # it said so; the worker lives on in this model
        self.fails.clear()
        self.workers[worker] = Spool(self.settings)

    @rule(worker=WORKERS)
    def kill(self, worker: int) -> None:
        """The kernel closes its descriptors and with them its locks; its memory is gone."""
        dead = self.workers[worker]
        self.died |= set(waiting(dead))
        self.happened["killed with events in an open segment"] += dead._segment is not None
        for held in [dead._segment, *dead._sealing]:
            if held is not None:
                os.close(held._fd)
        self.fails.clear()
        self.workers[worker] = Spool(self.settings)

    @rule()
    def adopt(self) -> None:
        spool.adopt(self.directory)

    @rule(unlinked=st.integers(-1, 3))
    def drain(self, unlinked: int) -> None:
        """Like `shared.metering`: quarantine, commit, unlink. It dies after so many unlinks, having committed one
        more; -1: it does not."""
        spool.adopt(self.directory)
        for n, path in enumerate(spool.sealed(self.directory)):
            content = spool.read(path)
            try:
                spool.quarantine(path, content)
            except OSError:
                return  # no room for the damage: the segment stays
            assert not content.damage or self.torn or path.name in self.damaged
            kept = self.directory / "quarantine" / f"{path.stem}.bad"
            assert all(piece in kept.read_bytes() for _, piece in content.damage), "never away"
            self.happened["damaged"] += bool(content.damage)
            for one in content.events:
                assert one == self.events[one.request_id], "an event that nobody wrote"
                self.billed[one.request_id] = 1  # ON CONFLICT DO NOTHING
            if n == unlinked:
                return
            path.unlink()

    @precondition(lambda self: spool.sealed(self.directory))
    @rule(chance=st.randoms(use_true_random=False), cut=st.booleans())
    def rot(self, chance: random.Random, cut: bool) -> None:
        """One flipped bit, or a tail cut off, in a sealed segment; what it hits is not to be billed any more."""
        path = chance.choice(spool.sealed(self.directory))
        before = {e.request_id for e in spool.read(path).events}
        raw = bytearray(path.read_bytes())
        if len(raw) <= len(spool.MAGIC):
            return
        at = chance.randrange(len(spool.MAGIC), len(raw))
        if cut:
            with path.open("r+b") as file:
                file.truncate(at)
        else:
            with path.open("r+b", buffering=0) as file:
                file.seek(at)
                file.write(bytes([raw[at] ^ (1 << chance.randrange(8))]))
        self.damaged.add(path.name)
        hit = before - {e.request_id for e in spool.read(path).events}
        assert cut or len(hit) <= 1
        self.rotten |= hit - self.billed.keys()

    @rule(free=st.integers(0, 6000))
    def disk_full(self, free: int) -> None:
        with suppress(OSError), self.ballast.open("wb", buffering=0) as file:
            while self.ballast.stat().st_size < 1 << 20:
                file.write(bytes(4096))
        with suppress(OSError):
            os.truncate(self.ballast, max(0, self.ballast.stat().st_size - free))

    @rule()
    def disk_has_room(self) -> None:
        self.ballast.unlink(missing_ok=True)
        self.fails.clear()

    @rule(call=st.sampled_from(["fdatasync", "fsync", "rename", "ftruncate", "open", "write"]))
    def disk_fails(self, call: str) -> None:
        """The next such call of the spool fails with EIO."""
        self.fails.add(call)
        self.torn |= call == "ftruncate"

    @invariant()
    def each_event_is_in_exactly_one_place(self) -> None:
        places: Counter[bytes] = Counter()
        for path in [*self.directory.glob("*.open"), *self.directory.glob("*.seg")]:
            places.update({e.request_id: n for e, n in Counter(spool.read(path).events).items()})
        for worker in self.workers:
            places.update(waiting(worker))
        assert max(places.values(), default=1) == 1, "twice"
        assert places.keys() <= self.events.keys()
        assert self.events.keys() == places.keys() | self.billed.keys() | self.rotten | self.died | self.lost
        assert not places.keys() & (self.died | self.lost)


def waiting(worker: Spool) -> list[bytes]:
    """The request ids in its memory."""
    return [found[0].request_id for data in worker._backlog if (found := segment._frame_at(data, 0))]


class FailingCalls:
    """The module `os` as the spool sees it: a call named in `fails` fails once."""

    def __init__(self, fails: set[str]) -> None:
        self._fails = fails

    def __getattr__(self, name: str) -> Any:
        if name in self._fails:
            self._fails.remove(name)

            def fail(*_: object) -> None:
                raise OSError(5, "Input/output error", name)

            return fail
        return getattr(os, name)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    # The pages of the tally, one a life of a worker, are about half of it.
    command = ["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    yield tmp_path
    if mounted:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_any_life_of_a_spool_keeps_every_event_in_exactly_one_place(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drained, on the disk, in memory while the disk refuses, or damaged and in quarantine: not lost, not twice."""
    fails: set[str] = set()
    happened = Counter[str]()
    for module in (segment, spool_dir, durable):
        monkeypatch.setattr(module, "os", FailingCalls(fails))
    everything = os.environ.get("ENGRAM_CRASH_POINTS") == "all"
    # Always the same lives are not enough: which they are depends on the modules that this process has imported, out of
    # whose constants Hypothesis makes them.
    for again in range(20):
        run_state_machine_as_test(
            type("Life", (SpoolLife,), {"disk": disk, "fails": fails, "happened": happened}),
            settings=settings(
                max_examples=500 if everything else 60,
                stateful_step_count=30,
                derandomize=not everything and not again,
                suppress_health_check=list(HealthCheck),
            ),
        )
        if len(happened) == 4:
            break
    print(dict(happened))
    assert len(happened) == 4
    assert all(happened.values())
