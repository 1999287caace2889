"""The OpenAPI document is true: schemathesis builds requests from it and compares every answer with it.

Which checks and how many examples: `tests/schemathesis.toml`, with a reason beside each exclusion.
"""

from __future__ import annotations

from pathlib import Path

from gateway.admin import OFFERED
from gateway.document import completed
from tests.gateway_stack import Stack, stack  # noqa: F401
from tests.openapi_fixtures import compared

OPERATIONS = 10  # and the operators', which `tests/test_gateway_admin.py` asks with a token of theirs


def test_every_answer_is_one_that_the_document_describes(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Right, wrong and malformed requests to every route, and what becomes of a memory after it was deleted."""
    token = stack.issuer.token(stack.tenant())
    found = compared(stack.gateway.url, token, tmp_path, "--exclude-path-regex", "^/v1/admin/")
    assert found["operations"]["tested"] == found["operations"]["total"] - len(OFFERED) == OPERATIONS
    assert {name: found["phases"][name]["status"] for name in ("coverage", "fuzzing", "stateful")} == {
        "coverage": "success",
        "fuzzing": "success",
        "stateful": "success",
    }
    assert found["test_cases"]["generated"] > 300


def test_the_document_names_what_bodies_may_not_say_and_what_answers_carry(stack: Stack) -> None:  # noqa: F811
    """Bounds inside lists, unknown fields, the header fields of refusals; rendering twice changes nothing."""
    document = stack.gateway.client.get("/schema/openapi.json").json()
    create = document["components"]["schemas"]["CreateMemory"]
    assert create["additionalProperties"] is False and create["properties"]["tags"]["items"]["maxLength"] == 128
    assert document["components"]["schemas"]["UpdateMemory"]["minProperties"] == 1
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert {"400", "414", "431", "500"} <= answers.keys()
            assert all("X-Request-Id" in answer["headers"] for answer in answers.values())
            for status in {"429", "503"} & answers.keys():
                assert "Retry-After" in answers[status]["headers"]
            for status in {"400", "414", "431"}:  # those that may be the server's below, which has no id
                assert not answers[status]["headers"]["X-Request-Id"]["required"]
            if path.startswith("/v1/"):
                assert "WWW-Authenticate" in answers["401"]["headers"]
    again = completed(document)
    assert again == document
