"""A process that has done its work ends at once, with everything it promised."""

from __future__ import annotations

import subprocess
import sys

WORK = """
import atexit, sys, threading, time
from shared.ending import ends_with

class Kept:
    def __del__(self):
        print("taken apart")

atexit.register(print, "left in order")
kept = Kept()
kept.itself = kept
threading.Thread(target=lambda: (time.sleep(0.3), print("thread done"))).start()
print("work done")
ends_with(3)
"""


def test_it_ends_with_its_code_when_its_threads_and_what_it_registered_are_done_but_takes_nothing_apart() -> None:
    """Lines that were buffered, a thread that still writes, a directory to be removed: all as ever."""
    done = subprocess.run([sys.executable, "-c", WORK], stdout=subprocess.PIPE, text=True, check=False)
    assert done.stdout.splitlines() == ["work done", "thread done", "left in order"]
    assert done.returncode == 3


def test_whose_output_cannot_be_written_does_not_end_as_if_it_had_been() -> None:
    """A full disk behind `>`: the lines are still in the buffer when the work is done."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from shared.ending import ends_with; print('x'); ends_with(3)"],
            stdout=full,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    assert done.returncode not in (0, 3)


def test_who_ends_now_waits_for_no_thread() -> None:
    """One of an executor's, which waits for an answer that does not come, would keep the process for ever."""
    work = "import concurrent.futures, time; from shared.ending import end_now; print('x')\n"
    work += "concurrent.futures.ThreadPoolExecutor(1).submit(time.sleep, 600); end_now(3)"
    done = subprocess.run([sys.executable, "-c", work], stdout=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.stdout, done.returncode) == ("x\n", 3)
