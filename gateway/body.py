"""Request bodies: read under a limit and a clock, decoded strictly by the struct the handler declares.

A body is awaited before its request takes a place to work (`gateway.shed`): a slow one keeps nobody out.

A body has no `Content-Encoding`: what is labelled gzip is refused, not taken for the JSON it may be nevertheless.

Litestar decodes first and converts afterwards, leniently ("0.5" passes for a number), takes any content type
for JSON and answers 500 to 100,000 nested brackets. This request class decodes in one strict step and hands
Litestar the finished struct; the handler's `data: T` still documents it.
"""

from __future__ import annotations

from typing import Any

import msgspec
from litestar import Request
from litestar.types.empty import Empty

from gateway import whole
from gateway.exchange import exchange_of
from gateway.problems import Problem, Refusal, bad_request
from gateway.raw_body import read, too_large, too_late
from gateway.services import Services, services_of

ENCODED = Problem(
    415, "The body must be sent as it is, without a Content-Encoding.", headers={"Accept-Encoding": "identity"}
)
_decoders: dict[Any, msgspec.json.Decoder[Any]] = {}


class JsonRequest(Request[Any, Any, Any]):
    async def body(self) -> bytes:
        """The raw body, as `read_body`."""
        if self._body is Empty:
            self._body = await read_body(self.scope, self.receive, services_of(self))
        return self._body

    async def json(self) -> Any:
        """The body as the struct that the handler's `data` is annotated with."""
        field = self.route_handler.parsed_data_field
        assert field is not None  # Litestar asks for JSON only when a handler has `data`
        return decoded(await self.body(), field.annotation)


async def read_body(scope: Any, receive: Any, services: Services) -> bytes:
    """The raw body of an ASGI request, which from then on has the place the guard left to be taken.

    Refuses with 415, 413, 408 or 503.
    """
    settings, exchange = services.settings, exchange_of(scope)
    media_type, announced = exchange.first(b"content-type") or b"", exchange.first(b"content-length") or b"0"
    if media_type != b"application/json" and not _is_json(media_type):
        raise Refusal(Problem(415, "The body must be application/json."))
    if b"content-encoding" in exchange.fields and _is_encoded(exchange.every(b"content-encoding")):
        raise Refusal(ENCODED)
    tenant_id = exchange.tenant_id or ""
    limit = settings.body_limit_bytes
    if announced.isdigit() and int(announced[:19]) > limit:
        raise Refusal(too_large(limit))
    try:
        body = await services.patience.wait(read(receive, limit), settings.body_timeout_seconds, tenant_id)
    except TimeoutError:
        raise Refusal(too_late(settings.body_timeout_seconds)) from None
    if not body:
        raise bad_request("The body is empty.")
    if exchange.works_as is not None:
        gate = services.gate
        exchange.leave = gate.enter_now(tenant_id, exchange.works_as) or await gate.enter(tenant_id, exchange.works_as)
        exchange.works_as = None
    return body


def decoded(body: bytes, wanted: Any) -> Any:
    """The body as one of the structs of `gateway.schemas`. Refuses with 400."""
    decoder = _decoders.get(wanted)
    if decoder is None:
        decoder = _decoders[wanted] = msgspec.json.Decoder(wanted)
    try:
        return whole.decode(decoder, body)
    except UnicodeDecodeError:
        raise bad_request("The body is not valid UTF-8.") from None
    except RecursionError:
        raise bad_request("The body is nested too deeply.") from None
    except (msgspec.MsgspecError, ValueError, OverflowError) as e:
        raise bad_request(f"The body is not valid: {str(e)[:300]}") from None


def _is_json(content_type: bytes) -> bool:
    media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
    return media_type == "application/json" or (media_type.startswith("application/") and media_type.endswith("+json"))


def _is_encoded(codings: list[bytes]) -> bool:
    """Whether one of the fields names a coding; `identity` is none."""
    return any(coding.strip().lower() not in (b"", b"identity") for value in codings for coding in value.split(b","))
