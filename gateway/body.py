"""Request bodies: read under a limit and a clock, decoded strictly by the struct the handler declares.

Litestar decodes first and converts afterwards, leniently ("0.5" passes for a number), takes any content type
for JSON and answers 500 to 100,000 nested brackets. This request class decodes in one strict step and hands
Litestar the finished struct; the handler's `data: T` still documents it.
"""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from litestar import Request
from litestar.types.empty import Empty

from gateway.problems import CLIENT_LEFT, Problem, Refusal, bad_request
from gateway.services import services_of

_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


class JsonRequest(Request[Any, Any, Any]):
    async def body(self) -> bytes:
        """The raw body. Refuses with 415, 413 or 408."""
        if self._body is Empty:
            self._check_content_type()
            settings = services_of(self).settings
            try:
                async with asyncio.timeout(settings.body_timeout_seconds):
                    self._body = await self._read(settings.body_limit_bytes)
            except TimeoutError:
                problem = Problem(408, f"The body did not arrive within {settings.body_timeout_seconds:g} s.")
                raise Refusal(problem) from None
            if not self._body:
                raise bad_request("The body is empty.")
        return self._body

    async def json(self) -> Any:
        """The body as the struct that the handler's `data` is annotated with."""
        field = self.route_handler.parsed_data_field
        assert field is not None  # Litestar asks for JSON only when a handler has `data`
        wanted = field.annotation
        decoder = _decoders.get(wanted)
        if decoder is None:
            decoder = _decoders[wanted] = msgspec.json.Decoder(wanted)
        body = await self.body()
        try:
            return decoder.decode(body)
        except UnicodeDecodeError:
            raise bad_request("The body is not valid UTF-8.") from None
        except RecursionError:
            raise bad_request("The body is nested too deeply.") from None
        except (msgspec.MsgspecError, ValueError, OverflowError) as e:
            raise bad_request(f"The body is not valid: {str(e)[:300]}") from None

    async def _read(self, limit: int) -> bytes:
        too_large = Refusal(Problem(413, f"The body is larger than {limit} bytes."))
        announced = self.headers.get("content-length", "0")
        if announced.isascii() and announced.isdigit() and int(announced[:19]) > limit:
            raise too_large
        pieces: list[bytes] = []
        size = 0
        while True:
            message: Any = await self.receive()  # HTTPReceiveMessage
            if message["type"] == "http.disconnect":
                raise Refusal(CLIENT_LEFT)
            size += len(message["body"])
            if size > limit:
                raise too_large
            pieces.append(message["body"])
            if not message["more_body"]:
                return b"".join(pieces)

    def _check_content_type(self) -> None:
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not (
            media_type.startswith("application/") and media_type.endswith("+json")
        ):
            raise Refusal(Problem(415, "The body must be application/json."))
