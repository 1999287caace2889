"""The maintenance lease: one holder, epochs that only count up."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from shared import lease
from shared.errors import LeaseHeld, LeaseLost
from shared.lease import Lease
from tests.core_fixtures import World
from tests.restore_fixtures import expire_lease

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def acquire(world: World) -> Callable[[str], Lease]:
    def call(holder: str) -> Lease:
        return lease.acquire(world.control_plane, world.tenant_id, holder=holder, reason="test", seconds=30)

    return call


def test_a_held_lease_is_refused_with_its_holder_and_a_released_one_is_granted(
    world: World, acquire: Callable[[str], Lease]
) -> None:
    """Who holds it is the first thing an operator asks."""
    first = acquire("a")
    with pytest.raises(LeaseHeld, match="held by a until"):
        acquire("b")
    assert lease.release(world.control_plane, world.tenant_id, first.holder)
    assert not lease.release(world.control_plane, world.tenant_id, first.holder)
    assert acquire("b").epoch == first.epoch + 1


def test_an_expired_lease_goes_to_the_next_and_is_lost_to_its_holder(
    world: World, acquire: Callable[[str], Lease]
) -> None:
    """The old holder can neither renew nor release what is now another's."""
    first = acquire("a")
    expire_lease(world)
    with pytest.raises(LeaseLost):
        lease.renew(world.control_plane, first, seconds=30)
    second = acquire("b")
    assert second.epoch > first.epoch
    with pytest.raises(LeaseLost):
        lease.renew(world.control_plane, first, seconds=30)
    assert not lease.release(world.control_plane, world.tenant_id, first.holder)
    assert lease.renew(world.control_plane, second, seconds=60).expires_at > second.expires_at


def test_a_grant_whose_reply_was_lost_is_granted_again_under_a_new_epoch(acquire: Callable[[str], Lease]) -> None:
    """The same run asks again; the epoch it never saw is never used."""
    first = acquire("a")
    assert acquire("a").epoch == first.epoch + 1


def test_epochs_are_unique_and_rise_under_concurrent_holders(world: World) -> None:
    """An epoch given twice would let a dead run's write pass for a live one's."""
    grants: list[int] = []
    inside, worst = 0, 0
    guard = threading.Lock()

    def work(name: str) -> None:
        nonlocal inside, worst
        while len(grants) < 60:
            try:
                held = lease.acquire(world.control_plane, world.tenant_id, holder=name, reason="r", seconds=30)
            except LeaseHeld:
                continue
            with guard:
                inside += 1
                worst = max(worst, inside)
                grants.append(held.epoch)
            with guard:
                inside -= 1
            assert lease.release(world.control_plane, world.tenant_id, held.holder)

    threads = [threading.Thread(target=work, args=(f"holder {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert grants == sorted(set(grants))
    assert worst == 1
