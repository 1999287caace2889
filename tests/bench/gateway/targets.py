"""The servers under test; each is `python -m tests.bench.gateway.targets NAME PORT`, one worker.

bare          a Litestar handler that answers a small JSON object: what the framework and the server cost by themselves
bare-in-turn  the same, and its loop takes its turn on the core as the gateway's does (`gateway.scheduling`): how near
              the gateway is to the best that a handler of this framework can do
edge          the gateway with a trivial handler: no SQLite, all of the rest
gateway       `engram serve` as it is
single        the gateway with one transaction per write: what group commit is compared with
usual         the same interface the usual way (`usual.py`)
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from shared.settings import settings as settings_from_environment

Loader = Callable[..., Any]


def main(name: str, port: int) -> None:
    if name in ("bare", "bare-in-turn"):
        _granian(port, _load_bare if name == "bare" else _load_bare_in_turn)
    elif name == "usual":
        import uvicorn

        uvicorn.run(
            "tests.bench.gateway.usual:app",
            host="127.0.0.1",
            port=port,
            http="httptools",  # the fast parser, as `uvicorn[standard]`, and uvloop, which it takes by itself
            access_log=False,
            log_level="warning",
        )
    else:
        from gateway import serve

        serve.load = {"gateway": serve.load, "edge": _load_edge, "single": _load_single}[name]
        serve.serve(settings_from_environment())


def _granian(port: int, load: Loader) -> None:
    from granian.constants import Interfaces, Loops
    from granian.server import Server

    server = Server(
        "bench",
        address="127.0.0.1",
        port=port,
        interface=Interfaces.ASGI,
        loop=Loops.uvloop,
        workers=1,
        websockets=False,
        log_access=False,
    )
    server.serve(target_loader=partial(load, settings_from_environment(), os.getpid()), wrap_loader=False)


def _load_bare(*_given: Any, in_turn: bool = False) -> Any:
    from litestar import Litestar, get

    from gateway.scheduling import take_turns

    @get(["/bare", "/ready"])
    async def bare() -> dict[str, str]:
        return {"status": "ok"}

    return Litestar([bare], on_startup=[take_turns] if in_turn else [], openapi_config=None, logging_config=None)


_load_bare_in_turn = partial(_load_bare, in_turn=True)


def _load_edge(*given: Any) -> Any:
    import msgspec

    from gateway import serve
    from gateway.pool import TenantPool
    from shared.engine.memories import Memory

    raw = msgspec.Raw(b"[]")
    memory = Memory("i", "trivial", raw, msgspec.Raw(b"{}"), "note", 0.5, "now", "now", 1)

    async def look_up(_pool: TenantPool, _tenant_id: str, _job: Any) -> Memory:
        return memory

    TenantPool.look_up = look_up  # type: ignore[method-assign, assignment]
    return serve.load(*given)  # in the worker, a fresh process, it is the real one


def _load_single(*given: Any) -> Any:
    from gateway import pool, serve

    pool.BATCH = 1
    return serve.load(*given)  # in the worker, a fresh process, it is the real one


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
