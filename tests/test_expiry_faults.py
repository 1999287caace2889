"""Deletion of backups: a run dies at any step, a store refuses; no row promises an object that is gone."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest

from shared.control_plane import Connection, ControlPlane
from tests.core_fixtures import World
from tests.expiry_fixtures import DAY, Away, add, at, check_truth, few, run, statuses
from tests.http_fixtures import Handler, Server

pytest_plugins = ("tests.core_fixtures", "tests.s3_fixtures", "tests.expiry_fixtures")


# --- dying at every step ---


class Died(BaseException):
    """What SIGKILL is to the code after it."""


class Fuse:
    """Ends the run at the nth step: before and after each transaction's commit and each removal of an object."""

    def __init__(self, at: int) -> None:
        self._left, self._lock = at, threading.Lock()

    def step(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left < 0:  # nothing of this process does anything from now on
                raise Died

    @property
    def blown(self) -> bool:
        return self._left < 0


class MortalControlPlane:
    def __init__(self, control_plane: ControlPlane, fuse: Fuse) -> None:
        self._control_plane, self._fuse = control_plane, fuse

    @contextmanager
    def transaction(self, **options: Any) -> Iterator[Connection]:
        with self._control_plane.transaction(**options) as connection:
            yield connection
            self._fuse.step()
        self._fuse.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._control_plane, name)


class MortalObjects(Away):
    def __init__(self, world: World, fuse: Fuse) -> None:
        super().__init__(world)
        self._fuse = fuse

    def delete(self, key: str) -> None:
        self._fuse.step()
        self._objects.delete(key)
        self._fuse.step()


def die_at_every_step(world: World, kept: UUID, gone: list[UUID]) -> int:
    """Runs that die one step later each time, until one does not; the truth after each."""
    for step in range(100):
        fuse = Fuse(step)
        try:
            run(world, MortalObjects(world, fuse), MortalControlPlane(world.control_plane, fuse))  # type: ignore[arg-type]
        except Died:
            assert fuse.blown
        check_truth(world)
        assert statuses(world)[kept] == "available"
        if not fuse.blown:
            break
        gone.append(add(world, (10 + step) * DAY))  # so that the next run has something to do at each step
    rows = statuses(world)
    assert rows == {kept: "available", **dict.fromkeys(gone, "deleted")}
    return step


def test_a_run_that_dies_at_any_step_is_finished_by_the_next(own: World) -> None:
    """The row first, then the object, then the word that it is gone."""
    steps = die_at_every_step(own, *few(own))
    assert steps > 10


@pytest.mark.slow
def test_the_same_on_s3(own: World, s3: dict[str, object]) -> None:
    """SeaweedFS, where a delete is a bulk request whose answer is a 200."""
    on_s3 = at(own, **s3)
    assert die_at_every_step(on_s3, *few(on_s3)) > 10


# --- what stores say when they refuse ---


@contextmanager
def refusing(s3: dict[str, object], answer: Callable[[str], tuple[int, str] | None]) -> Iterator[dict[str, object]]:
    """A proxy before the store that answers deletes itself when `answer(body)` says so."""
    upstream = urlsplit(str(s3["s3_endpoint"]))

    class Proxy(Handler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = answer(body.decode()) if self.path.endswith("?delete") else None
            if said is None:
                connection = http.client.HTTPConnection(upstream.hostname or "", upstream.port)
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                status, text = reply.status, reply.read()
                headers = [(k, v) for k, v in reply.getheaders() if k.lower() not in ("content-length", "connection")]
            else:
                status, text, headers = said[0], said[1].encode(), []
            self.reply(status, text, headers)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    with Server(Proxy) as server:
        yield {**s3, "s3_endpoint": server.url}


def _in_bulk(code: str, message: str) -> Callable[[str], tuple[int, str] | None]:
    def answer(body: str) -> tuple[int, str] | None:
        if "no-such-object" in body:
            return None
        key = body.split("<Key>")[1].split("</Key>")[0]
        error = f"<Error><Key>{key}</Key><Code>{code}</Code><Message>{message}</Message></Error>"
        return 200, f'<?xml version="1.0"?><DeleteResult>{error}</DeleteResult>'

    return answer


R2_LOCK = "<Error><Code>ObjectLockedByBucketPolicy</Code><Message>The object is locked by the bucket.</Message></Error>"
DENIED = "<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"


LOCKS_AWAY = "<Error><Code>InternalError</Code><Message>The object lock service is away</Message></Error>"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda _: (403, R2_LOCK), "locked"),
        (_in_bulk("AccessDenied", "Access Denied because object protected by object lock."), "locked"),
        (_in_bulk("InvalidRequest", "Object is WORM protected and cannot be overwritten"), "locked"),
        (_in_bulk("AccessDenied", "Access Denied."), "locked"),  # but others may be deleted
        (lambda _: (403, DENIED), "refused"),  # nothing may be deleted
        (lambda _: (500, "<Error><Code>InternalError</Code></Error>"), "unavailable"),
        (lambda _: (500, LOCKS_AWAY), "unavailable"),
    ],
    ids=["r2-lock", "aws-lock", "worm", "403-of-one", "403-of-all", "500", "500-about-locks"],
)
def test_a_refusal_to_delete_is_told_from_wrong_rights_and_from_an_outage(
    own: World, s3: dict[str, object], answer: Any, outcome: str
) -> None:
    """A lock is somebody's wish, missing rights are a fault to mend, an outage passes."""
    with refusing(s3, answer) as proxied:
        on_s3 = at(own, object_store_retries=0, **proxied)
        few(on_s3)
        assert {r.outcome for r in run(on_s3)} == {outcome}
        check_truth(on_s3)
