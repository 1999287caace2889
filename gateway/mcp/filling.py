"""A tool's result on its way past the SDK.

The SDK checks and copies a result several times and encodes it, all on the event loop: tens of milliseconds for a list
of two megabytes, in which nobody else is served. So it is given a stand-in, and in the bytes it answers with the
stand-in is replaced by the result's own, which were made in the thread that read the rows.
"""

from __future__ import annotations

import secrets
from typing import Any, NamedTuple

import msgspec

SCOPE_KEY = "engram.mcp.filling"


class Result(NamedTuple):
    """A JSON document, and the same as a JSON string: MCP sends both."""

    document: bytes
    text: bytes

    @classmethod
    def of(cls, value: object) -> Result:
        document = msgspec.json.encode(value)
        return cls(document, msgspec.json.encode(document.decode()))


class Filling:
    """Of one request, whose answer has one body. The mark is nobody's to guess, so no client can have it replaced."""

    def __init__(self) -> None:
        self._mark = secrets.token_hex(16)
        self._result: Result | None = None

    def stand_in(self, result: Result) -> tuple[str, dict[str, Any]]:
        """For the text of the SDK's answer, and for its structured content."""
        self._result = result
        return self._mark, {self._mark: 0}

    def into(self, send: Any) -> Any:
        """A `send` that puts the result where it belongs."""
        started: Any = None

        async def filled(message: Any) -> None:
            nonlocal started
            if self._result is None:
                await send(message)
            elif message["type"] == "http.response.start":
                started = message
            else:
                mark = self._mark.encode()
                body = message["body"].replace(b'{"%b":0}' % mark, self._result.document, 1)
                body = body.replace(b'"%b"' % mark, self._result.text, 1)
                head = [(k, v) for k, v in started["headers"] if k.lower() != b"content-length"]
                await send({**started, "headers": [*head, (b"content-length", b"%d" % len(body))]})
                await send({**message, "body": body})

        return filled
