"""What a forked child has in common with one that was started: how it ends."""

import os
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests import forked
from tests.core_fixtures import start_child


def exit_code(code: int) -> int:
    with start_child("import sys; sys.exit(int(sys.argv[1]))", code) as child:
        return child.wait(60)


def test_children_forked_by_threads_keep_their_own_exit_codes() -> None:
    """There is one forker: two that ask it at once must neither swap their children nor lose them."""
    codes = list(range(30))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(exit_code, codes)) == codes


@pytest.mark.parametrize("answer", [-1, 0])  # refused, and without effect
def test_a_child_that_does_not_become_this_processes_own_is_an_error(
    monkeypatch: pytest.MonkeyPatch, answer: int
) -> None:
    """Nobody could learn its exit code, and `Popen` calls that 0: a test would pass whatever its child did."""
    monkeypatch.setattr(forked, "_prctl", lambda *_: answer)
    with pytest.raises(OSError, match="prctl" if answer else "No child processes"):
        exit_code(3)


def test_a_child_has_the_test_as_its_parent_from_its_first_line_on() -> None:
    """One that asks to die with its parent would die with whoever forked it, now and then."""
    for _ in range(30):
        with start_child("import os; print(os.getppid())") as child:
            assert child.communicate(timeout=60)[0] == f"{os.getpid()}\n"


def test_a_forked_command_ends_as_an_interpreter_does() -> None:
    """What waits for the end of an interpreter, a pool's threads or Prefect's queue of logs, waits for this one too."""
    command = """
        import atexit, sys
        from concurrent.futures import ThreadPoolExecutor
        atexit.register(print, "then what was registered")
        sys.kept = ThreadPoolExecutor(1)  # its thread ends when it is told to, not with its work
        sys.kept.submit(print, "the pool's work")
    """
    code = """
        import json, os, socket, sys
        from tests import forked_python
        asks, answers = socket.socketpair()
        socket.send_fds(asks, [b"."], [0, 1, 2])
        asks.sendall(json.dumps([["-c", sys.argv[1]], dict(os.environ), os.getcwd()]).encode())
        asks.shutdown(socket.SHUT_WR)
        forked_python._answer(answers, os.getppid())
    """
    with start_child(code, textwrap.dedent(command)) as child:
        try:
            written, _ = child.communicate(timeout=60)
        finally:
            child.kill()
    assert (child.returncode, written.splitlines()) == (0, ["the pool's work", "then what was registered"])
