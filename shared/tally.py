"""What the workers of this machine's gateway counted, by tenant and UTC day: the one count that is made apart from the
spool, kept across deaths and restarts, so that a segment that vanished is missed and its tenant is named.

{data_dir}/tally/DAY.STARTED-PID    a page: one life of one worker, one day of its requests' ids

A page is a file mapped into the worker: a request costs one addition (0.12 µs) to memory that outlives a SIGKILL.
Records are only added to it. What it is worth when its worker is gone:

| the worker                | the page says                                                                        |
|---------------------------|--------------------------------------------------------------------------------------|
| ended in order, or lives  | exactly what was appended                                                            |
| was SIGKILLed             | that, or one event less: it is counted after its `write(2)`                          |
| died with the machine     | at least so much: pages reach the disk when the kernel thinks fit, and at the end    |

`counted` are events the spool took: in a segment, or in memory while the disk refuses them, where they may still be
lost, which shows here. `lost` are those it dropped and said so; what it had taken and gave up at its worker's end, as
the disk refused it until then, is in both: its tenant and day are named as missing. Which of them arrived is for
`shared.reconcile`.

A page lasts `usage_tally_days`. The next day's is made before midnight; a disk that has no room for a page leaves it in
memory, and each tick tries again.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import Counter
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from shared import boot, partitions
from shared.durable import fsync_path
from shared.log import get_logger
from shared.receipt import Receipt
from shared.settings import Settings
from shared.usage import UsageEvent

_MAGIC = b"ENGTALY1"
_HEADER_BYTES, _BOOT_AT, _ENDED = 128, 8, 8  # the boot id as 36 characters; in words from the start: ended in order
_RECORD_BYTES, _NAME_BYTES, _COUNTED, _LOST = 80, 64, 8, 9  # in words from the record's start
_RECORDS = 48  # of a new page, which is one of memory; twice as many each time
_EARLY = timedelta(minutes=10)
log = get_logger("tally")


class Page(Receipt, frozen=True):
    """`ended`: its worker ended in order. `uncertain`: it died with the machine, so these are at least."""

    pid: int
    started_us: int
    day: date
    counted: dict[str, int]
    lost: dict[str, int]
    ended: bool
    uncertain: bool


def directory(settings: Settings) -> Path:
    return settings.data_dir / "tally"


def first_day(settings: Settings) -> date:
    """The first day whose pages are kept."""
    return datetime.now(UTC).date() - timedelta(days=settings.usage_tally_days - 1)


def read(settings: Settings) -> list[Page]:
    """The pages of every life of the days that are kept. A live worker goes on counting meanwhile."""
    found = []
    for path in sorted(directory(settings).glob("*.*-*")):
        with suppress(FileNotFoundError):
            if (page := _read(path)) is not None and page.day >= first_day(settings):
                found.append(page)
    return found


def _read(path: Path) -> Page | None:
    data = path.read_bytes()
    if not data.startswith(_MAGIC):  # a death between its creation and its first byte
        return None
    day, _, life = path.name.partition(".")
    started, _, pid = life.partition("-")
    counted: dict[str, int] = {}
    lost: dict[str, int] = {}
    words = memoryview(data[: len(data) // 8 * 8]).cast("q")
    for start in range(_HEADER_BYTES, len(data) - _RECORD_BYTES + 1, _RECORD_BYTES):
        if not (name := data[start : start + _NAME_BYTES].rstrip(b"\0")):
            break
        counted[name.decode()] = words[start // 8 + _COUNTED]
        lost[name.decode()] = words[start // 8 + _LOST]
    ended = bool(words[_ENDED])
    here = data[_BOOT_AT:].startswith(boot.boot_id().encode())
    return Page(int(pid), int(started), date.fromisoformat(day), counted, lost, ended, not ended and not here)


class Tally:
    """One worker's. `count` and `lose` are for whoever holds `lock`, the rest for a thread that does not."""

    def __init__(self, settings: Settings, lock: threading.Lock) -> None:
        self._settings = settings
        self._dir = directory(settings)
        self._lock = lock
        self._life = f"{time.time_ns() // 1000:016d}-{os.getpid()}"
        self._pages: dict[date, _OpenPage] = {}
        self._failing = False
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._page = self._page_of(datetime.now(UTC).date())
        self.tick()

    def count(self, event: UsageEvent) -> None:
        """The spool has taken it."""
        page = self._page
        if not page.first <= event.request_id < page.after:
            page = self._turn(event)
        try:
            page.words[page.counted_at[event.tenant_id]] += 1
        except KeyError:
            at = page.enter(event.tenant_id)  # may move the words
            page.words[at] += 1

    def lose(self, event: UsageEvent) -> None:
        """It was dropped."""
        page = self._turn(event)
        at = page.counted_at.get(event.tenant_id) or page.enter(event.tenant_id)
        page.words[at + _LOST - _COUNTED] += 1

    def tick(self) -> None:
        """Bring new pages to the disk, make the next day's in time, remove old ones. Blocking."""
        with self._lock:
            self._page_of((datetime.now(UTC) + _EARLY).date())
            new = [page for page in self._pages.values() if not page.durable]
        if not new:
            return
        try:
            for page in new:
                with self._lock:
                    page.save()
                fsync_path(page.path)
            fsync_path(self._dir)
        except OSError as e:
            if not self._failing:
                log.error("tally_unsaved", cause=e.strerror)
            self._failing = True
            return
        for page in new:
            page.durable = page.saved
        self._failing = False
        self._remove_old()

    def close(self) -> bool:
        """Its worker ends in order. What is counted after this still counts. False: a disk without room for a page has
        it end with its worker."""
        self.tick()
        with self._lock:
            for page in self._pages.values():
                page.end()
            return all(page.saved or not page.counted_at for page in self._pages.values())

    def _turn(self, event: UsageEvent) -> _OpenPage:
        """The page of the event's day; the newest day's stays at hand."""
        page = self._page_of(partitions.day_of(event.request_id))
        if page.first > self._page.first:
            self._page = page
        return page

    def _page_of(self, day: date) -> _OpenPage:
        if (page := self._pages.get(day)) is None:
            page = self._pages[day] = _OpenPage(self._dir / f"{day}.{self._life}", day)
        return page

    def _remove_old(self) -> None:
        first = str(first_day(self._settings))
        for path in self._dir.glob("*.*-*"):
            if path.name < first:
                with suppress(OSError):  # a disk that keeps it will be asked again
                    path.unlink()
        with self._lock:
            for day in [day for day in self._pages if str(day) < first]:
                del self._pages[day]


class _OpenPage:
    """In memory until it is saved; `counted_at` says at which of `words` a tenant is counted."""

    __slots__ = ("_map", "after", "counted_at", "durable", "first", "path", "saved", "words")

    def __init__(self, path: Path, day: date) -> None:
        self.path = path
        self.first, self.after = (bound.bytes for bound in partitions.bounds_of(day))
        self.counted_at: dict[str, int] = {}
        self.saved = self.durable = False
        self._map = mmap.mmap(-1, _HEADER_BYTES + _RECORDS * _RECORD_BYTES)
        self._map[: len(_MAGIC)] = _MAGIC
        boot_id = boot.boot_id().encode()
        self._map[_BOOT_AT : _BOOT_AT + len(boot_id)] = boot_id
        self.words = memoryview(self._map).cast("q")

    def save(self) -> None:
        """Raises the disk's `OSError`."""
        if not self.saved:
            self._move(self._on_disk(len(self._map)))
            self.saved = True

    def enter(self, tenant_id: str) -> int:
        """Begin to count a tenant."""
        name = tenant_id.encode()
        if len(name) >= _NAME_BYTES:
            raise ValueError(f"{tenant_id} is no tenant id")
        start = _HEADER_BYTES + len(self.counted_at) * _RECORD_BYTES
        if start + _RECORD_BYTES > len(self._map):
            self._grow(_HEADER_BYTES + 2 * len(self.counted_at) * _RECORD_BYTES)
        self._map[start : start + len(name)] = name
        at = self.counted_at[tenant_id] = start // 8 + _COUNTED
        return at

    def end(self) -> None:
        self.words[_ENDED] = 1
        with suppress(OSError):  # then it is at least, should the machine die now
            self._map.flush()

    def release(self) -> None:
        self.words.release()
        self._map.close()

    def _grow(self, size: int) -> None:
        if self.saved:
            try:
                self._move(self._on_disk(size))
                return
            except OSError:  # in memory until there is room
                self.saved = self.durable = False
        self._move(mmap.mmap(-1, size))

    def _on_disk(self, size: int) -> mmap.mmap:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)  # a mapped page without a block is a SIGBUS when the disk is full
            return mmap.mmap(fd, size)
        finally:
            os.close(fd)

    def _move(self, to: mmap.mmap) -> None:
        to[: len(self._map)] = self._map[:]
        self.release()
        self._map, self.words = to, memoryview(to).cast("q")


def total(pages: list[Page]) -> tuple[Counter[tuple[str, date]], Counter[tuple[str, date]]]:
    """Counted and lost, by tenant and day."""
    counted: Counter[tuple[str, date]] = Counter()
    lost: Counter[tuple[str, date]] = Counter()
    for page in pages:
        for tenant_id, events in page.counted.items():
            counted[tenant_id, page.day] += events
        for tenant_id, events in page.lost.items():
            lost[tenant_id, page.day] += events
    return counted, lost
