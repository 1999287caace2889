"""New workers while nobody answers what they would ask: the issuer, and with it every new token's key, is away."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil

from shared.limits import set_limit
from tests.gateway_stack import Gateway, Issuer, Stack, eventually, gateway, stack  # noqa: F401
from tests.playbook_fixtures import settings_of


def test_a_worker_that_knows_no_keys_takes_nobodys_connections_while_another_serves(
    stack: Stack,  # noqa: F811
    tmp_path: Path,
) -> None:
    """One was killed, then all are to be replaced: clients notice neither, and once the issuer is back both happen."""
    issuer, tenant = Issuer(), stack.tenant()
    headers = {"Authorization": f"Bearer {issuer.token(tenant)}"}

    def statuses(served: Gateway) -> set[int]:
        """Each over a connection of its own: one in two is a worker's of two."""
        url = f"{served.url}/v1/memories"
        return {httpx.get(url, headers=headers, trust_env=False, timeout=30).status_code for _ in range(30)}

    def replaced_during_an_outage(served: Gateway, ask: Callable[[], object], waiting: int, gone: int) -> None:
        before = set(served.workers())
        issuer.failing = True
        ask()
        eventually(lambda: _events(served, "worker_waits") == waiting)
        assert statuses(served) == {200}
        issuer.failing = False
        eventually(lambda: len(before - (now := set(served.workers()))) == gone and len(now) == 2)
        assert statuses(served) == {200}

    with gateway(
        stack.lend_tenants(tmp_path),
        stack.control_plane_url,
        issuer,
        jwks_cooldown_seconds=0.2,
        limits_poll_seconds=0.05,
    ) as served:
        assert statuses(served) == {200}
        victim: psutil.Process = served.workers()[0]
        replaced_during_an_outage(served, victim.kill, waiting=1, gone=1)
        settings = settings_of(stack, served)

        def restart() -> None:
            set_limit(settings, "restart_workers", os.getpid(), ttl_seconds=600, reason="test")

        replaced_during_an_outage(served, restart, waiting=2, gone=2)
    issuer.close()


def test_a_stop_does_not_wait_for_a_worker_that_waits(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Nor kills it, nor says that usage may not be sealed: it never had any."""
    issuer = Issuer()
    with gateway(stack.lend_tenants(tmp_path), stack.control_plane_url, issuer, jwks_cooldown_seconds=0.2) as served:
        issuer.failing = True
        served.workers()[0].kill()
        eventually(lambda: _events(served, "worker_waits") == 1)
        assert served.stop() == 0
        said = [line["event"] for line in served.log()]
        assert not any("refused to gracefully stop" in event for event in said) and said.count("worker_stopped") == 2
    issuer.close()


def test_the_only_worker_answers_that_it_knows_no_keys(stack: Stack, tmp_path: Path) -> None:  # noqa: F811
    """Nobody else would answer /health, say what is wrong in /ready, or serve the moment the issuer is back."""
    issuer, tenant = Issuer(), stack.tenant()
    headers = {"Authorization": f"Bearer {issuer.token(tenant)}"}

    def status() -> int | str:
        try:
            url = f"{served.url}/v1/memories"
            return httpx.get(url, headers=headers, trust_env=False, timeout=30).status_code
        except httpx.TransportError as e:
            return type(e).__name__

    with gateway(
        stack.lend_tenants(tmp_path), stack.control_plane_url, issuer, jwks_cooldown_seconds=0.2, gateway_workers=1
    ) as served:
        issuer.failing = True
        served.workers()[0].kill()
        eventually(lambda: status() == 503)
        eventually(lambda: httpx.get(f"{served.url}/ready", trust_env=False).json().get("failing") == ["jwks"])
        issuer.failing = False
        eventually(lambda: status() == 200)
    issuer.close()


def _events(served: Gateway, event: str) -> int:
    return sum(line["event"] == event and line["failing"] == ["jwks"] for line in served.log())
