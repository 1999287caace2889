"""The decision table: every symptom has one row, every row proposes something that exists, the first cause decides."""

from __future__ import annotations

import importlib
import shlex
from typing import Any, get_args

import msgspec
import pytest
import typer
import yaml

from deployments.cli import COMMANDS, app
from shared.diagnosis import table
from shared.diagnosis.finding import Finding, Symptom, bad, good, unseen
from shared.diagnosis.proposal import Proposal
from shared.playbook.table import ACTIONS
from tests.core_fixtures import ROOT

SYMPTOMS: tuple[Any, ...] = get_args(Symptom)
BACKUP = "01a20a6f-a403-7be4-9b1c-92aa0da41e70"
BY_HAND = {"by-hand", "wait"}
FACTS = {"tenant_id": "acme", "backup_id": BACKUP, "backup_at": "2026-11-23", "tenants": ["acme", "beta"], "rps": 40.0}
# What each row proposes: its action, and what of its arguments matters.
EXPECTED: dict[str, tuple[str, dict[str, Any]]] = {
    "control_plane_down": ("by-hand", {}),
    "volume_read_only": ("volume-health", {}),
    "volume_full": ("volume-health", {}),
    "gateway_down": ("by-hand", {}),
    "worker_silent": ("restart-workers", {}),
    "clock_off": ("by-hand", {}),
    "issuer_down": ("jwks-status", {}),
    "keys_unknown": ("refresh-jwks", {}),
    "tokens_refused": ("explain-token", {}),
    "tokens_missing": ("top", {}),
    "restore_left": ("sweep", {}),
    "in_maintenance": ("wait", {"tenant_id": "acme"}),
    "permissions_wrong": ("fix-permissions", {"tenant_id": "acme"}),
    "database_missing": ("restore", {"tenant_id": "acme", "backup_id": BACKUP}),
    "database_corrupt": ("restore", {"tenant_id": "acme", "backup_id": BACKUP}),
    "schema_too_new": ("by-hand", {}),
    "database_unreadable": ("volume-health", {}),
    "open_failures": ("restart-tenant", {"tenant_id": "acme"}),
    "wal_large": ("restart-tenant", {"tenant_id": "acme"}),
    "volume_slow": ("volume-health", {}),
    "tenant_dominates": ("set-rate-limit", {"tenant_id": "acme", "rps": 20.0}),
    "memory_short": ("cap-pool", {"open_databases": 256}),
    "machine_busy": ("shed", {"classes": ["search", "list"]}),
    "searches_slow": ("shed", {"classes": ["search"]}),
    "slow": ("top", {}),
    "errors": ("top", {}),
    "rate_limited": ("top", {}),
    "partitions_missing": ("retention", {"dry_run": False}),
    "usage_late": ("metering", {}),
    "spool_half_full": ("metering", {}),
    "segments_stuck": ("metering", {}),
    "flush_failures": ("volume-health", {}),
    "usage_lost": ("reconcile", {"days": 3}),
    "segments_quarantined": ("reconcile", {"days": 3}),
    "store_refuses": ("by-hand", {}),
    "store_down": ("by-hand", {}),
    "backups_corrupt": ("backup", {"tenants": ["acme", "beta"]}),
    "backups_stale": ("backup", {"tenants": ["acme", "beta"]}),
    "drill_failed": ("backup", {"tenants": ["acme", "beta"]}),
    "drills_late": ("restore-test", {}),
    "not_seen": ("by-hand", {}),
}


def finding(symptom: Any, **facts: Any) -> Finding:
    return bad("a-check", "seen so", "normally so", symptom, **(FACTS | facts))


def proposed(*findings: Finding) -> Proposal:
    answer = table.decide(findings)
    assert answer is not None
    return answer


@pytest.fixture(scope="module")
def command() -> Any:
    for name in COMMANDS:
        importlib.import_module(f"deployments.cli.{name}").register(app)
    return typer.main.get_command(app)


def test_every_symptom_has_one_row_and_every_row_its_expectation() -> None:
    """A check that finds something nobody answers would be a diagnosis without a proposal."""
    assert sorted(row.symptom for row in table.ROWS) == sorted(SYMPTOMS) == sorted(EXPECTED)


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_row_proposes_its_action(symptom: Any) -> None:
    """The table is read by a person who trusts it at 3 a.m."""
    action, arguments = EXPECTED[symptom]
    answer = proposed(finding(symptom))
    assert answer.action == action
    assert arguments.items() <= dict(answer.arguments).items()
    assert "seen so" in answer.why or "acme" in answer.why, "why must say what was seen"
    assert answer.destructive == (action == "restore"), "a restore replaces data; nothing else here does"


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_a_proposal_can_be_carried_out(symptom: Any, command: Any) -> None:
    """Its action takes these arguments, its deployment exists, and its command is one that this build understands."""
    answer = proposed(finding(symptom))
    if answer.deployment is None:
        assert answer.action in BY_HAND or "prefect" not in ACTIONS[answer.action].doors
    else:
        flow_of(answer.deployment).validate_parameters(dict(answer.parameters))
    if answer.deployment == "act":
        action = ACTIONS[answer.action]
        msgspec.convert(answer.parameters["arguments"], action.arguments)
        assert "prefect" in action.doors
        assert (answer.parameters["tenant_id"] is not None) <= (action.tenant != "none")
        assert not (action.tenant == "required" and answer.parameters["tenant_id"] is None)
    typed = parse(command, shlex.split(answer.command))
    if answer.deployment == "act":
        for name, value in (answer.parameters["arguments"] | {"tenant_id": answer.parameters["tenant_id"]}).items():
            assert typed.get(name) == (",".join(value) if isinstance(value, list) else value), name


def flow_of(deployment: str) -> Any:
    """The flow behind a deployment; its parameters are those of the form that a proposal fills in."""
    deployments = yaml.load((ROOT / "prefect.yaml").read_text(), yaml.CSafeLoader)["deployments"]
    [entrypoint] = [d["entrypoint"] for d in deployments if d["name"] == deployment]
    module, _, name = entrypoint.rpartition(".")
    return getattr(importlib.import_module(module), name)


def parse(command: Any, words: list[str]) -> dict[str, Any]:
    """What `engram` understands of a command line; raises for one that it would refuse. Runs nothing."""
    assert words.pop(0) == "engram"
    while hasattr(command, "get_command"):
        name = words.pop(0)
        found = command.get_command(command.context_class(command), name)
        assert found is not None, f"there is no command {name}"
        command = found
    params: dict[str, Any] = command.make_context(command.name, words).params
    return params


@pytest.mark.parametrize("symptom", ["open_failures", "wal_large"])
def test_without_a_tenant_the_workers_are_restarted_instead(symptom: Any) -> None:
    """Metrics carry no tenant: an alert need not name one."""
    assert proposed(finding(symptom, tenant_id=None)).action == "restart-workers"


@pytest.mark.parametrize("symptom", ["database_corrupt", "database_missing"])
def test_without_a_backup_nothing_is_restored(symptom: Any) -> None:
    """What is left of the database may be all there is."""
    answer = proposed(finding(symptom, backup_id=None))
    assert (answer.action, answer.destructive, answer.deployment) == ("by-hand", False, None)


def test_too_many_tenants_for_a_command_line_become_all() -> None:
    """A command of thousands of words is not one a person pastes."""
    many = [f"t{n}" for n in range(1_000)]
    assert proposed(finding("backups_stale", tenants=many)).parameters == {"all": True}


def test_nothing_is_proposed_when_nothing_is_wrong() -> None:
    """ "Nothing to do" is an answer."""
    assert table.decide([good("a-check", "fine", "fine")]) is None
    assert table.decide([]) is None


@pytest.mark.parametrize(
    ("cause", "effect"),
    [
        ("control_plane_down", "backups_stale"),
        ("volume_full", "flush_failures"),
        ("volume_read_only", "database_unreadable"),
        ("gateway_down", "usage_late"),
        ("issuer_down", "keys_unknown"),
        ("restore_left", "database_corrupt"),
        ("in_maintenance", "open_failures"),
        ("permissions_wrong", "open_failures"),
        ("database_corrupt", "open_failures"),
        ("open_failures", "errors"),
        ("tenant_dominates", "searches_slow"),
        ("store_down", "backups_stale"),
        ("backups_corrupt", "drills_late"),
    ],
)
def test_a_cause_decides_before_what_it_may_have_caused(cause: Any, effect: Any) -> None:
    """Mending the effect of a full disk hides the full disk."""
    assert proposed(finding(effect), finding(cause)) == proposed(finding(cause))


def test_what_could_not_be_seen_never_hides_what_was() -> None:
    """And alone it is no health: a person is told to look."""
    blind = unseen("issuer", "no answer")
    assert proposed(blind, finding("usage_late")).action == "metering"
    assert proposed(blind).action == "by-hand"
