"""A Litestream beside a `World`, followed by hand or by a thread. Taken in with
`pytest_plugins`, beside `tests.core_fixtures`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared import litestream, litestream_copies
from shared.litestream import Control
from shared.litestream_copies import Copy
from shared.litestream_follow import Follower
from shared.objects import ObjectStore
from shared.settings import Settings
from tests.core_fixtures import World, contents_of


def with_copies(world: World, **more: object) -> World:
    """The same tenant with the layer on."""
    settings = world.settings.model_copy(update={"point_in_time": "litestream", **more})
    return World(settings, world.control_plane, ObjectStore(settings), world.tenant_id)


@pytest.fixture
def layered(world: World) -> World:
    """A tenant with a backup of "old", the layer on."""
    made = with_copies(world)
    made.write("old")
    made.back_up()
    return made


@contextmanager
def copied(world: World, *, poll_seconds: float | None = None) -> Iterator[Follower]:
    """Inside, Litestream copies the world's tenant; with `poll_seconds` what is active is followed by a thread."""
    follower = Follower(world.settings)
    follower.start()
    done = threading.Event()

    def look() -> None:
        while not done.wait(poll_seconds):
            follower.look()

    thread = threading.Thread(target=look, name="follower")
    if poll_seconds is not None:
        thread.start()
    try:
        yield follower
    finally:
        done.set()
        if poll_seconds is not None:
            thread.join()
        follower.stop()


def copies(world: World) -> list[Copy]:
    return litestream_copies.find(world.objects, world.tenant_id)


def damage(world: World, copy: Copy) -> None:
    """Turn the middle of each of its files in the local store."""
    for file in (world.settings.data_dir / "objects" / copy.prefix).rglob("*.ltx"):
        data = bytearray(file.read_bytes())
        middle = len(data) // 2
        data[middle : middle + 64] = bytes(b ^ 0xFF for b in data[middle : middle + 64])
        file.write_bytes(data)


def caught_up(world: World) -> datetime:
    """Wait until all that is committed now is in the copy; an instant after that and before anything else."""
    sync(world.settings, world.paths.database)
    return datetime.now(UTC)


def sync(settings: Settings, database: Path) -> None:
    """Return when all that is committed now is in the copy."""
    Control(settings)._ask("POST", "/sync", {"path": str(database.resolve()), "wait": True, "timeout": 30}, 35)


def rows_at(world: World, prefix: str, txid: int, directory: Path) -> list[str]:
    """The memories of one state of a copy."""
    file = directory / f"{txid}.sqlite"
    litestream.restore(world.settings, prefix, txid, file)
    try:
        return contents_of(file)
    finally:
        for left in directory.glob(f"{txid}.sqlite*"):
            left.unlink()
