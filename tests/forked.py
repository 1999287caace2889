"""Children that are forked from a process that has imported what they need: what a child of a test does takes
milliseconds, and its imports took half a second.

The child is the test's own, as if it had started it: in both its pipes, its pid, its exit code, its signals. (Forked by
another, it becomes so when the one between the two ends, for a moment in which orphans come to the test's process.)
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import gc
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36  # <sys/prctl.h>
_MOST_BYTES = 100_000
_prctl = ctypes.CDLL(None, use_errno=True).prctl
_one_at_a_time = threading.Lock()  # an answer is for whoever asked last, and whose orphans come is the process's


class ForkedChild(subprocess.Popen[str]):
    """`python -c CODE WORDS…` in `cwd`, by a fork; only its three files can be chosen otherwise."""

    def _execute_child(self, args: Any, executable: Any, preexec_fn: Any, close_fds: Any, pass_fds: Any, cwd: Any,
                       env: Any, startupinfo: Any, creationflags: Any, shell: Any, p2cread: int, p2cwrite: int,
                       c2pread: int, c2pwrite: int, errread: int, errwrite: int, *_: Any) -> None:  # fmt: skip
        """What `Popen` calls to start it."""
        chosen = zip((p2cread, c2pwrite, errwrite), range(3), strict=True)
        try:
            with _one_at_a_time:
                self.pid = _forker().fork(args, cwd, env, [own if given == -1 else given for given, own in chosen])
        finally:
            self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)  # type: ignore[attr-defined]
        self._child_created = True


class _Forker:
    def __init__(self) -> None:
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        code = "import sys; from tests import forked; exec(forked.serve(int(sys.argv.pop())), {'__name__': '__main__'})"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._end)

    def fork(self, words: Sequence[str], directory: str, environment: Mapping[str, str], files: list[int]) -> int:
        """Its pid. `OSError` when it does not become this process's own: `Popen` would call every end of it a 0."""
        message = json.dumps([words, os.fspath(directory), dict(environment)]).encode()
        _orphans_come_here(True)
        try:
            socket.send_fds(self._channel, [message], files)
            pid = int(self._channel.recv(100))
        finally:
            _orphans_come_here(False)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)  # fails for what is not a child of this process
        return pid

    def _end(self) -> None:
        self._channel.close()
        self._process.wait()


def _orphans_come_here(come: bool) -> None:
    if _prctl(_PR_SET_CHILD_SUBREAPER, int(come), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@functools.cache
def _forker() -> _Forker:
    return _Forker()


def serve(fd: int) -> str:
    """Fork for who asks; returns in the child only, with its code."""
    from tests import core_fixtures, crash_fixtures, move_processes  # noqa: F401 what most children need

    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=fd)
    while True:
        message, files, *_ = socket.recv_fds(channel, _MOST_BYTES, 3)
        if not message:
            sys.exit()
        told, tell = os.pipe()
        if not os.fork():
            between = os.getpid()
            if os.fork():
                os._exit(0)
            while os.getppid() == between:  # or a child that asks to die with its parent dies with that one
                time.sleep(0.0001)
            os.write(tell, str(os.getpid()).encode())
            for at, file in enumerate(files):
                os.dup2(file, at)
            channel.close()
            os.closerange(3, max(*files, told, tell) + 1)
            [code, *sys.argv[1:]], directory, environment = json.loads(message)
            os.chdir(directory)
            os.environ.clear()
            os.environ.update(environment)
            return str(code)
        os.wait()
        os.close(tell)
        channel.send(os.read(told, 100))
        for file in (told, *files):
            os.close(file)
