"""Hostile and clumsy requests: each has its own 4xx, none is a 500, and the next request is served."""

from __future__ import annotations

import gzip
import json
import re

import httpx
import pytest

from tests.gateway_stack import Stack, assert_problem, stack  # noqa: F401

JSON = {"Content-Type": "application/json"}


@pytest.fixture
def api(stack: Stack):  # noqa: F811
    with stack.client(stack.idle_tenant) as client:
        yield client
        assert client.get("/v1/memories").json()["memories"] == []


def _memory(**fields: object) -> bytes:
    return json.dumps({"content": "x", **fields}).encode()


BAD_BODIES = {
    "empty": b"",
    "blank": b"   ",
    "broken": b'{"content": "x"',
    "trailing": b'{"content": "x"} {}',
    "not an object": b'["content"]',
    "null": b"null",
    "deep list": b'{"content":"x","metadata":{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}}",
    "deep document": b"[" * 200_000,
    "deep metadata": b'{"content":"x","metadata":' + b'{"a":' * 40 + b"1" + b"}" * 40 + b"}",
    "invalid utf-8": b'{"content": "\xff\xfe"}',
    "utf-16": '{"content": "x"}'.encode("utf-16"),
    "lone surrogate": b'{"content": "\\ud800"}',
    "raw surrogate": b'{"content": "\xed\xa0\x80"}',
    "NUL": b'{"content": "a\\u0000b"}',
    "NUL in tag": b'{"content": "x", "tags": ["\\u0000"]}',
    "NUL in type": b'{"content": "x", "memory_type": "\\u0000"}',
    "NaN": b'{"content": "x", "importance": NaN}',
    "infinite number": b'{"content": "x", "metadata": {"n": 1e999}}',
    "huge integer": b'{"content": "x", "metadata": {"n": 1' + b"0" * 5_000 + b"}}",
    "no content": b"{}",
    "empty content": _memory(content=""),
    "content of another type": _memory(content=1),
    "null content": _memory(content=None),
    "long content": _memory(content="x" * 100_001),
    "unknown field": _memory(id="mine"),
    "importance as text": _memory(importance="0.5"),
    "importance as a bool": _memory(importance=True),
    "importance above 1": _memory(importance=1.01),
    "importance below 0": _memory(importance=-0.01),
    "tags as text": _memory(tags="a"),
    "65 tags": _memory(tags=[str(n) for n in range(65)]),
    "empty tag": _memory(tags=[""]),
    "long tag": _memory(tags=["x" * 129]),
    "tag of another type": _memory(tags=[1]),
    "metadata as a list": _memory(metadata=[]),
    "large metadata": _memory(metadata={"a": "x" * 70_000}),
    "long type": _memory(memory_type="x" * 65),
    "empty type": _memory(memory_type=""),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_400_and_stores_nothing(api: httpx.Client, name: str) -> None:
    """Also the ones that crash naive parsers; the fixture checks that nothing was stored and reads work."""
    assert_problem(api.post("/v1/memories", content=BAD_BODIES[name], headers=JSON), 400)


@pytest.mark.parametrize("body", [b"{}", b'{"version": 3}', b'{"content": null}', b'{"tags": null}', b'{"content":""}'])
def test_a_bad_change_is_400(api: httpx.Client, body: bytes) -> None:
    """PATCH needs at least one field, none of them null."""
    path = f"/v1/memories/{api.post('/v1/memories', json={'content': 'x'}).json()['id']}"
    assert_problem(api.patch(path, content=body, headers=JSON), 400)
    assert api.delete(path).status_code == 204


@pytest.mark.parametrize("body", [b'{"query": "a\\u0000b"}', b'{"query": "x", "tags": ["\\u0000"]}'])
def test_odd_characters_in_a_search_are_not_a_500(api: httpx.Client, body: bytes) -> None:
    """A NUL in a query is refused; in a filter it matches nothing."""
    assert api.post("/v1/search", content=body, headers=JSON).status_code in (200, 400)


def test_a_body_over_the_limit_is_413_however_it_is_sent(api: httpx.Client) -> None:
    """Announced or chunked; one below the limit is judged by its content."""
    large = _memory(metadata={"a": "x" * 500_000})
    assert_problem(api.post("/v1/memories", content=large, headers=JSON), 413)
    assert_problem(api.post("/v1/memories", content=iter([large[:300_000], large[300_000:]]), headers=JSON), 413)
    assert_problem(api.post("/v1/memories", content=large[:499_000], headers=JSON), 400)


def test_a_refusal_reaches_a_client_that_is_still_sending(api: httpx.Client) -> None:
    """The body of a refused request is read and dropped: closing on it would reset the connection."""
    for _ in range(10):
        response = api.post("/v1/memories", content=b"x" * 3_000_000, headers={"Authorization": "Bearer x"})
        assert_problem(response, 401)


@pytest.mark.parametrize("path", ["/v1/memories", "/v1/search", "/v1/mcp"])
def test_a_body_with_a_content_encoding_is_415_whatever_is_in_it(api: httpx.Client, path: str) -> None:
    """Nothing here decodes: JSON labelled gzip was taken for JSON, gzip for broken JSON. `identity` is no coding."""
    for content in (_memory(), gzip.compress(_memory())):
        for coding in ("gzip", "GZIP", "identity, br", "zstd", "x"):
            refused = api.post(path, content=content, headers=JSON | {"Content-Encoding": coding})
            assert "Content-Encoding" in assert_problem(refused, 415)["detail"]
            assert refused.headers["accept-encoding"] == "identity"
    twice = [*JSON.items(), ("Content-Encoding", "gzip"), ("Content-Encoding", "identity")]
    assert_problem(api.post(path, content=_memory(), headers=twice), 415)
    for coding in ("identity", "Identity ,identity", ""):
        answer = api.post(path, content=b"{", headers=JSON | {"Content-Encoding": coding})
        assert "truncated" in assert_problem(answer, 400)["detail"], "it was read"


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/x-www-form-urlencoded", "json"])
def test_a_body_that_is_not_said_to_be_json_is_415(api: httpx.Client, content_type: str | None) -> None:
    """Also without any content type: guessing is how forms become JSON."""
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert_problem(api.post("/v1/memories", content=_memory(), headers=headers), 415)


def test_a_content_type_with_parameters_is_json(api: httpx.Client) -> None:
    """`application/json; charset=utf-8` is what many clients send."""
    made = api.post("/v1/memories", content=_memory(), headers={"Content-Type": "Application/JSON; charset=utf-8"})
    assert made.status_code == 201
    api.delete(f"/v1/memories/{made.json()['id']}")


def test_unknown_paths_and_methods_are_problems_too(api: httpx.Client) -> None:
    """404 and 405 come from the router, before any handler, and look like every other error."""
    for path in ("/", "/v1", "/v1/nothing", "/v1/memories/a/b", "/v2/memories", "/v1//memories/x/", "/%00"):
        assert_problem(api.get(path), 404)
    for path in ("/schema/x", "/schema/swagger", "/schema/redoc", "/schema/x.json", "/schema/a/b"):
        for method in ("GET", "POST", "OPTIONS"):
            assert_problem(api.request(method, path), 404)
    for path in ("/schema", "/schema/openapi.json"):
        assert api.get(path).json()["openapi"]
    for method, path in (("PUT", "/v1/memories"), ("DELETE", "/v1/search"), ("POST", "/health"), ("BREW", "/ready")):
        assert_problem(api.request(method, path), 405)
    assert_problem(api.get("/v1/memories", headers={"Host": "a b"}), 400)


def test_head_is_get_without_the_content(api: httpx.Client) -> None:
    """Monitors and load balancers ask so; every status and field is that of the GET, problems too."""
    made = api.post("/v1/memories", json={"content": "x"}).json()["id"]
    paths = (
        "/health",
        "/ready",
        "/v1/memories",
        f"/v1/memories/{made}",
        "/v1/memories/x",
        "/nothing",
        "/schema",
        "//x",
    )
    for path in paths:
        got, head = api.get(path), api.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        for name in ("content-type", "content-length", "cache-control"):
            assert head.headers.get(name) == got.headers.get(name), (path, name)
        assert head.headers["x-request-id"] != got.headers["x-request-id"]
    assert api.head("/v1/search").status_code == 405
    assert api.head("/v1/memories", headers={"Authorization": "Bearer x"}).status_code == 401
    assert api.options("/v1/memories").headers["allow"] == "GET, HEAD, OPTIONS, POST"
    api.delete(f"/v1/memories/{made}")


def test_a_request_id_is_minted_for_every_answer_and_never_taken_from_the_client(stack: Stack) -> None:  # noqa: F811
    """A client's id would be a key it can repeat; it is kept, cut and printable, in the access line only."""
    seen = set()
    for path in ("/health", "/nothing", "/v1/memories"):
        sent = {"X-Request-Id": b"mine\xe9\t" + b"x" * 500}
        response = stack.gateway.client.get(path, headers=sent)
        minted = response.headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", minted)
        assert len(response.headers.get_list("x-request-id")) == 1
        seen.add(minted)
        kept = stack.gateway.access_line(minted)["client_request_id"]
        assert kept.startswith("minex") and len(kept) < 128
    assert len(seen) == 3


def test_the_openapi_document_tells_the_truth_about_errors_and_tokens(stack: Stack) -> None:  # noqa: F811
    """Problem documents with their media type, bounds of the bodies, and the bearer scheme, without a CDN."""
    document = stack.gateway.client.get("/schema/openapi.json").json()
    create = document["paths"]["/v1/memories"]["post"]
    for status in ("400", "401", "402", "403", "413", "415", "429", "503", "507"):
        assert list(create["responses"][status]["content"]) == ["application/problem+json"]
    assert "201" in create["responses"] and create["security"] == [{"bearer": []}]
    assert document["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"
    fields = document["components"]["schemas"]["CreateMemory"]["properties"]
    assert fields["content"]["maxLength"] == 100_000 and fields["importance"]["maximum"] == 1
    paths = {"/v1/memories", "/v1/memories/{memory_id}", "/v1/search", "/v1/usage", "/health", "/ready", "/metrics"}
    assert paths == {path for path in document["paths"] if not path.startswith("/v1/admin/")}
