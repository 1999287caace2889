"""The bytes of a request's body, up to a limit. How long they may take is `gateway.patience`'s."""

from __future__ import annotations

from typing import Any

from gateway.problems import CLIENT_LEFT, Problem, Refusal


async def read(receive: Any, limit: int) -> bytes:
    """All that is left of the request. Refuses with 413 when that is more than `limit` bytes."""
    pieces: list[bytes] = []
    size = 0
    while True:
        message: Any = await receive()  # HTTPReceiveMessage
        if message["type"] == "http.disconnect":
            raise Refusal(CLIENT_LEFT)
        piece: bytes = message["body"]
        size += len(piece)
        if size > limit:
            raise Refusal(too_large(limit))
        if not message["more_body"]:
            return b"".join((*pieces, piece)) if pieces else piece
        pieces.append(piece)


def is_http2(scope: Any) -> bool:
    return str(scope["http_version"]).startswith("2")


def announced_length(scope: Any) -> int | None:
    """Bytes of the body, as its head announces them; None when it does not. HTTP/2 need not announce a body at all."""
    length: int | None = 0
    if is_http2(scope) and scope["method"] not in ("GET", "HEAD", "DELETE", "OPTIONS"):
        length = None
    for name, value in scope["headers"]:
        if name == b"transfer-encoding":
            return None
        if name == b"content-length":
            length = int(value) if value.isdigit() and len(value) < 20 else None
    return length


def too_large(limit: int) -> Problem:
    return Problem(413, f"The body is larger than {limit} bytes.")


def too_late(seconds: float) -> Problem:
    return Problem(408, f"The body did not arrive within {seconds:g} s.")
