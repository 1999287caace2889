"""Metrics are rendered for everybody at once, and never twice within the time they stay fresh."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.exposition import Exposition


class Renderer:
    """Counts how often it was asked; fails the first `failures` times."""

    def __init__(self, failures: int = 0) -> None:
        self.count = 0
        self._failures = failures

    def __call__(self) -> bytes:
        self.count += 1
        time.sleep(0.05)
        if self.count <= self._failures:
            raise OSError("a file is gone")
        return b"%d" % self.count


def test_who_asks_together_or_soon_after_gets_one_rendering() -> None:
    """A flood of scrapes costs as much as a few."""

    async def run(fresh_seconds: float) -> tuple[set[bytes], bytes]:
        exposition = Exposition(Renderer(), fresh_seconds)
        together = set(await asyncio.gather(*(exposition.text() for _ in range(50))))
        return together, await exposition.text()

    assert asyncio.run(run(60)) == ({b"1"}, b"1")
    assert asyncio.run(run(0)) == ({b"1"}, b"2")


def test_a_rendering_that_fails_or_whose_client_leaves_holds_up_nobody() -> None:
    """Whoever waits for it is told, the next one tries again; it goes on for the others."""

    async def run() -> tuple[bytes, int]:
        renderer = Renderer(failures=1)
        exposition = Exposition(renderer, 60)
        with pytest.raises(OSError):
            await exposition.text()
        left = asyncio.create_task(exposition.text())
        await asyncio.sleep(0)
        other = asyncio.create_task(exposition.text())
        await asyncio.sleep(0)
        left.cancel()
        return await other, renderer.count

    assert asyncio.run(run()) == (b"2", 2)
