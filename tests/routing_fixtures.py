"""Two machines, one control plane, and what stands for Fly's proxy in front of one of them.

Each gateway is a real one with a data directory and a machine id of its own. `data-1` is where clients arrive. No
gateway reads the control plane by itself after its start (an hour between reads): what a gateway knows, a test decides.

Taken in with `pytest_plugins = ("tests.core_fixtures", "tests.routing_fixtures")`. (PYTEST_DONT_REWRITE)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest

from shared import registry
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.core_fixtures import settings_in
from tests.fly_proxy import FlyProxy
from tests.gateway_stack import Gateway, Issuer, assert_problem, gateway
from tests.ports import free_port

BODY_LIMIT_BYTES = 3_000_000
NEVER_SECONDS = 3_600
MACHINES = ("data-1", "data-2", "data-9")
_numbers = itertools.count(1)


class Machine(NamedTuple):
    settings: Settings
    gateway: Gateway

    def events(self, tenant_id: str) -> int:
        return len(self.gateway.events(tenant_id))

    def unrouted(self, reason: str) -> float:
        return self.gateway.metric("engram_requests_unrouted_total", reason=reason)


class Fleet(NamedTuple):
    """`one` and `two` speak fly-replay; `one` alone knows the addresses of the others' gateways. `three` forwards."""

    control_plane: ControlPlane
    issuer: Issuer
    one: Machine
    two: Machine
    three: Machine
    proxy: FlyProxy

    def tenant(self, machine: Machine) -> str:
        """A new tenant of that machine, which each gateway hears of by its first request."""
        tenant_id = f"tenant-{next(_numbers)}"
        registry.create(self.control_plane, machine.settings, tenant_id)
        return tenant_id

    def route(self, tenant_id: str, machine_id: str) -> None:
        with self.control_plane.transaction() as connection:
            connection.execute("UPDATE tenants SET machine_id = %s WHERE tenant_id = %s", (machine_id, tenant_id))

    def teach(self, machine: Machine) -> None:
        """Let its gateway read the control plane: it does when it meets a tenant it does not know."""
        assert_problem(self.client(f"nobody-{next(_numbers)}", machine.gateway.url).get("/v1/memories"), 403)

    def client(self, tenant_id: str, url: str = "", **claims: Any) -> httpx.Client:
        """Through the proxy, unless a URL says where."""
        headers = {"Authorization": f"Bearer {self.issuer.token(tenant_id, **claims)}"}
        return httpx.Client(base_url=url or self.proxy.url, headers=headers, timeout=30, trust_env=False)

    def hops(self) -> list[tuple[str, int]]:
        """To which apps requests were delivered since the last call, with their answers' status."""
        hops, self.proxy.hops[:] = [(h.app, h.status) for h in self.proxy.hops], []
        return hops


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, core_url: str, core_control_plane: ControlPlane) -> Iterator[Fleet]:
    issuer, ports = Issuer(), [free_port() for _ in range(3)]
    nobody = free_port()
    replaying = {
        "routing": "fly-replay",
        "routing_apps": "engram-{machine_id}",
        "trusted_proxies": "127.0.0.1/32",
        "client_address_header": "fly-client-ip",
    }
    of_machine: list[dict[str, object]] = [
        {**replaying, "routing_urls": f"data-2=http://127.0.0.1:{ports[1]},data-3=http://127.0.0.1:{nobody}"},
        replaying,
        {
            "routing": "forward",
            "routing_urls": f"http://127.0.0.1:{nobody}/{{machine_id}},data-2=http://127.0.0.1:{ports[1]}",
        },
    ]
    directories = [tmp_path_factory.mktemp(machine_id) for machine_id in MACHINES]  # by one thread: pytest's rule
    with contextlib.ExitStack() as closing:
        closing.callback(issuer.close)

        def start(n: int) -> Machine:
            machine_id = MACHINES[n]
            settings = settings_in(directories[n], core_url, machine_id=machine_id)
            running = gateway(
                settings.data_dir,
                core_url,
                issuer,
                machine_id=machine_id,
                gateway_port=ports[n],
                gateway_workers=1,
                tenant_refresh_seconds=NEVER_SECONDS,
                body_limit_bytes=BODY_LIMIT_BYTES,
                **of_machine[n],
            )
            return Machine(settings, closing.enter_context(running))

        with ThreadPoolExecutor(3) as threads:
            machines = list(threads.map(start, range(3)))
        apps = {f"engram-data-{n + 1}": ports[n] for n in range(2)}
        proxy = FlyProxy("engram-data-1", apps)
        closing.callback(proxy.close)
        yield Fleet(core_control_plane, issuer, *machines, proxy)
