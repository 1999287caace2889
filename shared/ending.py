"""The end of a process that has done its work: without taking itself apart first.

An interpreter that ends frees a hundred thousand objects one by one, which for a gateway's worker takes a tenth of a
second of CPU and for a short command as long as its work. The kernel does it at once. And a thread of Granian's that is
still on its way out and asks for the interpreter meanwhile would abort the process (SIGABRT on a busy machine).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn

_code: int | None = None


def ends_with(code: int) -> None:
    """This process is done and ends with `code`: once its threads have ended, and what others registered with `atexit`
    since this module was imported has run."""
    global _code
    _code = code


def end_now(code: int) -> NoReturn:
    """End with `code` whatever other threads are at. For a process whose work is safe: one that waits for an answer
    of a database that gives none would keep it for ever (measured: PostgreSQL behind a connection that went silent kept
    a gateway's worker, which had sealed its spool, until it was killed)."""
    with contextlib.suppress(OSError, ValueError):  # nobody reads any more
        _flush()
    os._exit(code)


@atexit.register
def _end() -> None:
    if _code is None:
        return
    try:
        _flush()
    except (OSError, ValueError):
        return  # nobody reads any more: the interpreter's own end says so, with a code of its own
    os._exit(_code)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
