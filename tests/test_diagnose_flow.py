"""The diagnose flow's own decisions, without a server: on which machine it looks, and what its artifact proposes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from flows import core as flow_core
from flows import diagnose as module
from shared.diagnosis import table
from shared.diagnosis.finding import bad
from shared.errors import UnknownTenant
from shared.settings import settings as cached_settings
from tests.core_fixtures import World

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def worker(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """The environment of a worker on the world's machine; what a test changes in it holds from the next look on."""
    monkeypatch.setenv("ENGRAM_DATA_DIR", str(world.settings.data_dir))
    monkeypatch.setenv("ENGRAM_CONTROL_PLANE_URL", world.settings.control_plane_url.get_secret_value())
    monkeypatch.setenv("ENGRAM_CONTROL_PLANE_CONNECT_TIMEOUT_SECONDS", "2")
    yield monkeypatch
    flow_core.control_plane().close()
    forget()


def forget() -> None:
    for cached in (cached_settings, flow_core.control_plane):
        cached.cache_clear()


def test_a_tenant_is_looked_at_where_it_lives(world: World, worker: pytest.MonkeyPatch) -> None:
    """Another machine's disk says nothing about it."""
    forget()
    assert not module._is_elsewhere(world.tenant_id)
    worker.setenv("ENGRAM_MACHINE_ID", f"another-{uuid.uuid4().hex[:6]}")
    forget()
    assert module._is_elsewhere(world.tenant_id)
    with pytest.raises(UnknownTenant):
        module._is_elsewhere("nobody-of-that-name")


def test_without_the_control_plane_it_is_looked_at_here(world: World, worker: pytest.MonkeyPatch) -> None:
    """That it does not answer is what the run is to say; to fail on it would say nothing."""
    worker.setenv("ENGRAM_CONTROL_PLANE_URL", "postgresql://127.0.0.1:9/x")
    forget()
    assert not module._is_elsewhere(world.tenant_id)


def test_the_artifact_has_the_command_the_form_and_a_word_of_warning() -> None:
    """The one destructive proposal must not look like the others."""
    corrupt = bad("database", "torn", "whole", "database_corrupt", tenant_id="acme", backup_id="b1")
    proposal = table.decide([corrupt])
    assert proposal is not None
    said = module._proposed(proposal, "http://ui/form")
    assert "[Open the form of restore](http://ui/form)" in said
    assert "```sh\nengram restore acme --backup b1" in said
    assert "It replaces data" in said
    harmless = table.decide([bad("p95-search", "900 ms", "below 250 ms", "searches_slow")])
    assert harmless is not None
    assert "It replaces data" not in module._proposed(harmless, "http://ui/form")
    assert "Open the form" not in module._proposed(harmless, None), "without Prefect's answer the command is left"
    assert module._proposed(None, None) == "## Nothing to do"
