"""The admin API: the incident playbook over HTTP, `POST /v1/admin/actions/NAME`, for operators alone.

An operator's token has the scope `admin` AND names `ENGRAM_OPERATOR_TENANT` where a customer's token names its tenant.
That is no tenant (one cannot be created under that id; should there be one, nobody is an operator), so no scope that a
customer is ever given opens this door.

Apart from the tenants' requests in everything: judged by its own hook, limited by its own rate, at work in its own two
threads with a short queue (an action may ask PostgreSQL and may wait for every worker), never billed, and counted as
a route of its own, which no objective includes.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import msgspec
from litestar import Request as HttpRequest
from litestar import Response, Router, post
from litestar.openapi import ResponseSpec
from msgspec import Meta, UnsetType
from pydantic import SecretStr

from gateway.body import JsonRequest
from gateway.exchange import Exchange, exchange_of
from gateway.guard import caller_of
from gateway.problems import MEDIA_TYPE, Problem, Refusal, bad_request, forbidden, shed
from gateway.ratelimit import TOO_MANY_REQUESTS, too_many
from gateway.schemas import ProblemView
from gateway.services import Services, services_of
from gateway.v1 import Encoded
from shared.control_plane import ControlPlane
from shared.errors import ControlPlaneUnavailable, Permanent, UnknownTenant
from shared.limits import MAX_TTL_SECONDS, BadLimit
from shared.log import get_logger
from shared.playbook.action import MAX_REASON_CHARS, Action, BadRequest, Outcome, Request, RequestedBy
from shared.playbook.perform import perform
from shared.playbook.table import ACTIONS
from shared.settings import Settings
from shared.tenant import TENANT_ID_PATTERN
from shared.token import MAX_TOKEN_BYTES

PATH = "/v1/admin/actions"
SCOPE = "admin"
_THREADS = 2
_QUEUE = 8
_FIELDS_OF_A_REQUEST = ("tenant_id", "reason", "dry_run", "ttl_seconds", "requested_by")
_TenantId = Annotated[str, Meta(pattern=TENANT_ID_PATTERN)]
_Reason = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_REASON_CHARS,
        pattern=r"^[^\x00]*[^\x00\s][^\x00]*$",
        description="kept with the action; whoever is on call next reads it",
    ),
]
_Ttl = Annotated[float, Meta(ge=1, le=MAX_TTL_SECONDS, description="until it is gone by itself; an hour")]
_Token = Annotated[str, Meta(min_length=1, max_length=2 * MAX_TOKEN_BYTES, description="never shown, logged or stored")]
_encode = msgspec.json.Encoder().encode
log = get_logger("admin")


class Operations:
    """Actions in threads of their own. For one event loop."""

    def __init__(self, settings: Settings, control_plane: ControlPlane) -> None:
        self._settings = settings
        self._control_plane = control_plane
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="admin")
        self._running: set[asyncio.Future[Outcome]] = set()

    async def perform(self, request: Request) -> Outcome:
        """Sheds when too many wait. An action that began ends, whether its caller waits or not; see `close`."""
        if len(self._running) >= _QUEUE:
            raise shed("Too many actions are waiting.")
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._executor, perform, self._settings, self._control_plane, request)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return await asyncio.shield(future)

    async def close(self, timeout_seconds: float) -> None:
        """Let actions end that have begun, and whose callers may have left, within that time; the others never begin.
        What is cut off then stays recorded as begun."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        if self._running:
            _, cut_off = await asyncio.wait(self._running, timeout=timeout_seconds)
            if cut_off:
                log.error("actions_cut_off", actions=len(cut_off), waited_seconds=timeout_seconds)


async def guard(request: HttpRequest[Any, Any, Any]) -> None:
    """Who may; a `before_request` hook, so no body is read for anybody else."""
    services, exchange = services_of(request), exchange_of(request.scope)
    await _admit(services, exchange, request.scope)


async def _admit(services: Services, exchange: Exchange, scope: Any) -> None:
    settings = services.settings
    caller = await caller_of(services, exchange, scope)
    operators = settings.operator_tenant
    if caller.tenant_id != operators or services.tenants.knows(operators):
        raise forbidden("The token is not an operator's.")
    if SCOPE not in caller.scopes:
        raise forbidden(f"The token lacks the scope {SCOPE}.")
    for named in exchange.every(b"x-engram-tenant"):
        if named.decode("latin-1") != operators:
            raise forbidden("X-Engram-Tenant is not the token's tenant.")
    decision = services.rates.operators()
    exchange.headers.extend(decision.headers())
    if not decision.allowed:
        raise Refusal(too_many(decision, TOO_MANY_REQUESTS))


def body_of(action: Action) -> type[msgspec.Struct]:
    """The struct of an action's request body: only what it takes."""
    fields: list[Any] = []
    if action.tenant == "required":
        fields.append(("tenant_id", _TenantId))
    if action.name == "explain-token":
        fields.append(("token", _Token))
    if action.kind != "read":
        fields.append(("reason", _Reason))
    if action.arguments.__struct_fields__:
        needed = any(field.required for field in msgspec.structs.fields(action.arguments))
        default = () if needed else (msgspec.field(default_factory=action.arguments),)
        fields.append(("arguments", action.arguments, *default))
    if action.tenant == "optional":
        fields.append(("tenant_id", _TenantId | None, None))
    if action.kind == "read":
        fields.append(("reason", _Reason | UnsetType, msgspec.UNSET))
    if action.ttl:
        fields.append(("ttl_seconds", _Ttl | None, None))
    fields += [("dry_run", bool, False), ("requested_by", RequestedBy, "person")]
    return msgspec.defstruct(
        "".join(word.title() for word in action.name.split("-")) + "Request",
        sorted(fields, key=lambda field: len(field) > 2),
        forbid_unknown_fields=True,
        frozen=True,
        module=__name__,
    )


OFFERED = [action for action in ACTIONS.values() if "api" in action.doors]
BODIES = {action.name: body_of(action) for action in OFFERED}
STRUCTS = (*BODIES.values(), Outcome)


def _asked(action: Action, exchange: Exchange, data: Any) -> Request:
    given = {name: getattr(data, name, msgspec.UNSET) for name in _FIELDS_OF_A_REQUEST}
    arguments = getattr(data, "arguments", None)
    token = getattr(data, "token", None)
    return Request(
        action=action.name,
        arguments={} if arguments is None else msgspec.to_builtins(arguments),
        who=exchange.subject or exchange.tenant_id or "",
        door="api",
        token=None if token is None else SecretStr(token),
        **{name: value for name, value in given.items() if value is not msgspec.UNSET},
    )


def _handler(action: Action) -> Any:
    async def handle(request: JsonRequest, data: Any) -> Response[bytes]:
        services, exchange = services_of(request), exchange_of(request.scope)
        return Encoded(_encode(await _outcome(services, _asked(action, exchange, data))), 200)

    handle.__name__ = action.name.replace("-", "_")
    handle.__doc__ = action.about
    handle.__annotations__["data"] = BODIES[action.name]
    handle.__annotations__["request"] = JsonRequest
    handle.__annotations__["return"] = Response[bytes]
    problems = _PROBLEMS if action.tenant != "none" else {k: v for k, v in _PROBLEMS.items() if k != 404}
    return post(
        f"/{action.name}",
        status_code=200,
        responses={
            200: ResponseSpec(Outcome, generate_examples=False, description="What was done, or would be."),
            **{
                status: ResponseSpec(ProblemView, media_type=MEDIA_TYPE, generate_examples=False, description=text)
                for status, text in problems.items()
            },
        },
    )(handle)


_PROBLEMS = {
    400: "The request is not valid.",
    401: "No valid token; the body is the same whatever the cause.",
    403: "The token is not an operator's.",
    404: "There is no such tenant.",
    408: "The body did not arrive in time.",
    409: "Refused for safety, by a cap, or in a state in which it makes no sense; `detail` says why.",
    413: "The body is too large.",
    415: "The body is not JSON, or has a `Content-Encoding`.",
    429: "Too many actions, or too many bad tokens came from this address.",
    500: "The request failed.",
    503: "The control plane, the issuer or the gateway's workers did not answer; too many actions wait.",
}


async def _outcome(services: Services, request: Request) -> Outcome:
    try:
        return await services.operations.perform(request)
    except (BadRequest, BadLimit) as e:
        raise bad_request(str(e)) from None
    except UnknownTenant as e:
        raise Refusal(Problem(404, str(e))) from None
    except ControlPlaneUnavailable:
        raise
    except Permanent as e:
        raise Refusal(Problem(409, str(e), reason="refused")) from None


def router() -> Router:
    return Router(
        PATH,
        route_handlers=[_handler(action) for action in OFFERED],
        before_request=guard,
        request_class=JsonRequest,
        security=[{"bearer": []}],
        tags=["operators"],
    )
