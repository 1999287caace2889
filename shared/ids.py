"""Ids: UUIDv7 (RFC 9562). Their first 48 bits are the time, so rows sort by when they were made and land at one end
of an index. Made here, because the packages for it cost 7 µs an id and the hot path makes two; this costs one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from uuid import UUID

_RANDOM_BYTES = 10 * 400
_RANDOM_BITS = (1 << 76) - 1 ^ 3 << 62  # of a UUIDv7 below its version, without its variant
_VERSION_AND_VARIANT = 7 << 76 | 2 << 62


def mint(milliseconds: int) -> bytes:
    """The 16 bytes of a UUIDv7 of that time (since 1970): 48 bits of time, version 7, 74 random bits."""
    random = int.from_bytes(_random(), "big")
    return (milliseconds << 80 | random & _RANDOM_BITS | _VERSION_AND_VARIANT).to_bytes(16, "big")


def as_text(key: bytes) -> str:
    """An id's 36 characters."""
    h = key.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"


def new_text_id() -> str:
    """An id of now, as text."""
    return as_text(mint(time.time_ns() // 1_000_000))


def new_id() -> UUID:
    """An id of now."""
    return UUID(bytes=mint(time.time_ns() // 1_000_000))


class _Random:
    """10 random bytes a call, of which the kernel is asked for 400 at a time: asked each time it is a microsecond, and
    gives Python's lock to any thread that waits for it. For any thread: taking one from the iterator is one step."""

    def __init__(self) -> None:
        self._left: Iterator[bytes] = iter(())
        os.register_at_fork(after_in_child=self._forget)

    def __call__(self) -> bytes:
        while True:
            for found in self._left:
                return found
            data = os.urandom(_RANDOM_BYTES)
            self._left = iter([data[at : at + 10] for at in range(0, _RANDOM_BYTES, 10)])

    def _forget(self) -> None:
        self._left = iter(())  # or parent and child would mint the same ids


_random = _Random()
