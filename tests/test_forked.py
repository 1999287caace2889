"""What a forked child has in common with one that was started: its exit code is its own, or it is none at all."""

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
