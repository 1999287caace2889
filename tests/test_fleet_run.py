"""Runs over a machine's tenants: one at a time, in shards, and gone on with after a crash."""

from __future__ import annotations

import signal

import pytest

from shared import catalogue, fleet_run
from shared.errors import LeaseHeld, Permanent
from shared.fleet_run import holding
from tests.core_fixtures import start_child
from tests.fleet_fixtures import Machine, made, skipped

pytest_plugins = ("tests.core_fixtures", "tests.fleet_fixtures")


def test_shards_divide_the_tenants_once_and_for_all(machine: Machine) -> None:
    """Every tenant in exactly one shard, the same one tomorrow."""
    parts = [made(machine.back_up(machine.run(shard=n, shards=3))) for n in range(3)]
    assert set().union(*parts) == set(machine.tenants) and sum(map(len, parts)) == len(machine.tenants)
    assert [fleet_run.shard_of(t, 7) for t in ("acme", "zebra", "t-1")] == [6, 0, 4]


def test_one_run_of_a_machine_at_a_time_and_shards_of_one_division_together(machine: Machine) -> None:
    """The lock is the kernel's: it is gone with the process that had it."""
    whole, first, second = machine.run(), machine.run(shard=0, shards=2), machine.run(shard=1, shards=2)
    with holding(machine.settings, first), holding(machine.settings, second):
        for other in (whole, first):
            with (
                pytest.raises(LeaseHeld, match=machine.settings.machine_id),
                holding(machine.settings, other),
            ):
                pass
    with (
        holding(machine.settings, whole),
        pytest.raises(LeaseHeld),
        holding(machine.settings, second),
    ):
        pass
    with holding(machine.settings, whole):
        pass


CHILD = """
    import sys
    from pathlib import Path
    from shared import fleet_run
    from shared.control_plane import ControlPlane
    from shared.fleet import Fleet
    from shared.fleet_run import Run
    from shared.objects import ObjectStore
    from shared.settings import Settings
    from shared.workdir import workdir
    data_dir, url, machine_id, run_id = sys.argv[1:]
    settings = Settings(data_dir=data_dir, control_plane_url=url, machine_id=machine_id, backup_parallel=1)
    run = Run(run_id, machine_id, "scheduled", flow_run_id="one-flow-run")
    with ControlPlane(settings) as control_plane, fleet_run.holding(settings, run):
        fleet_run.begin(control_plane, run)
        work = Fleet(settings, control_plane, ObjectStore(settings), run)
        with workdir(settings.data_dir / "tmp", "backup") as directory:
            for done in work.back_up(fleet_run.choose(control_plane, run), directory):
                print(done.tenant_id, flush=True)
                sys.stdin.readline()  # until it is killed
"""


def test_a_run_killed_midway_goes_on_with_the_rest(machine: Machine) -> None:
    """SIGKILL, then the same run again: finished tenants are not done a second time, nobody is left out."""
    run = machine.run("the-night")
    url = machine.settings.control_plane_url.get_secret_value()
    child = start_child(CHILD, machine.settings.data_dir, url, machine.settings.machine_id, run.run_id, stdin=-1)
    assert child.stdout is not None
    first = child.stdout.readline().strip()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert fleet_run.unfinished(machine.control_plane, machine.settings).run_id == "the-night"
    finished = {t for t in machine.tenants if catalogue.list_of(machine.control_plane, t)}
    assert first in finished and finished < set(machine.tenants)
    with fleet_run.holding(machine.settings, run):  # the dead run's lock is gone with it
        done = machine.back_up(run)
    assert skipped(done) >= {first} and made(done) >= set(machine.tenants) - finished
    counts = {t: len(catalogue.list_of(machine.control_plane, t)) for t in machine.tenants}
    assert set(counts.values()) == {1}, "nobody twice, even one killed between its row and its mark: it is unchanged"
    with pytest.raises(Permanent, match="no unfinished"):
        fleet_run.unfinished(machine.control_plane, machine.settings)
    assert not any(machine.settings.data_dir.glob("tmp/backup-*/*"))


def test_a_backup_of_one_tenant_does_not_hide_the_run_that_died(machine: Machine) -> None:
    """What is urgent is saved first; the night is gone on with after it as it was: forced, and in as many shards."""
    night = machine.run("the-night", shard=1, shards=2, force=True)
    fleet_run.begin(machine.control_plane, night)
    machine.back_up(machine.run(whole=False))
    left = fleet_run.unfinished(machine.control_plane, machine.settings)
    assert (left.run_id, left.shards, left.force) == ("the-night", 2, True)
    assert fleet_run.unfinished(machine.control_plane, machine.settings, 1, 2) == left
    with pytest.raises(Permanent, match="no unfinished"):
        fleet_run.unfinished(machine.control_plane, machine.settings, 0, 1)
    assert fleet_run.begin(machine.control_plane, machine.run("the-night", shard=1, shards=2)).force
