"""A Litestream beside a `World`, followed by hand or by a thread. Taken in beside `tests.core_fixtures`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from shared import litestream
from shared.litestream import Control
from shared.litestream_follow import Follower
from shared.objects import ObjectStore
from shared.settings import Settings
from tests.core_fixtures import World, contents_of


def with_copies(world: World, **more: object) -> World:
    """The same tenant with the layer on."""
    settings = world.settings.model_copy(update={"point_in_time": "litestream", **more})
    return World(settings, world.control_plane, ObjectStore(settings), world.tenant_id)


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
