"""Ports for what a test starts a moment later, which nobody else is given meanwhile.

Those that the kernel chooses, for who binds port 0 and for who connects, are of a range of its own, and one that was
given back is soon given out again. These are below that range, and each process of a session has a share of them, of
which it takes one after the other.
"""

from __future__ import annotations

import itertools
import os
import random
import socket

_FIRST, _SHARE, _SHARES = 20_000, 750, 17  # up to 32,749; the kernel's begin with 32,768
_worker = os.environ.get("PYTEST_XDIST_WORKER", "")  # "gw0" and so on; empty for a process of its own
_share = int(_worker[2:]) % (_SHARES - 1) if _worker else _SHARES - 1
_offsets = itertools.count(random.randrange(_SHARE))  # another session's may be as far


def free_port() -> int:
    """Nobody listens there now."""
    while True:
        port = _FIRST + _share * _SHARE + next(_offsets) % _SHARE
        with socket.socket() as tried:
            try:
                tried.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def free_ports(count: int) -> list[int]:
    """All different."""
    return [free_port() for _ in range(count)]
