"""The three busiest routes, past Litestar's router: same hook, same handler, same error answers, half the time.

Of the 65 µs a lookup spends in Litestar only the handler is the lookup; the rest finds the route in a trie, sets up
an exit stack, validates keyword arguments and turns a response object into another one (cProfile, GET by id).
For these routes all of that is known beforehand, so it is done once, here.

Nothing is decided twice: the token, the limits and the tenant are judged by what the route's `before_request` hook
calls, the body is read by the functions the route's request class uses, the handler is the one Litestar would call, and
an exception becomes an answer through the same function. Whatever is out of the ordinary (a query string, an odd path
or Host, another method) goes to Litestar, before anything was done. `tests/test_gateway_shortcut.py` sends one table of
requests both ways and compares the answers, the events and the access lines.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from litestar import Litestar, Response
from litestar.handlers import HTTPRouteHandler
from litestar.routes import HTTPRoute

from gateway.body import JsonRequest, decoded, read_body
from gateway.exchange import exchange_of
from gateway.guard import admit, guard, terms
from gateway.problems import answer
from gateway.services import SCOPE_KEY, Services

_BY_ID = "/v1/memories/{memory_id}"
ROUTES = (("GET", _BY_ID), ("POST", "/v1/memories"), ("POST", "/v1/search"))
_ID_PATH = re.compile(r"/v1/memories/([0-9a-f-]{36})\Z")
_PLAIN_HOST = re.compile(rb"[A-Za-z0-9.-]{1,200}(:[0-9]{1,5})?\Z")
Message = Any
Handle = Callable[..., Awaitable[Response[bytes]]]


class _Route(NamedTuple):
    """`terms` is what the guard makes of this route, `takes` the struct of the handler's `data`, if it has any."""

    template: str
    route_handler: HTTPRouteHandler
    terms: tuple[str | None, bool]
    handle: Handle
    takes: Any


class _Request:
    """As much of a request as the three handlers ask for; Litestar's own takes 3 µs to make."""

    __slots__ = ("route_handler", "scope")

    def __init__(self, scope: Any, route_handler: HTTPRouteHandler) -> None:
        self.scope = scope
        self.route_handler = route_handler


class Shortcut:
    """An ASGI application in front of `app`."""

    def __init__(self, app: Litestar) -> None:
        self._app = app
        self._services: Services | None = None
        routes = {(method, template): _route(app, method, template) for method, template in ROUTES}
        self._get = routes["GET", _BY_ID]
        self._post = {template: route for (method, template), route in routes.items() if method == "POST"}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        services = self._services
        if services is None:
            services = self._services = self._app.state.services  # which the lifespan made
        scope[SCOPE_KEY] = services
        route = self._find(scope)
        if route is None:
            await self._app(scope, receive, send)
            return
        scope["path_template"] = route.template
        request = _Request(scope, route.route_handler)
        started = False
        try:
            await admit(services, scope, *route.terms)
            if route.takes is not None:
                data = decoded(await read_body(scope, receive, services), route.takes)
                response = await route.handle(request=request, data=data)
            else:
                response = await route.handle(request=request, **scope["path_params"])
            body = response.content
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", b"%d" % len(body)),
            ]
            started = True
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": False})
        except Exception as e:
            if started:
                raise
            scope["app"] = scope["litestar_app"] = self._app
            whole = JsonRequest(scope, receive, send)
            refused = answer(whole, e).to_asgi_response(app=None, request=whole)
            await refused(scope, receive, send)

    def _find(self, scope: Any) -> _Route | None:
        """The route, when this request is one that only has to be handled."""
        if scope["query_string"] or scope.get("root_path"):
            return None
        if not _PLAIN_HOST.match(exchange_of(scope).fields.get(b"host", b"")):  # there is but one (`gateway.headers`)
            return None
        path, method = scope["path"], scope["method"]
        if method == "GET":
            found = _ID_PATH.match(path)
            if found is None:
                return None
            scope["path_params"] = {"memory_id": found[1]}
            return self._get
        return self._post.get(path) if method == "POST" else None


def _route(app: Litestar, method: str, template: str) -> _Route:
    """Refuses a route that relies on a part of Litestar that is left out here: it would be silently skipped."""
    found = [r for r in app.routes if isinstance(r, HTTPRoute) and r.path_format == template]
    handler, parameters = found[0].route_handler_map[method]  # type: ignore[index]
    left_out = {
        "guards": handler.resolve_guards(),
        "middleware": handler.resolve_middleware(),
        "after_request": any(layer.after_request for layer in handler.ownership_layers),
        "after_response": handler.resolve_after_response(),
        "dependencies": parameters.dependency_batches,
        "response headers": handler.resolve_response_headers(),
        "response cookies": handler.resolve_response_cookies(),
        "cache": handler.cache,
    }
    relied_on = [name for name, value in left_out.items() if value]
    if relied_on or handler.resolve_before_request() is not guard or handler.resolve_request_class() is not JsonRequest:
        raise TypeError(f"{method} {template} cannot be taken past Litestar: {', '.join(relied_on) or 'request'}")
    data = handler.parsed_data_field
    return _Route(template, handler, terms(handler), handler.fn, data.annotation if data is not None else None)
