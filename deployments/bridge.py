"""The bridge: Alertmanager's webhook → one Prefect event an alert → its `diagnose` run (`deployments.automation`).

It keeps nothing. An alert's event has an id and a time made of the alert alone (fingerprint, start, status), so however
often it is sent, by Alertmanager's repeats, by its retries or after this process died, it is the same event, and the
automation starts one run for it. So every alert is always passed on, and an answer 200 means that Prefect has taken all
of them: without Prefect it is 503, and Alertmanager tries again.

    POST /alerts      Alertmanager's webhook, version 4; `Authorization: Bearer …`
    POST /heartbeat   the alert that always fires: no event, but a request to the dead man's switch; the same credential
    GET  /health      this process answers

The switch (`ENGRAM_HEARTBEAT_URL`, off when it is empty) belongs to somebody else, who calls when no request came for
some minutes: then one of Prometheus, Alertmanager, this bridge and their machine is dead. It goes through here so that
the bridge is watched, too, and because its address is a secret, which Alertmanager before 0.26 shows and logs.

Whoever has the credential can start diagnoses, which only read. Errors are problem details; a 401 says nothing more.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from uuid import NAMESPACE_URL, uuid5

import httpx
import msgspec
from msgspec import Meta

from deployments.orchestration import basic_auth
from shared import durable
from shared.diagnosis.finding import SUBJECTS
from shared.errors import Permanent, Transient
from shared.log import get_logger
from shared.settings import Settings
from shared.tenant import is_tenant_id

FIRING, RESOLVED = "engram.alert.firing", "engram.alert.resolved"
SEND_SECONDS = 10.0
_TEXT_CHARS = 1_000  # of a label or annotation: Prefect drops an event of 1.5 MB without a word
_RETRY_AFTER_SECONDS = 5
_NAMES = uuid5(NAMESPACE_URL, "https://engram.invalid/alerts")
log = get_logger("bridge")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Event = dict[str, Any]
PassOn = Callable[[Sequence[Event]], Awaitable[None]]
Beat = Callable[[], Awaitable[None]]


class Alert(msgspec.Struct, frozen=True, rename="camel"):
    """One alert of a notification. `starts_at` stays the same for as long as it fires."""

    status: Literal["firing", "resolved"]
    labels: dict[str, str]
    starts_at: Annotated[datetime, Meta(tz=True)]
    fingerprint: Annotated[str, Meta(pattern="^[0-9a-f]{1,64}$")]
    annotations: dict[str, str] = msgspec.field(default_factory=dict)
    ends_at: Annotated[datetime, Meta(tz=True)] | None = None
    generator_url: str = msgspec.field(default="", name="generatorURL")


class Notification(msgspec.Struct, frozen=True, rename="camel"):
    """What Alertmanager posts (data structure "version 4"); what is not read here is left out."""

    version: Literal["4"]
    alerts: Annotated[list[Alert], Meta(max_length=10_000)]


def event_of(alert: Alert) -> Event:
    """The same for the same alert, whoever sends it whenever. Only one that fires and names what to diagnose has a
    subject, and only those start a run."""
    starts_at = alert.starts_at.astimezone(UTC).isoformat(timespec="microseconds")
    event_id = str(uuid5(_NAMES, f"{alert.fingerprint}|{starts_at}|{alert.status}"))
    firing = alert.status == "firing"
    subject = alert.labels.get("diagnosis", "")
    tenant_id = alert.labels.get("tenant_id", alert.labels.get("tenant", ""))
    name = _short(alert.labels.get("alertname", "alert"))
    resource = {
        "prefect.resource.id": f"engram.alert.{alert.fingerprint}",
        "prefect.resource.name": name,
        "engram.alert.id": event_id,
        "engram.diagnosis": subject if subject in SUBJECTS else "none",
    }
    return {
        "id": event_id,
        "event": FIRING if firing else RESOLVED,
        # Not the time of sending: the automation tells a repeat by it (`deployments.automation`).
        "occurred": starts_at if firing or alert.ends_at is None else alert.ends_at.astimezone(UTC).isoformat(),
        "resource": resource,
        "payload": {
            "alert": name,
            "subject": resource["engram.diagnosis"],
            "tenant_id": tenant_id if is_tenant_id(tenant_id) else None,
            "runbook": _short(alert.annotations.get("runbook", "")),
            "starts_at": starts_at,
            "labels": {_short(k): _short(v) for k, v in alert.labels.items()},
            "annotations": {_short(k): _short(v) for k, v in alert.annotations.items()},
            "generator_url": _short(alert.generator_url),
        },
    }


def to_prefect(settings: Settings, client: httpx.AsyncClient) -> PassOn:
    """Raises `Transient` unless Prefect has taken all of the events."""
    url, headers = f"{settings.prefect_api_url.rstrip('/')}/events", basic_auth(settings)

    async def pass_on(events: Sequence[Event]) -> None:
        try:
            answer = await client.post(url, json=list(events), headers=headers)
        except httpx.HTTPError as e:
            raise Transient(f"Prefect does not answer: {e or type(e).__name__}") from e
        if not answer.is_success:
            raise Transient(f"Prefect answers {answer.status_code}: {answer.text[:200]}")

    return pass_on


def to_switch(settings: Settings, client: httpx.AsyncClient) -> Beat:
    """Raises `Transient` unless the switch has heard it; what that says never holds the address."""
    url = settings.heartbeat_url.get_secret_value()

    async def beat() -> None:
        if not url:
            return
        try:
            answer = await client.post(url)
        except (httpx.HTTPError, httpx.InvalidURL) as e:
            raise Transient(f"the dead man's switch does not answer: {type(e).__name__}") from None
        if not answer.is_success:
            raise Transient(f"the dead man's switch answers {answer.status_code}")

    return beat


class Bridge:
    """The ASGI application."""

    def __init__(self, token: str, body_limit_bytes: int, pass_on: PassOn, beat: Beat) -> None:
        self._token = hashlib.sha256(token.encode()).digest()
        self._body_limit_bytes = body_limit_bytes
        self._pass_on = pass_on
        self._beat = beat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise Permanent(f"the bridge speaks HTTP alone, not {scope['type']}")
        status, body, headers = await self._answer(scope, receive)
        content_type = b"application/problem+json" if status >= 400 else b"application/json"
        start = {"type": "http.response.start", "status": status}
        await send(start | {"headers": [(b"content-type", content_type), *headers]})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    async def _answer(self, scope: Scope, receive: Receive) -> tuple[int, Mapping[str, Any], list[tuple[bytes, bytes]]]:
        method, path = scope["method"], scope["path"]
        if path == "/health":
            return (200, {"status": "ok"}, []) if method in ("GET", "HEAD") else _problem(405, allow="GET")
        if path not in ("/alerts", "/heartbeat"):
            return _problem(404)
        if not self._allowed(dict(scope["headers"]).get(b"authorization", b"")):
            return _problem(401, www_authenticate="Bearer")
        if method != "POST":
            return _problem(405, allow="POST")
        body = await self._body(receive)
        if body is None:
            return _problem(413, f"more than {self._body_limit_bytes} bytes")
        if path == "/heartbeat":
            return await self._pass_heartbeat_on()
        try:
            notification = msgspec.json.decode(body, type=Notification)
        except (msgspec.MsgspecError, UnicodeDecodeError) as e:
            log.warning("notification_refused", cause=str(e)[:300])
            return _problem(400, f"not a notification of Alertmanager, version 4: {str(e)[:300]}")
        return await self._forward([event_of(alert) for alert in notification.alerts])

    async def _forward(self, events: list[Event]) -> tuple[int, Mapping[str, Any], list[tuple[bytes, bytes]]]:
        try:
            if events:
                await self._pass_on(events)
        except Transient as e:
            log.error("alerts_not_passed_on", alerts=len(events), cause=str(e))
            return _problem(503, "Prefect did not take them; send them again.", retry_after=str(_RETRY_AFTER_SECONDS))
        for event in events:
            log.info("alert_passed_on", alert=event["payload"]["alert"], status=event["event"], event_id=event["id"])
        return 200, {"events": [event["id"] for event in events]}, []

    async def _pass_heartbeat_on(self) -> tuple[int, Mapping[str, Any], list[tuple[bytes, bytes]]]:
        try:
            await self._beat()
        except Transient as e:
            log.error("heartbeat_not_passed_on", cause=str(e))
            return _problem(503, "The switch has not heard it; send it again.", retry_after=str(_RETRY_AFTER_SECONDS))
        return 200, {"status": "ok"}, []

    def _allowed(self, header: bytes) -> bool:
        scheme, _, given = header.partition(b" ")
        same = hmac.compare_digest(hashlib.sha256(given.strip()).digest(), self._token)  # also without a scheme
        return scheme.lower() == b"bearer" and same

    async def _body(self, receive: Receive) -> bytes | None:
        """None when it is too large; whoever leaves early sent nothing that parses."""
        body = b""
        while True:
            message = await receive()
            body += bytes(message.get("body", b""))
            if len(body) > self._body_limit_bytes:
                return None
            if not message.get("more_body", False):
                return body


def token_file(settings: Settings) -> Path:
    """Where Alertmanager reads the credential."""
    return settings.data_dir / "bridge" / "token"


def ensure_token(settings: Settings) -> str:
    """The credential: the setting, else in dev one that is made once. It is in `token_file` when this returns, 0600.

    Raises `Permanent` outside dev without the setting.
    """
    path, token = token_file(settings), settings.bridge_token.get_secret_value()
    if not token:
        if settings.env != "dev":
            settings.require("bridge_token")
        with suppress(FileNotFoundError):
            token = path.read_text().strip()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not token:
        token = secrets.token_urlsafe(32)
    if not path.exists() or path.read_text().strip() != token:
        durable.write_file(path, token.encode())
        os.chmod(path, 0o600)
    return token


def serve(settings: Settings) -> None:
    """Until SIGTERM or SIGINT. One process, one event loop: a notification a second is a storm here."""
    settings.require("prefect_api_url")
    asyncio.run(_serve(settings, ensure_token(settings)))


async def _serve(settings: Settings, token: str) -> None:
    from granian.constants import HTTPModes, Interfaces
    from granian.http import HTTP1Settings
    from granian.log import LogLevels
    from granian.server.embed import Server

    async with (
        # Prefect is one of this stack's own parts: a proxy of the environment has no business there.
        httpx.AsyncClient(timeout=SEND_SECONDS, trust_env=False) as inside,
        httpx.AsyncClient(timeout=SEND_SECONDS) as outside,
    ):
        server = Server(
            Bridge(
                token,
                settings.bridge_body_limit_bytes,
                to_prefect(settings, inside),
                to_switch(settings, outside),
            ),
            address=settings.bridge_host,
            port=settings.bridge_port,
            interface=Interfaces.ASGINL,
            http=HTTPModes.http1,
            websockets=False,
            http1_settings=HTTP1Settings(header_read_timeout=int(settings.header_timeout_seconds * 1_000)),
            log_access=False,
            log_level=LogLevels.error,  # its own lines are not JSON
        )
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, server.stop)
        log.info("bridge_started", port=settings.bridge_port)
        await server.serve()
    log.info("bridge_stopped")


def _short(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else text[: _TEXT_CHARS - 1] + "…"


def _problem(status: int, detail: str = "", **headers: str) -> tuple[int, dict[str, Any], list[tuple[bytes, bytes]]]:
    from http import HTTPStatus

    body: dict[str, Any] = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return status, body | ({"detail": detail} if detail else {}), lines
