"""A child process that must not outlive its parent."""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None


def end_with_parent(parent_pid: int, number: int) -> None:
    """In the child: have the kernel send it signal `number` when its parent dies; exit now if that has happened.

    The kernel ties this to the parent's *thread*: start children from a thread that lives as long as the process.
    Allocates nothing worth the name: it may run between fork and exec. Without effect where there is no prctl.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)
