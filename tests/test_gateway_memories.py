"""Memories over HTTP: create, read, change, delete, list, search."""

from __future__ import annotations

import pytest

from tests.gateway_stack import Stack, assert_problem, stack  # noqa: F401


@pytest.fixture
def api(stack: Stack):  # noqa: F811
    with stack.client(stack.tenant()) as client:
        yield client


def test_a_created_memory_reads_back_as_it_was_answered(api) -> None:
    """The 201 body is the stored row, with the defaults filled in."""
    sent = {"content": "Łódź 💾", "tags": ["a", "b", "a"], "metadata": {"n": {"x": [1, None]}}, "importance": 1}
    created = api.post("/v1/memories", json=sent)
    assert created.status_code == 201
    memory = created.json()
    assert memory["content"] == sent["content"] and memory["metadata"] == sent["metadata"]
    assert memory["tags"] == ["a", "b"] and memory["memory_type"] == "note" and memory["version"] == 1
    got = api.get(f"/v1/memories/{memory['id']}")
    assert got.status_code == 200 and got.json() == memory
    assert created.headers["x-request-id"] != got.headers["x-request-id"]


def test_a_negative_zero_is_zero_in_every_answer(api) -> None:
    """SQLite keeps no -0.0: an answer that said it would not be what the next one says."""
    body, headers = b'{"content":"x","importance":-0.0}', {"Content-Type": "application/json"}
    made = api.post("/v1/memories", content=body, headers=headers)
    path = f"/v1/memories/{made.json()['id']}"
    assert b'"importance":0.0,' in made.content and api.get(path).content == made.content
    changed = api.patch(path, content=body, headers=headers)
    assert b'"importance":0.0,' in changed.content and api.get(path).content == changed.content


def test_an_update_changes_the_given_fields_and_counts_the_version(api) -> None:
    """PATCH leaves absent fields alone, also on the very next read by id (which may use another connection)."""
    memory = api.post("/v1/memories", json={"content": "one", "tags": ["t"], "memory_type": "fact"}).json()
    path = f"/v1/memories/{memory['id']}"
    for version in range(2, 12):
        changed = api.patch(path, json={"content": f"take {version}", "metadata": {"v": version}})
        assert changed.status_code == 200
        assert changed.json() == api.get(path).json()
        assert changed.json()["version"] == version
    assert changed.json()["tags"] == ["t"] and changed.json()["memory_type"] == "fact"
    assert api.patch(path, json={"tags": []}).json()["tags"] == []


def test_a_deleted_memory_is_gone_for_every_route(api) -> None:
    """204 without a body, then 404 for GET, PATCH and DELETE, and no search finds it."""
    memory = api.post("/v1/memories", json={"content": "ephemeral thing"}).json()
    path = f"/v1/memories/{memory['id']}"
    deleted = api.delete(path)
    assert deleted.status_code == 204 and deleted.content == b""
    assert_problem(api.get(path), 404)
    assert_problem(api.patch(path, json={"content": "x"}), 404)
    assert_problem(api.delete(path), 404)
    assert api.post("/v1/search", json={"query": "ephemeral"}).json() == {"results": [], "count": 0}


@pytest.mark.parametrize("bad", ["nope", "%00", "%ff", "0" * 36, "..%2f..", "%F0%9F%92%BE", "a" * 4000])
def test_a_malformed_id_is_an_unknown_id(api, bad: str) -> None:
    """Nothing strange reaches SQLite: 404, never 500."""
    assert_problem(api.get(f"/v1/memories/{bad}"), 404)


def test_the_cursor_walks_every_memory_once_newest_first(api) -> None:
    """Pages neither repeat nor skip, also with a tag, and the last page has no cursor."""
    ids = [
        api.post("/v1/memories", json={"content": f"m{n}", "tags": ["odd"] if n % 2 else []}).json()["id"]
        for n in range(11)
    ]
    for params, expected in (({}, ids[::-1]), ({"tag": "odd"}, ids[1::2][::-1])):
        walked, cursor = [], None
        while True:
            page = api.get("/v1/memories", params={"limit": 3, **params, **({"cursor": cursor} if cursor else {})})
            assert page.status_code == 200
            walked += [m["id"] for m in page.json()["memories"]]
            cursor = page.json()["next_cursor"]
            if cursor is None:
                break
        assert walked == expected


def test_a_cursor_that_was_changed_or_is_of_another_list_is_refused(api, stack: Stack) -> None:  # noqa: F811
    """A cursor is opaque: a changed one is 400, not some other page."""
    for n in range(3):
        api.post("/v1/memories", json={"content": f"m{n}", "tags": ["t"]})
    cursor = api.get("/v1/memories", params={"limit": 1}).json()["next_cursor"]
    assert api.get("/v1/memories", params={"limit": 1, "cursor": cursor}).status_code == 200
    flipped = ("A" if cursor[5] != "A" else "B").join((cursor[:5], cursor[6:]))
    for bad in (flipped, cursor[:-1], cursor + "A", "", "'; DROP TABLE", cursor[:-1] + "é"):
        assert_problem(api.get("/v1/memories", params={"cursor": bad}), 400)
    assert_problem(api.get("/v1/memories", params={"cursor": cursor, "tag": "t"}), 400)
    with stack.client(stack.tenant()) as other:
        assert_problem(other.get("/v1/memories", params={"cursor": cursor}), 400)


@pytest.mark.parametrize("limit", ["0", "201", "-1", "x", "1e3", "1.5", ""])
def test_a_list_limit_outside_its_bounds_is_refused(api, limit: str) -> None:
    """1 to 200, and the problem names the parameter."""
    assert "limit" in assert_problem(api.get("/v1/memories", params={"limit": limit}), 400)["detail"]


def test_search_ranks_filters_and_limits(api) -> None:
    """Best match first, only memories with all the tags and of the type."""
    api.post("/v1/memories", json={"content": "apple apple apple", "tags": ["fruit", "red"]})
    api.post("/v1/memories", json={"content": "an apple among many other different words", "tags": ["fruit"]})
    api.post("/v1/memories", json={"content": "apple pie", "memory_type": "recipe"})
    found = api.post("/v1/search", json={"query": "apple"})
    assert found.status_code == 200
    document = found.json()
    assert document["count"] == 3 == len(document["results"])
    scores = [r["score"] for r in document["results"]]
    assert scores == sorted(scores, reverse=True)
    assert document["results"][0]["memory"]["content"] == "apple apple apple"
    assert api.post("/v1/search", json={"query": "apple", "limit": 1}).json()["count"] == 1
    assert api.post("/v1/search", json={"query": "apple", "tags": ["fruit", "red"]}).json()["count"] == 1
    assert api.post("/v1/search", json={"query": "apple", "memory_type": "recipe"}).json()["count"] == 1
    assert api.post("/v1/search", json={"query": "nothing"}).json() == {"results": [], "count": 0}


@pytest.mark.parametrize("query", ['"open', "AND", "NEAR(", "nocolumn:x", "a b)", "^", "   "])
def test_bad_search_syntax_is_the_callers_error_with_sqlites_message(api, query: str) -> None:
    """400 with a message that names the fault; FTS5's syntax is the interface."""
    assert len(assert_problem(api.post("/v1/search", json={"query": query}), 400)["detail"]) > 20


@pytest.mark.parametrize("body", [{}, {"query": ""}, {"query": "x", "limit": 0}, {"query": "x", "limit": 101}])
def test_a_search_outside_its_bounds_is_refused(api, body: dict) -> None:
    """Bounds of the body are 400 like every other bad input."""
    assert_problem(api.post("/v1/search", json=body), 400)


def test_two_tenants_never_see_each_other(stack: Stack) -> None:  # noqa: F811
    """The token alone chooses the database."""
    with stack.client(stack.tenant()) as one, stack.client(stack.tenant()) as two:
        memory = one.post("/v1/memories", json={"content": "private"}).json()
        assert_problem(two.get(f"/v1/memories/{memory['id']}"), 404)
        assert two.get("/v1/memories").json() == {"memories": [], "next_cursor": None}
        assert two.post("/v1/search", json={"query": "private"}).json()["count"] == 0
