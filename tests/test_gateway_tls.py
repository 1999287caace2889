"""TLS ended by the gateway itself: HTTP/2 and 1.1, what is refused on both, who is cut off."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import httpx
import pytest
from cryptography import x509

from gateway.headers import MAX_FIELDS
from shared.diagnosis import edge
from shared.diagnosis.sight import Sight
from shared.settings import Settings
from tests.gateway_stack import Gateway, Stack, assert_problem, eventually, gateway, stack  # noqa: F401
from tests.tls_fixtures import Pair, pair

JSON = {"Content-Type": "application/json"}
LARGE = b'{"content": "x", "metadata": {"a": "' + b"x" * 500_000 + b'"}}'
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
EMPTY_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
HALF_A_HEAD = b"\x00\x00\x01\x01\x00\x00\x00\x00\x01\x82"  # HEADERS of stream 1 without END_HEADERS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def running() -> dict[str, Any]:
    return {}


@pytest.fixture(scope="module", autouse=True)
def stopped_at_the_end(running: dict[str, Any]) -> Iterator[None]:
    yield
    if "context" in running:
        running["context"].__exit__(None, None, None)


@pytest.fixture
def served(stack: Stack, files: Pair, running: dict[str, Any]) -> Gateway:  # noqa: F811
    """One gateway for the module, impatient."""
    if "gateway" not in running:
        data_dir = stack.lend_tenants(stack.settings.data_dir.parent / "tls")
        running["context"] = gateway(
            data_dir,
            stack.control_plane_url,
            stack.issuer,
            ca=files.ca,
            gateway_workers=1,
            header_timeout_seconds=5,  # half of it a busy client may take to answer a ping
            body_timeout_seconds=2,
            gateway_kill_timeout_seconds=1,
            **files.settings(),
        )
        running["gateway"] = running["context"].__enter__()
    found: Gateway = running["gateway"]
    return found


def client(served: Gateway, http2: bool, **options: Any) -> httpx.Client:
    context = ssl.create_default_context(cafile=served.ca)
    return httpx.Client(base_url=served.url, verify=context, http2=http2, trust_env=False, timeout=20, **options)


@pytest.fixture(params=[False, True], ids=["http1", "http2"])
def api(request: pytest.FixtureRequest, served: Gateway, stack: Stack) -> Iterator[httpx.Client]:  # noqa: F811
    with client(served, request.param, headers=stack.headers(stack.idle_tenant)) as found:
        answer = found.get("/health")
        assert answer.http_version == ("HTTP/2" if request.param else "HTTP/1.1")
        yield found


def test_a_memory_lives_its_life_over_both_versions(api: httpx.Client, served: Gateway) -> None:
    """The same answers, the same request ids in the same access lines, whichever ALPN chose."""
    made = api.post("/v1/memories", json={"content": "lighthouse", "tags": ["tls"]})
    assert made.status_code == 201 and served.access_line(made.headers["x-request-id"])["client"] == "127.0.0.1"
    path = f"/v1/memories/{made.json()['id']}"
    assert api.get(path).json() == made.json()
    assert api.post("/v1/search", json={"query": "lighthouse"}).json()["count"] == 1
    assert api.get("/v1/memories", params={"tag": "tls"}).json()["memories"] == [made.json()]
    assert api.delete(path).status_code == 204
    assert_problem(api.get(path), 404)


def test_what_is_too_large_or_too_slow_is_refused_on_both_versions(api: httpx.Client, served: Gateway) -> None:
    """413, 414, 431 and 408 are the gateway's own, problem documents with a request id; the connection goes on."""

    def refused() -> int:
        return sum(line.get("status") == 408 for line in served.log())

    def slowly() -> Iterator[bytes]:
        yield b'{"content": '
        before = refused()
        eventually(lambda: refused() > before)
        yield b'"x"}'

    assert_problem(api.post("/v1/memories", content=LARGE, headers=JSON), 413)
    assert_problem(api.post("/v1/memories", content=iter([LARGE[:300_000], LARGE[300_000:]]), headers=JSON), 413)
    assert_problem(api.get("/health", params={"x": "y" * 9_000}), 414)
    assert_problem(api.get("/health", headers={"X": "y" * 40_000}), 431)
    assert_problem(api.get("/health", headers=[("X-Y", "z")] * MAX_FIELDS), 431)
    assert_problem(api.post("/v1/memories", content=slowly(), headers=JSON), 408)
    assert_problem(api.post("/v1/memories", content=b"x" * 3_000_000, headers={"Authorization": "Bearer x"}), 401)
    assert_problem(api.get("/v1/memories", headers={"Authorization": ""}), 401)
    assert api.get("/health").status_code == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("size", [600_000, 3_600_000])
@pytest.mark.parametrize("version", ["--http2", "--http1.1"])
def test_a_streamed_body_is_refused_so_that_curl_hears_of_it(
    served: Gateway,
    stack: Stack,  # noqa: F811
    version: str,
    size: int,
) -> None:
    """Without a length, as any pipe is sent. A stream that is reset under a client that still writes, or a connection
    closed after it was told to go on, loses the answer."""
    head = [f"-H{name}: {value}" for name, value in (JSON | stack.headers(stack.idle_tenant)).items()]
    for fields, status in ((head, 413), ([], 401), ([*head, "-HExpect: 100-continue"], 413)):
        for _ in range(3):
            done = subprocess.run(
                [
                    "curl",
                    "-sS",
                    version,
                    "--cacert",
                    served.ca,
                    "-T-",
                    "-XPOST",
                    "-w\n%{http_code}",
                    *fields,
                    served.url.replace("127.0.0.1", "localhost") + "/v1/memories",
                ],
                input=b"x" * size,
                capture_output=True,
                timeout=60,
                check=False,
            )
            body, _, code = done.stdout.rpartition(b"\n")
            assert (done.returncode, code) == (0, b"%d" % status), (done.stderr, body)
            assert json.loads(body)["status"] == status


def test_head_has_no_content_on_both_versions_whoever_answers(api: httpx.Client) -> None:
    """Over HTTP/2 nobody below takes it off, and content where there may be none ends the connection."""
    for path, status in (("/health", 200), ("/nothing", 404), ("//x", 404), ("/health?" + "x" * 9_000, 414)):
        answer = api.head(path)
        assert (answer.status_code, answer.content) == (status, b"")
        assert int(answer.headers["content-length"]) > 0


def test_a_streamed_body_is_refused_so_that_httpx_hears_of_it(api: httpx.Client) -> None:
    """It sends on while the answer is there, until its window is used up."""

    def pieces(size: int) -> Iterator[bytes]:
        for _ in range(size // 50_000):
            yield b"x" * 50_000

    for size in (600_000, 3_600_000):
        assert_problem(api.post("/v1/memories", content=pieces(size), headers=JSON), 413)
        assert_problem(api.post("/v1/memories", content=pieces(size), headers={"Authorization": "Bearer x"}), 401)
        assert_problem(api.get("/v1/memories", headers={"Authorization": ""}), 401)


def test_a_head_far_beyond_the_limits_of_http2_is_431_too(served: Gateway) -> None:
    """Beyond what is kept at all the HTTP/2 library answers, without a body, and the connection goes on. The field is
    small on the wire: HPACK sends a repeated one as an index."""
    with client(served, http2=True) as api:
        refused = api.get("/health", headers=[("X-Y", "z" * 3_000)] * 60)
        assert refused.status_code == 431 and not refused.content
        assert api.get("/health").status_code == 200


def test_many_requests_share_one_connection_of_http2(served: Gateway, stack: Stack) -> None:  # noqa: F811
    """More at once than the connection takes: the rest waits, none fails."""
    context = ssl.create_default_context(cafile=served.ca)

    async def ask(api: httpx.AsyncClient) -> list[int]:
        return [(await api.get("/v1/memories")).status_code for _ in range(5)]

    async def run() -> list[int]:
        # Not threads: CPython 3.11 lets two of them into one TLS connection at once, which OpenSSL does not stand.
        async with httpx.AsyncClient(
            base_url=served.url,
            headers=stack.headers(stack.idle_tenant),
            verify=context,
            trust_env=False,
            timeout=60,
            http2=True,
            limits=httpx.Limits(max_connections=1),
        ) as api:
            return [status for each in await asyncio.gather(*(ask(api) for _ in range(40))) for status in each]

    assert asyncio.run(run()) == [200] * 200


def test_who_takes_back_every_request_loses_the_connection(served: Gateway) -> None:
    """Rapid reset (CVE-2023-44487): each costs the client nothing and would cost us a request."""
    context = ssl.create_default_context(cafile=served.ca)
    context.set_alpn_protocols(["h2"])
    head = [(":method", "GET"), (":path", "/health"), (":scheme", "https"), (":authority", "localhost")]
    spoken = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    spoken.initiate_connection()
    address = ("127.0.0.1", int(served.url.rpartition(":")[2]))
    with (
        socket.create_connection(address, timeout=20) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as connection,
        pytest.raises(OSError),
    ):
        for _ in range(20_000):
            stream = spoken.get_next_available_stream_id()
            spoken.send_headers(stream, head, end_stream=True)
            spoken.reset_stream(stream)
            connection.sendall(spoken.data_to_send())
    assert served.client.get("/health").status_code == 200


def test_a_diagnosis_on_the_machine_sees_a_gateway_with_tls(served: Gateway) -> None:
    """It would call it down else, at three in the morning; the certificate is for another name than the loopback's."""
    settings = Settings(gateway_port=httpx.URL(served.url).port, tls_certificate="of the gateway", tls_key="its key")
    with Sight(settings) as sight:
        assert edge.ready(sight).ok


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
@pytest.mark.parametrize(
    ("version", "works"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
)
def test_tls_is_1_2_or_newer(served: Gateway, version: ssl.TLSVersion, works: bool) -> None:
    """What is older is refused in the handshake, not afterwards."""
    context = ssl.create_default_context(cafile=served.ca)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")  # or this side would refuse first
    context.minimum_version = context.maximum_version = version
    if works:
        with httpx.Client(verify=context, trust_env=False) as api:
            assert api.get(f"{served.url}/health").status_code == 200
        return
    with (
        socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2])), timeout=20) as connection,
        pytest.raises(ssl.SSLError, match="alert"),
    ):
        context.wrap_socket(connection, server_hostname="localhost")


def test_who_says_nothing_or_stops_half_way_is_cut_off(served: Gateway) -> None:
    """Whatever state a connection is left in: Granian alone keeps the second, third and fourth of these for ever."""
    port = int(served.url.rpartition(":")[2])

    def plain() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=30)

    def secure(protocol: str, data: bytes) -> socket.socket:
        context = ssl.create_default_context(cafile=served.ca)
        context.set_alpn_protocols([protocol])
        connection = context.wrap_socket(plain(), server_hostname="localhost")
        connection.sendall(data)
        return connection

    openings: list[Callable[[], socket.socket]] = [
        plain,
        lambda: secure("h2", b""),
        lambda: secure("http/1.1", b""),
        lambda: secure("h2", PREFACE[:9]),
        lambda: secure("h2", PREFACE),
        lambda: secure("h2", PREFACE + EMPTY_SETTINGS),
        lambda: secure("h2", PREFACE + EMPTY_SETTINGS + HALF_A_HEAD),
        lambda: secure("http/1.1", b"GET /health HT"),
    ]
    ends: list[str] = []

    def wait(connection: socket.socket) -> None:
        with connection:
            try:
                while connection.recv(65_536):
                    pass
                ends.append("closed")
            except TimeoutError:
                ends.append("still open")
            except OSError:  # a reset, or an end inside TLS
                ends.append("closed")

    threads = [threading.Thread(target=wait, args=(opening(),)) for opening in openings]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert ends == ["closed"] * len(openings)
    # It is said once all are ended, so after the last client has seen its end.
    assert eventually(lambda: any(line["event"] == "silent_connections_ended" for line in served.log()))
    assert served.client.get("/health").status_code == 200


def test_a_new_worker_takes_up_a_renewed_pair_and_open_connections_do_not_keep_it_from_stopping(
    stack: Stack,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Renewal needs no new start of the gateway; a stop waits for requests, not for clients that stay connected."""
    files = pair(tmp_path)
    (tmp_path / "data").mkdir()
    with gateway(
        tmp_path / "data",
        stack.control_plane_url,
        stack.issuer,
        ca=files.ca,
        gateway_workers=1,
        tls_minimum="1.3",
        **files.settings(),
    ) as served:
        older = ssl.create_default_context(cafile=served.ca)
        older.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises(httpx.ConnectError, match="alert"):
            httpx.get(f"{served.url}/health", verify=older, trust_env=False)

        def shown() -> int:
            port = int(served.url.rpartition(":")[2])
            return x509.load_pem_x509_certificate(
                ssl.get_server_certificate(("127.0.0.1", port), timeout=20).encode()
            ).serial_number

        before = shown()
        assert pair(tmp_path) == files
        served.workers()[0].kill()
        assert eventually(lambda: (now := shown()) != before and now)
        with client(served, http2=True) as idle, client(served, http2=False) as other:
            assert eventually(lambda: idle.get("/health").http_version == "HTTP/2")
            assert other.get("/health").http_version == "HTTP/1.1"
            silent = ssl.create_default_context(cafile=served.ca).wrap_socket(
                socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))), server_hostname="localhost"
            )
            with silent:
                assert served.stop() == 0
        stopped = [line["event"] for line in served.log()]
        assert "worker_stopped" in stopped and not any("refused to gracefully stop" in event for event in stopped)
