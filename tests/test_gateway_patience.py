"""A body that does not come is given up on; nothing else that happens to its task is."""

from __future__ import annotations

import asyncio

import pytest

from gateway.patience import Patience


def test_what_takes_too_long_is_a_timeout_and_its_task_goes_on() -> None:
    """The refusal is written by the same task."""

    async def run() -> str:
        with pytest.raises(TimeoutError):
            await Patience().wait(asyncio.sleep(60), 0.01)
        await asyncio.sleep(0)
        return "went on"

    assert asyncio.run(run()) == "went on"


def test_each_body_has_its_own_time() -> None:
    """One timer looks at all of them."""

    async def run() -> list[object]:
        patience = Patience()
        waits = [patience.wait(asyncio.sleep(delay, delay), limit) for delay, limit in ((60, 0.01), (0.3, 60), (0, 60))]
        return [str(type(r).__name__) for r in await asyncio.gather(*waits, return_exceptions=True)]

    assert asyncio.run(run()) == ["TimeoutError", "float", "int"]


def test_a_task_cancelled_by_somebody_else_is_cancelled() -> None:
    """A client that leaves ends its request, also when the body is late at the same moment."""

    async def run(late: bool) -> None:
        patience = Patience()
        task = asyncio.create_task(patience.wait(asyncio.sleep(60), 0 if late else 60))
        await asyncio.sleep(0)
        if late:
            patience._look()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run(late=False))
    asyncio.run(run(late=True))
