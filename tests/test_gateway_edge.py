"""The edge around an application that misbehaves: always one answer, one event, one line."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway import edge
from gateway.access_log import AccessLog
from gateway.edge import Edge
from gateway.exchange import Exchange, exchange_of
from shared import spool
from shared.settings import Settings
from shared.usage import UsageEvent

App = Callable[[Any, Any, Any], Awaitable[None]]


class Seen:
    """What came out of one request: ASGI messages, the segments when the answer began, events, access lines."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.events_at_start: list[UsageEvent] = []
        self.events: list[UsageEvent] = []
        self.lines: list[dict[str, Any]] = []
        self.error: BaseException | None = None


def request(app: App, tmp_path: Any, *, cancel: bool = False) -> Seen:
    """Send one request through an edge around `app`, with a real spool and a pipe for stderr."""
    seen = Seen()
    usage = spool.Spool(Settings(data_dir=tmp_path))
    reading, writing = os.pipe()
    access_log = AccessLog(writing)

    def events() -> list[UsageEvent]:
        return [e for p in usage.dir.iterdir() for e in spool.read(p).events]

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            seen.events_at_start = events()
        seen.messages.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def reached(scope: Any, receive: Any, send: Any) -> None:
        scope["path_template"] = "/v1/memories"
        exchange = exchange_of(scope)
        exchange.tenant_id, exchange.reached, exchange.created = "acme", True, 1
        await app(scope, receive, send)

    async def run() -> None:
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "headers": [(b"x-request-id", b"theirs")]}
        task = asyncio.create_task(Edge(reached, usage, access_log)(scope, receive, send))
        await asyncio.sleep(0)
        if cancel:
            task.cancel()
        try:
            await task
        except (Exception, asyncio.CancelledError) as e:  # noqa: BLE001
            seen.error = e

    asyncio.run(run())
    access_log.drain()
    os.close(writing)
    with os.fdopen(reading) as pipe:
        seen.lines = [json.loads(line) for line in pipe]
    seen.events = events()
    usage.close()
    return seen


async def _start(send: Any, status: int = 201) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})


async def good(scope: Any, receive: Any, send: Any) -> None:
    await _start(send)
    await send({"type": "http.response.body", "body": b""})


async def raises(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("sesame")


async def raises_late(scope: Any, receive: Any, send: Any) -> None:
    await _start(send)
    raise ValueError("sesame")


async def silent(scope: Any, receive: Any, send: Any) -> None:
    return


async def stuck(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.sleep(3_600)


def test_the_event_is_in_the_spool_before_the_answer_begins(tmp_path: Any) -> None:
    """What a client has seen is billed, even if the worker dies the next instant."""
    seen = request(good, tmp_path)
    assert seen.events_at_start == seen.events and len(seen.events) == 1
    assert seen.events[0].status == 201 and seen.events[0].memories_created == 1
    assert [h for h in seen.messages[0]["headers"] if h[0] == b"x-request-id"]


def test_a_crash_is_a_500_problem_with_the_request_id_and_no_cause(tmp_path: Any, capfd: Any) -> None:
    """The cause is for the log; nothing is billed, and one event says that it happened."""
    seen = request(raises, tmp_path)
    body = json.loads(seen.messages[1]["body"])
    assert seen.messages[0]["status"] == 500 == body["status"] and "sesame" not in str(body)
    assert (b"content-type", b"application/problem+json") in seen.messages[0]["headers"]
    assert body["request_id"] == seen.lines[0]["request_id"]
    assert [(e.status, e.api_calls, e.memories_created) for e in seen.events] == [(500, 0, 0)]


@pytest.mark.parametrize(
    ("app", "cancel", "status"),
    [(good, False, 201), (raises, False, 500), (raises_late, False, 201), (silent, False, 499), (stuck, True, 499)],
)
def test_however_it_ends_it_is_recorded_once(tmp_path: Any, app: App, cancel: bool, status: int) -> None:
    """One event and one access line with the same id and status."""
    seen = request(app, tmp_path, cancel=cancel)
    assert len(seen.lines) == len(seen.events) == 1
    assert seen.lines[0]["status"] == seen.events[0].status == status
    assert seen.lines[0]["request_id"].replace("-", "") == seen.events[0].request_id.hex()
    assert seen.lines[0]["client_request_id"] == "theirs"
    assert (seen.error is not None) == (app in (raises_late, stuck))


def told_of(
    tmp_path: Any, version: str, fields: list[tuple[bytes, bytes]], pieces: list[tuple[bytes, bool]]
) -> list[Any]:
    """What an application is told that asks until the end of the body, and once more; the server has these pieces of
    it (bytes, more to come) before the client leaves."""
    told: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not pieces:
            return {"type": "http.disconnect"}
        body, more = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": more}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not told or told[-1]["more_body"]:
            told.append(await receive())
        told.append(await receive())

    async def run() -> None:
        scope = {"type": "http", "http_version": version, "method": "POST", "path": "/", "headers": fields}
        usage = spool.Spool(Settings(data_dir=tmp_path))
        await Edge(app, usage, AccessLog(1))(scope, receive, None)  # type: ignore[arg-type]
        usage.close()

    asyncio.run(run())
    return told


@pytest.mark.parametrize(
    ("version", "fields", "asked"),
    [
        ("1.1", [(b"content-length", b"7")], [(b"{}", True), (b"extra", False)]),
        ("1.1", [(b"transfer-encoding", b"chunked")], [(b"{}", True), (b"extra", True), (b"", False)]),
        ("2", [(b"content-length", b"7")], [(b"{}", True), (b"extra", True), (b"", False)]),
        ("1.1", [(b"content-length", b"0" * 19 + b"7")], [(b"{}", True), (b"extra", True), (b"", False)]),
    ],
)
def test_a_body_has_ended_when_all_that_was_announced_has_come(
    tmp_path: Any, version: str, fields: list[tuple[bytes, bytes]], asked: list[tuple[bytes, bool]]
) -> None:
    """To ask the server once more costs as much as the body did; who then waits for the client to leave must not be
    told of an end that it knows, and HTTP/2 would reset a stream of which the end was not read."""
    told = told_of(tmp_path, version, fields, [(b"{}", True), (b"extra", True), (b"", False)])
    assert [(message["body"], message["more_body"]) for message in told[:-1]] == asked
    assert told[-1] == {"type": "http.disconnect"}


def test_a_first_piece_of_nothing_ends_no_body_of_unknown_length(tmp_path: Any) -> None:
    """HTTP/2 may begin with an empty frame; the whole of the body would be taken for nothing."""
    told = told_of(tmp_path, "2", [], [(b"", True), (b"{}", True), (b"", False)])
    assert [message["body"] for message in told[:-1]] == [b"", b"{}", b""]


@pytest.mark.parametrize(
    ("version", "fields", "begun", "left"),
    [
        ("2", [], False, 0),
        ("2", [], True, 0),
        ("2", [(b"expect", b"100-continue")], False, 3),
        ("2", [(b"expect", b"100-continue")], True, 0),
        ("1.1", [], False, 3),
        ("1.1", [(b"transfer-encoding", b"chunked")], False, 0),
        ("1.1", [(b"transfer-encoding", b"chunked"), (b"expect", b"100-continue")], False, 3),
        ("1.1", [(b"transfer-encoding", b"chunked"), (b"expect", b"100-continue")], True, 0),
    ],
)
def test_a_refused_body_is_read_to_its_end_before_the_answer_begins(
    tmp_path: Any, version: str, fields: list[tuple[bytes, bytes]], begun: bool, left: int
) -> None:
    """A stream of HTTP/2 would be reset, a connection closed, under a client that is still writing. Who asked first
    whether to write has not begun to, unless the body has been asked for."""
    pieces = [(b"{}", True), (b"extra", True), (b"", False)]
    left_at_start: list[int] = []

    async def receive() -> dict[str, Any]:
        body, more = pieces.pop(0)  # nobody asks once more: that would wait for the client to leave
        return {"type": "http.request", "body": body, "more_body": more}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if begun:
            await receive()
        await _start(send, 401)
        await send({"type": "http.response.body", "body": b""})

    async def send(message: dict[str, Any]) -> None:
        left_at_start.append(len(pieces))

    async def run() -> None:
        scope = {"type": "http", "http_version": version, "method": "POST", "path": "/", "headers": fields}
        usage = spool.Spool(Settings(data_dir=tmp_path))
        await Edge(app, usage, AccessLog(1))(scope, receive, send)
        usage.close()

    asyncio.run(run())
    assert left_at_start == [left, left]


def test_a_refused_body_that_never_ends_delays_its_own_answer_alone(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream of HTTP/2 may be left open by a GET, too: the answer goes out, and the place to work was free before."""
    monkeypatch.setattr(edge, "DROP_SECONDS", 0.05)
    happened: list[str] = []

    async def receive() -> dict[str, Any]:
        happened.append("asked")
        await asyncio.sleep(3_600)
        raise AssertionError

    async def app(scope: Any, receive: Any, send: Any) -> None:
        exchange_of(scope).leave = lambda: happened.append("left")
        await _start(send, 404)

    async def send(message: dict[str, Any]) -> None:
        happened.append("answered")

    async def run() -> None:
        scope = {"type": "http", "http_version": "2", "method": "GET", "path": "/", "headers": []}
        usage = spool.Spool(Settings(data_dir=tmp_path))
        await Edge(app, usage, AccessLog(1))(scope, receive, send)
        usage.close()

    asyncio.run(run())
    assert happened == ["left", "asked", "answered"]


def test_of_a_header_field_that_comes_twice_the_first_counts_or_all_are_seen() -> None:
    """As it was sent: a second token, tenant or type that hid the first one would be somebody else's to choose."""
    head = [(b"x-request-id", b"one"), (b"authorization", b"a"), (b"x-request-id", b"two"), (b"authorization", b"b")]
    exchange = Exchange("GET", head)
    assert exchange.client_request_id == "one" and exchange.first(b"authorization") == b"a"
    assert exchange.every(b"authorization") == [b"a", b"b"]
    assert exchange.first(b"host") is None and exchange.every(b"host") == []
    once = Exchange("GET", head[:2])
    assert once.first(b"authorization") == b"a" and once.every(b"authorization") == [b"a"]


def test_access_lines_leave_in_pieces_a_pipe_keeps_whole(tmp_path: Any) -> None:
    """Two workers share one stderr: a write above PIPE_BUF could be torn by the other's."""
    reading, writing = os.pipe()
    access_log = AccessLog(writing)
    for n in range(100):
        access_log.line("request", n=n, pad="x" * 300)
    access_log.drain()
    os.close(writing)
    pieces = iter(lambda: os.read(reading, 4_096), b"")
    lines = [json.loads(line)["n"] for piece in [b"".join(pieces)] for line in piece.splitlines()]
    os.close(reading)
    assert lines == list(range(100))
