"""Whose turn it is on the core (`gateway.scheduling`)."""

from __future__ import annotations

import os

import pytest

from gateway import scheduling
from tests.gateway_stack import Stack, stack  # noqa: F401


def test_the_threads_of_each_worker_take_turns(stack: Stack) -> None:  # noqa: F811
    """It is a fifth of what a core serves. The supervisor, which has nothing to give way to, does not."""
    workers = stack.gateway.workers()
    policies = {os.sched_getscheduler(thread.id) for worker in workers for thread in worker.threads()}
    assert policies == {os.SCHED_BATCH}
    assert os.sched_getscheduler(stack.gateway.process.pid) == os.SCHED_OTHER


def test_where_that_is_forbidden_it_is_said_and_served_all_the_same(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Sandboxes forbid what a process may ask of the scheduler, and a gateway that does not start is worse."""

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden)
    scheduling.take_turns()
    said = "".join(capfd.readouterr())
    assert "scheduling_policy_kept" in said and "Operation not permitted" in said
