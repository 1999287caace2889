"""Where prometheus-client keeps what a gateway's workers count, so that a full disk kills none of them.

{data_dir}/run/metrics-PORT/place-N            locked (flock) by the worker whose files these are, while it lives
                            counter_pN.db      and `histogram_…`, `gauge_mostrecent_…`: mapped, and read by all workers

The library maps sparse files and names them after process ids. A page without a block is a SIGBUS when the disk is
full, so a worker that took a dead one's place would die as it imports its metrics, and the next one too. Therefore:

- A worker takes the first place that no living one holds, and goes on with the files of who held it: what the dead
  counted stays in the sums, the blocks are there already, and deaths add no files.
- A file is seen, and more of it is mapped, once its blocks are reserved.
- What the disk (or the kernel: no descriptor, no memory) refuses is kept in memory, until `settle` can bring it to its
  file: nothing is lost but by a death before. Meanwhile every worker's `/metrics`, also its own, has what the file had
  last: were they to differ, a scrape of one and then of another would look like a reset. Only where there is no file
  at all does its own have what is in memory, which beats nothing; the others' lack it.
- A worker that could not read its place's file began at 0. It goes to a file beside that one (`…_pN-1.db`), which stays
  as it is when the worker has died: the sums need it, and nobody goes on with it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from prometheus_client import mmap_dict, multiprocess, values
from prometheus_client.mmap_dict import MmapedDict

from shared.log import get_logger

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_FILE_BYTES = 1 << 16  # of a new file; twice as many each time
_RECORD_BYTES = 32  # of a record beside its key, at most
_in_memory: dict[str, Counts] = {}  # by the name of the file that would hold them
_said: set[str] = set()  # of those, which were logged
log = get_logger("metrics")


def install() -> None:
    """Have the library keep values as above from now on. Before the first metric; without shared files, nothing."""
    if _VARIABLE not in os.environ:
        return
    place = _take_place(os.environ[_VARIABLE])
    for module in (values, multiprocess):
        module.MmapedDict = Counts  # type: ignore[attr-defined]
    values.ValueClass = values.MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]


def settle() -> None:
    """Say once what is in memory for want of a disk, and bring it to its file when there is room. Blocking."""
    for name, counts in list(_in_memory.items()):
        file = os.path.basename(name)
        if counts.settle():
            _said.discard(name)
            log.info("metrics_shared", file=file)
        elif name not in _said:
            _said.add(name)
            log.error("metrics_in_memory", file=file, cause=counts.cause)


class Counts(MmapedDict):
    """The library's dictionary of one file, in reserved blocks or in memory."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        self.cause = ""
        self._moving = threading.Lock()  # held while it is seen to where values are
        self._goes_on = True  # from what its file has
        self._f: Any = None
        try:
            _reserve(filename, _FILE_BYTES)
            super().__init__(filename, read_mode)  # type: ignore[no-untyped-call]
        except OSError as e:
            if self._f is not None:
                self._f.close()
                self._f = None
            self._goes_on = False
            self._fname, self._positions = filename, {}
            self._used = 8  # as the library begins a file: its head is how much of it is used
            self._stay_in_memory(mmap.mmap(-1, _FILE_BYTES), e)
            mmap_dict._pack_integer(self._m, 0, self._used)  # type: ignore[no-untyped-call]

    @staticmethod
    def read_all_values_from_file(filename: str) -> Iterator[tuple[str, float, float, int]]:
        """Of any process's file; where there is none, what this one keeps in memory in its stead."""
        found: Iterator[tuple[str, float, float, int]]
        try:
            found = MmapedDict.read_all_values_from_file(filename)  # type: ignore[no-untyped-call]
        except FileNotFoundError:
            if (counts := _in_memory.get(filename)) is None:  # or it was brought there just now
                found = MmapedDict.read_all_values_from_file(filename)  # type: ignore[no-untyped-call]
            else:
                used = counts._used  # first: what is mapped may become larger meanwhile
                found = mmap_dict._read_all_values(counts._m[:used], used)  # type: ignore[no-untyped-call]
        return found

    def settle(self) -> bool:
        """Whether it is in its file now. A count of another thread meanwhile goes with it."""
        with self._moving:
            if _in_memory.get(self._fname) is not self:
                return True  # another thread was faster
            mine = self._m
            try:
                name = self._fname if self._goes_on else _unused(self._fname)
                is_new = not _exists(name)
                at = f"{name}.new" if is_new else name
                file = open(_reserved(at, self._capacity), "r+b")  # noqa: SIM115  as long as the process
            except OSError:
                return False
            try:
                shared = mmap.mmap(file.fileno(), self._capacity)
                taken = mine[:]
                shared[8:] = taken[8:]
                shared[:8] = taken[:8]  # last: who reads meanwhile, or after a death, reads as far as the head says
                if is_new:
                    os.rename(at, name)
            except OSError:
                file.close()
                if is_new:
                    with suppress(OSError):
                        os.unlink(at)
                return False
            self._f, self._m = file, shared
            for place in self._positions.values():
                value = slice(place, place + 16)
                if mine[value] != taken[value] == shared[value]:
                    shared[value] = mine[value]
            _in_memory.pop(self._fname, None)
            self._fname, self._goes_on = name, True
            return True

    def _init_value(self, key: str) -> None:
        with self._moving:
            size = self._capacity
            while self._used + len(key.encode()) + _RECORD_BYTES > size:
                size *= 2
            if size > self._capacity:
                self._grow(size)
            super()._init_value(key)  # type: ignore[no-untyped-call]

    def _grow(self, size: int) -> None:
        """Before the library does, whose way is sparse."""
        if self._f is not None:
            try:
                os.posix_fallocate(self._f.fileno(), 0, size)
                self._m = mmap.mmap(self._f.fileno(), size)
                self._capacity = size
                return
            except OSError as e:
                cause = e
            with suppress(OSError):
                self._f.truncate(self._capacity)  # what it got of what it asked for
            self._f.close()
            self._f = None
        else:
            cause = OSError(0, self.cause)
        memory = mmap.mmap(-1, size)
        memory[: self._used] = self._m[: self._used]
        self._stay_in_memory(memory, cause)

    def _stay_in_memory(self, memory: mmap.mmap, cause: OSError) -> None:
        self._m, self._capacity = memory, len(memory)
        self.cause = cause.strerror or str(cause)
        _in_memory[self._fname] = self


class Shared(multiprocess.MultiProcessCollector):
    """The counts of all processes, with those for which this one has memory and no file."""

    def collect(self) -> Any:
        files = set(_in_memory)  # first: what is brought to its file meanwhile is found there
        with os.scandir(self._path) as entries:
            files.update(entry.path for entry in entries if entry.name.endswith(".db"))
        return self.merge(sorted(files))  # type: ignore[no-untyped-call]


def _take_place(directory: str) -> str:
    """The first that no living process holds; where none is to be had, one's own."""
    n = 0
    while True:
        try:
            fd = os.open(os.path.join(directory, f"place-{n}"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError:
            return str(os.getpid())
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process: nobody closes it
            return f"p{n}"
        except BlockingIOError:
            os.close(fd)
            n += 1
        except OSError:  # no locks here: the next place would not do either
            os.close(fd)
            return str(os.getpid())


def _exists(path: str) -> bool:
    """Raises `OSError` where that cannot be told: what is there must not be replaced."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _unused(path: str) -> str:
    """This or the first beside it that does not exist. Whoever holds the place is alone here."""
    stem, suffix = os.path.splitext(path)
    n = 0
    while _exists(path):
        n += 1
        path = f"{stem}-{n}{suffix}"
    return path


def _reserve(path: str, size: int) -> None:
    """Have blocks for so much of the file and for all there is of it. One that is new appears with them: who reads all
    files cannot read an empty one. Raises `OSError`."""
    is_new = not _exists(path)
    at = f"{path}.new" if is_new else path
    os.close(_reserved(at, size))
    if is_new:
        os.rename(at, path)


def _reserved(path: str, size: int) -> int:
    """The file, open, with blocks; a `.new` one is empty, and gone after an error. Raises `OSError`."""
    is_new = path.endswith(".new")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | (os.O_TRUNC if is_new else 0), 0o600)
    try:
        os.posix_fallocate(fd, 0, max(size, os.fstat(fd).st_size))
    except OSError:
        os.close(fd)
        if is_new:
            with suppress(OSError):
                os.unlink(path)
        raise
    return fd
