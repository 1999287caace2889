"""A body that does not come is given up on and is in nobody's way; nothing else that happens to its task is."""

from __future__ import annotations

import asyncio
import select
import socket
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from gateway.patience import GIVEN_UP, Patience
from gateway.problems import Refusal
from shared.settings import Settings
from tests.gateway_stack import Gateway, Stack, eventually, gateway, stack  # noqa: F401


def test_what_takes_too_long_is_a_timeout_and_its_task_goes_on() -> None:
    """The refusal is written by the same task."""

    async def run() -> str:
        with pytest.raises(TimeoutError):
            await Patience(Settings()).wait(asyncio.sleep(60), 0.01, "t")
        await asyncio.sleep(0)
        return "went on"

    assert asyncio.run(run()) == "went on"


def test_each_body_has_its_own_time() -> None:
    """One timer looks at all of them."""

    async def run() -> list[object]:
        patience = Patience(Settings())
        waits = [
            patience.wait(asyncio.sleep(delay, delay), limit, "t") for delay, limit in ((60, 0.01), (0.3, 60), (0, 60))
        ]
        return [str(type(r).__name__) for r in await asyncio.gather(*waits, return_exceptions=True)]

    assert asyncio.run(run()) == ["TimeoutError", "float", "int"]


def test_a_worker_that_stops_gives_everything_up_in_the_same_time_and_says_so() -> None:
    """Also what begins only then; what has its own time behind it is told that."""

    async def run() -> list[str]:
        stopping = threading.Event()
        patience = Patience(Settings(gateway_kill_timeout_seconds=1), stopping)
        first = [asyncio.create_task(patience.wait(asyncio.sleep(60), limit, "t")) for limit in (60, 0.01)]
        await asyncio.sleep(0.2)
        assert not first[0].done()
        stopping.set()
        begun = asyncio.create_task(patience.wait(asyncio.sleep(60), 60, "t"))
        found = await asyncio.gather(*first, begun, return_exceptions=True)
        return [type(each).__name__ for each in found]

    assert asyncio.run(run()) == ["Refusal", "TimeoutError", "Refusal"]


def test_a_task_cancelled_by_somebody_else_is_cancelled() -> None:
    """A client that leaves ends its request, also when the body is late at the same moment."""

    async def run(late: bool) -> None:
        patience = Patience(Settings())
        task = asyncio.create_task(patience.wait(asyncio.sleep(60), 0 if late else 60, "t"))
        await asyncio.sleep(0)
        if late:
            patience._look()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run(late=False))
    asyncio.run(run(late=True))


@pytest.fixture
def looks_by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[Patience], None]:
    """Twice, after which what waits hangs; no timer looks beside that."""
    monkeypatch.setattr("gateway.patience.LOOK_SECONDS", 3_600)

    def look_twice(patience: Patience) -> None:
        patience._look()
        patience._look()

    return look_twice


def test_a_body_that_is_only_just_awaited_is_never_given_up_for_another(
    looks_by_hand: Callable[[Patience], None],
) -> None:
    """It may be whole, and its client is not to blame for how many come at once: the next one is told when to come
    again. Where a tenant with fewer lets them hang, one of those goes."""

    async def run() -> None:
        patience = Patience(Settings(inflight_requests=4, inflight_tenant_requests=4))  # so eight bodies

        def begin(tenant_id: str) -> asyncio.Task[object]:
            return asyncio.create_task(patience.wait(asyncio.sleep(60), 60, tenant_id))

        hanging = [begin("slow") for _ in range(3)]
        await asyncio.sleep(0)
        looks_by_hand(patience)
        prompt = [begin("prompt") for _ in range(5)]
        await asyncio.sleep(0)
        assert await patience.wait(asyncio.sleep(0, "read"), 60, "another") == "read"
        with pytest.raises(Refusal) as given_up:
            await hanging.pop()
        assert given_up.value.problem is GIVEN_UP
        hanging.append(begin("slow"))  # there is a free place, and then none
        await asyncio.sleep(0)
        for _ in range(2):
            hanging.pop(0).cancel()
        await asyncio.sleep(0)
        prompt += [begin("prompt") for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Refusal) as refused:
            await patience.wait(asyncio.sleep(60), 60, "another")
        assert (refused.value.problem.status, refused.value.problem.retry_after) == (503, 1)
        assert not any(task.done() for task in prompt + hanging)
        for task in prompt + hanging:
            task.cancel()
        await asyncio.gather(*prompt, *hanging, return_exceptions=True)

    asyncio.run(run())


def test_whole_bodies_are_never_blamed_for_being_slow(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Many at once from two tenants, each head and body in one piece: served, or refused with a time to come again."""
    tenants = [stack.tenant() for _ in range(2)]
    stack.lend_tenants(tmp_path)
    places = {"inflight_requests": 2, "inflight_tenant_requests": 2}
    with gateway(tmp_path, stack.control_plane_url, stack.issuer, gateway_workers=1, **places) as served:

        def ask(n: int) -> httpx.Response:
            headers = stack.headers(tenants[n % 2])
            return httpx.post(
                f"{served.url}/v1/search", json={"query": "x"}, headers=headers, trust_env=False, timeout=30
            )

        for _ in range(5):
            with ThreadPoolExecutor(40) as pool:
                answers = list(pool.map(ask, range(200)))
            assert {r.status_code for r in answers} <= {200, 503}
            assert all("retry-after" in r.headers for r in answers if r.status_code == 503)


def test_bodies_that_hang_make_way_for_those_of_others(looks_by_hand: Callable[[Patience], None]) -> None:
    """The tenant that has most loses its youngest; one at its own bound, or as greedy as the greediest, is refused."""

    async def run() -> None:
        patience = Patience(Settings(inflight_requests=3, inflight_tenant_requests=2))  # so six bodies, four a tenant

        def begin(tenant_id: str) -> asyncio.Task[object]:
            return asyncio.create_task(patience.wait(asyncio.sleep(60), 60, tenant_id))

        async def refused(task: asyncio.Task[object]) -> Refusal:
            with pytest.raises(Refusal) as found:
                await task
            return found.value

        greedy, other = [begin("greedy") for _ in range(4)], [begin("other") for _ in range(2)]
        await asyncio.sleep(0)
        looks_by_hand(patience)
        assert (await refused(begin("greedy"))).problem.reason == "shed"
        assert await patience.wait(asyncio.sleep(0, "read"), 60, "another") == "read"
        assert (await refused(greedy.pop())).problem is GIVEN_UP
        assert await patience.wait(asyncio.sleep(0, "read"), 60, "another") == "read", "there is a free place now"
        other.append(begin("other"))
        await asyncio.sleep(0)
        assert (await refused(begin("other"))).problem.reason == "shed"
        for task in (*greedy, *other):
            task.cancel()
        results = await asyncio.gather(*greedy, *other, return_exceptions=True)
        assert [type(r) for r in results] == [asyncio.CancelledError] * 6
        assert not patience._waits and not patience._late

    asyncio.run(run())


def test_a_body_that_does_not_come_takes_no_place_from_anybody(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """More hang than may be at work, of REST and of MCP: their own tenant and another are served all the same."""
    slow, other = stack.tenant(), stack.tenant()
    stack.lend_tenants(tmp_path)
    places = {"inflight_requests": 2, "inflight_tenant_requests": 2, "inflight_wait_seconds": 0.2}
    with gateway(tmp_path, stack.control_plane_url, stack.issuer, gateway_workers=1, **places) as served:
        served.client.headers.update(stack.headers(other))
        paths = ("/v1/memories", "/v1/mcp") * 2
        hanging = {_hang(served, path, stack.headers(slow)): path for path in paths}
        made: list[int] = []

        def one_is_given_up() -> bool:
            """For a body of another tenant's: not before all have been read as far as they go. One that came while such
            a body was read has found no place, and comes again."""
            made.append(served.client.post("/v1/memories", json={"content": "x"}).status_code)
            answers = {connection: connection.recv(65_536)[9:12] for connection in _answered(hanging)}
            for connection, status in answers.items():
                path = hanging.pop(connection)
                connection.close()
                if status == b"503":
                    hanging[_hang(served, path, stack.headers(slow))] = path
            assert set(answers.values()) <= {b"408", b"503"}
            return b"408" in answers.values()

        eventually(one_is_given_up)
        assert len(hanging) == len(paths) - 1
        assert set(made) <= {201, 503} and made[-1] == 201, made
        for headers in (stack.headers(slow), stack.headers(other)):
            assert served.client.get("/v1/memories", headers=headers).status_code == 200
        assert served.client.post("/v1/memories", json={"content": "x"}).status_code == 201
        assert served.client.post("/v1/search", json={"query": "x", "limit": 100}).json()["count"] > 1
        assert not _answered(hanging)
        for connection in hanging:
            connection.close()


def _answered(connections: Iterable[socket.socket]) -> list[socket.socket]:
    return select.select(list(connections), (), (), 0)[0]


def _hang(served: Gateway, path: str, headers: dict[str, str]) -> socket.socket:
    """A POST that stops in the middle of its body."""
    url = httpx.URL(served.url)
    connection = socket.create_connection((url.host, url.port or 80))
    head = {"Host": url.host, "Content-Type": "application/json", "Content-Length": "1000", **headers}
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", '{"content": "x']
    connection.sendall("\r\n".join(lines).encode())
    return connection
