"""What clients of a tenant see from the moment its deletion begins."""

from __future__ import annotations

import pytest

from shared import deletion, registry
from shared.objects import ObjectStore
from tests.gateway_stack import Stack, assert_problem, eventually, stack  # noqa: F401


def test_clients_of_a_tenant_that_is_being_deleted_are_refused_like_those_of_none(
    stack: Stack,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A good token must open nothing from the first step on, and not tell whether there ever was such a tenant; 403,
    not 503: coming back later is of no use."""
    tenant, settings = stack.tenant(), stack.settings
    objects = ObjectStore(settings)

    def die(*_: object) -> None:
        raise RuntimeError("killed before the receipt")

    def delete() -> None:
        deletion.delete(settings, stack.control_plane, objects, tenant, reason="contract ended", requested_by="test")

    with stack.client(tenant) as api, stack.client("never-created") as nobody:
        assert api.post("/v1/memories", json={"content": "mine"}).status_code == 201
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(deletion, "_finish", die)
            delete()
        assert registry.get(stack.control_plane, tenant).state == "deleting"
        for state in ("deleting", "deleted"):
            assert registry.get(stack.control_plane, tenant).state == state
            eventually(lambda: all(api.get("/v1/memories").status_code == 403 for _ in range(5)))
            refused = assert_problem(api.post("/v1/memories", json={"content": "late"}), 403)
            assert refused["detail"] == assert_problem(nobody.get("/v1/memories"), 403)["detail"]
            if state == "deleting":
                delete()
    assert not (settings.tenants_dir / tenant).exists()
