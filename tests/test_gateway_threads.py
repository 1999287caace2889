"""The way from the event loop to a thread and back: nothing is lost on it, whoever leaves meanwhile."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.threads import Threads


def with_threads(count: int, test: Callable[[Threads], Awaitable[None]]) -> None:
    async def run() -> None:
        threads = Threads(count, "test")
        try:
            await asyncio.wait_for(test(threads), 30)
        finally:
            threads.close()

    asyncio.run(run())


def test_every_call_is_answered_however_the_wake_ups_fall() -> None:
    """Results share wake-ups: one that comes while the loop is fetching the others must not be left lying."""

    async def test(threads: Threads) -> None:
        async def client(n: int) -> int:
            return sum([await threads.run(lambda k=k: n * k) for k in range(300)])

        assert await asyncio.gather(*(client(n) for n in range(40))) == [n * 44_850 for n in range(40)]

    with_threads(4, test)


def test_a_call_that_finds_nobody_idle_just_before_a_thread_is_idle_is_not_left_lying() -> None:
    """Handing over and going idle are several steps each: the one interleaving in which each side thinks that the
    other looks, made to happen."""

    async def test(threads: Threads) -> None:
        begun, leave = threading.Event(), threading.Event()

        class Raced(list[Any]):
            def pop(self, *_: Any) -> Any:
                if self:
                    return super().pop()
                leave.set()
                while not self:
                    time.sleep(0.001)
                time.sleep(0.05)  # the thread has looked at what waits, and waits itself
                raise IndexError

        first = threads.run(lambda: begun.set() or leave.wait(20))
        begun.wait(20)
        threads._idle = Raced()
        assert await threads.run(lambda: 7) == 7
        assert await first

    with_threads(1, test)


def test_an_exception_is_its_callers_alone() -> None:
    async def test(threads: Threads) -> None:
        heard: list[BaseException | None] = []
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0, then=heard.append)
        assert await threads.run(lambda: 7, then=heard.append) == 7
        assert [type(e) for e in heard] == [ZeroDivisionError, type(None)]

    with_threads(1, test)


def test_then_is_called_when_the_thread_is_done_though_the_caller_has_left() -> None:
    """Who gives a handle back in `then` must get it back exactly once, and not before the thread is done with it."""

    async def test(threads: Threads) -> None:
        leave, order = threading.Event(), []

        def job() -> None:
            leave.wait(20)
            order.append("thread")

        future = threads.run(job, then=lambda _: order.append("then"))
        future.cancel()
        await asyncio.sleep(0.01)
        assert order == []
        leave.set()
        await threads.run(order.append, "next")
        assert order == ["thread", "next", "then"] or order == ["thread", "then", "next"]

    with_threads(1, test)


def test_closing_waits_for_what_was_asked_for() -> None:
    done: list[int] = []

    async def test(threads: Threads) -> None:
        for n in range(100):
            threads.run(done.append, n)

    with_threads(2, test)
    assert sorted(done) == list(range(100))


def test_an_idle_thread_holds_on_to_nothing() -> None:
    """A result may be megabytes; the thread that made it may wait for its next call for hours."""

    class Large:
        pass

    async def test(threads: Threads) -> None:
        result = await threads.run(Large)
        seen = weakref.ref(result)
        del result
        for _ in range(1_000):
            gc.collect()
            if seen() is None:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the result is still held")

    with_threads(1, test)
