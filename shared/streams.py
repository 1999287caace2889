"""What a stored object flows through while it is packed or unpacked: a source, a sink, clocks, age.

Each end counts its bytes and its time, so that a restore test can say where the time went; the sink hashes, and stops
what grows beyond what it should be. It can do so in a thread of its own, while the next bytes are made (`aside`).
"""

from __future__ import annotations

import errno
import hashlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from shared.errors import NoSpace

Progress = Callable[[int], object]
_AHEAD = 4  # pieces of up to a megabyte


def through(cipher: Callable[[Any, Any], object], reader: Any, writer: Any) -> None:
    """Run age between a reader and a writer. What they raise comes out as it was: pyrage would make its text of it."""
    failures: list[BaseException] = []
    try:
        cipher(_Guard(reader, failures), _Guard(writer, failures))
    except Exception as e:
        if failures:
            raise failures[0] from e
        raise AgeError(str(e)) from e


class _Guard:
    """A file object for pyrage that remembers what was raised."""

    def __init__(self, inner: Any, failures: list[BaseException]) -> None:
        self._inner, self._failures = inner, failures

    def read(self, count: int) -> bytes:
        return cast(bytes, self._guarded(self._inner.read, count))

    def write(self, data: bytes) -> int:
        return cast(int, self._guarded(self._inner.write, data))

    def flush(self) -> None:
        pass

    def _guarded(self, call: Callable[[Any], Any], argument: Any) -> Any:
        if self._failures:
            raise self._failures[0]
        try:
            return call(argument)
        except BaseException as e:
            self._failures.append(e)
            raise


class Clock:
    """Seconds spent inside `with`."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._begun


class Timed:
    """A writer whose time is counted, that of the sink behind it included."""

    def __init__(self, inner: Any, clock: Clock) -> None:
        self._inner, self._clock = inner, clock

    def write(self, data: Any) -> int:
        with self._clock:
            return int(self._inner.write(data))


class AgeError(Exception):
    """pyrage's own: DecryptError for the header, OSError for what follows it."""


class TooLarge(Exception):
    """More bytes than the catalogue says."""


class Source:
    """The object's chunks as a file to read. Waiting for them is the download."""

    def __init__(self, chunks: Iterable[Any]) -> None:
        self._chunks, self._rest = iter(chunks), memoryview(b"")
        self.clock, self.size = Clock(), 0

    def read(self, count: int) -> bytes:
        while not self._rest:
            with self.clock:
                chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
            self.size += len(self._rest)
        data, self._rest = bytes(self._rest[:count]), self._rest[count:]
        return data


class Sink:
    """The end of the line: a file, its sha256 and its size."""

    def __init__(self, *, limit: int | None = None, progress: Progress | None = None) -> None:
        self.file: BinaryIO | None = None
        self.limit, self._progress = limit, progress
        self.digest, self.size, self.clock = hashlib.sha256(), 0, Clock()

    def write(self, data: Any) -> int:
        self.take(data)
        self.tell()
        return len(data)

    def take(self, data: Any) -> None:
        with self.clock:
            self.size += len(data)
            if self.limit is not None and self.size > self.limit:
                raise TooLarge
            self.digest.update(data)
            if self.file is not None:
                self.file.write(data)

    def tell(self) -> None:
        if self._progress is not None:
            self._progress(self.size)


class Aside:
    """A sink that takes in another thread, at most `_AHEAD` pieces behind; `clock`: the time its writer waited for it.

    What the sink raises is raised by the next write, or by `close`; nothing is taken after it.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink, self.clock = sink, Clock()
        self._pieces: queue.Queue[Any] = queue.Queue(_AHEAD)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._take, name="sink", daemon=True)
        self._thread.start()

    def write(self, data: Any) -> int:
        if self._failure is not None:
            raise self._failure
        with self.clock:
            self._pieces.put(data)
        self._sink.tell()  # here: who is told may know only its own thread
        return len(data)

    def close(self) -> None:
        self.end()
        if self._failure is not None:
            raise self._failure
        self._sink.tell()

    def end(self) -> None:
        """Wait for what was written. Raises nothing."""
        with self.clock:
            if self._thread.is_alive():
                self._pieces.put(None)
            self._thread.join()

    def _take(self) -> None:
        while (data := self._pieces.get()) is not None:
            if self._failure is None:
                try:
                    self._sink.take(data)
                except BaseException as e:  # noqa: BLE001  raised where it is looked for, by the writer
                    self._failure = e


@contextmanager
def aside(sink: Sink, wanted: bool) -> Iterator[Sink | Aside]:
    """The sink, or one in another thread, which has taken all when this ends."""
    if not wanted:
        yield sink
        return
    beside = Aside(sink)
    try:
        yield beside
        beside.close()
    finally:
        beside.end()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full disk is `NoSpace`."""
    try:
        yield
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpace(f"no space left for {path}") from e
        raise
