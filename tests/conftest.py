"""What several test files share: one PostgreSQL a session, and a migrated database of its own for whoever asks."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psycopg
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from psycopg import sql
from pydantic import SecretStr
from xdist.scheduler import LoadScopeScheduling

from deployments.postgres import _CONFIGURATION as configuration
from deployments.postgres import EmbeddedPostgres
from deployments.prefect_command import uncollected
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.authority_fixtures import trust_one
from tests.ports import free_port

_TEMPLATE = "migrated"
_MEMORY, _MEMORY_FREE_BYTES = Path("/dev/shm"), 1 << 30
_numbers = itertools.count(1)

# Compiled once, not by every process: a third of what a test process takes to start, and a tenth of the processes that
# tests start, which have it from the environment.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# How long an example takes says how busy the machine is: by default one of more than 200 ms fails its test.
hypothesis_settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("busy")


# What takes longest begins first, so that no process is left alone with it at the end. The first two are a whole stack.
_LONG = (
    *("acceptance/restores", "acceptance", "test_stack", "test_readme", "test_prefect_production", "test_crash_points"),
    *("test_flows", "test_crash_faults", "acceptance/test_alerts_live", "test_gateway_oidc"),
    *(
        "test_gateway_process",
        "test_rules",
        "acceptance/test_usage_chaos",
        "acceptance/test_canaries",
        "test_gateway_openapi",
        "test_objects_faults",
    ),
    *("test_restore_faults", "test_act", "test_gateway_routing", "test_gateway_tls", "test_playbook_workers"),
    *("test_gateway_ratelimit", "test_power_loss", "test_mcp_conformance", "test_environments"),
)
_OWN_STACK = ("acceptance/test_alerts_live", "acceptance/test_canaries", "acceptance/test_usage_chaos")
_RESTORES = (
    *("test_restore_cancel", "test_restore_under_load", "test_ui", "test_slo_report", "test_usage_flow"),
    "test_point_in_time",
)


def _scope(nodeid: str) -> str:
    """A file's tests stay in one process, and so do those that share a whole stack, of which there are two, and those
    that share a Prefect server."""
    file = nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")
    folder, _, name = file.rpartition("/")
    if folder != "acceptance" or file in _OWN_STACK:
        return "test_flows" if file.startswith("test_flows") else file
    return "acceptance/restores" if name.startswith(_RESTORES) else "acceptance"


# Marked `unit`: no test is by being forgotten. What they start beside PostgreSQL ends with the test that started it.
_UNIT = frozenset(
    f"test_{name}"
    for name in (
        *("auth", "backup", "batch", "bootstrap", "control_plane", "database", "database_creation"),
        *("deleted_tenant", "deletion", "diagnosis", "diagnosis_table", "docs", "drill", "durable", "engine", "expiry"),
        *("export", "gateway_busiest", "gateway_edge", "gateway_forward", "gateway_headers"),
        *("gateway_patience", "gateway_pool", "gateway_pool_writes", "gateway_proxy", "gateway_shed"),
        *("gateway_steering", "gateway_threads"),
        *("help", "ids", "imports", "issuer", "jwks", "lease", "limits", "litestream_settings", "local_objects", "log"),
        *("metering", "metering_dry_run", "metering_quarantine", "metering_stuck", "metrics", "monitoring", "move"),
        *("objects", "pack"),
        *("plan", "playbook", "recency", "reconcile", "registry", "restore", "restore_refusals", "retention"),
        *("safety", "selection", "settings", "slo", "snapshot", "spool", "spool_faults", "spool_frames"),
        *("spool_limit", "spool_model", "storage", "strays", "supply_licences", "sweep", "tenant", "usage"),
        *("usage_batch", "verify", "write_lock"),
    )
)
_SERVERS = frozenset(("stack", "s3", "alone", "running", "scraped", "limited", "layered", "subject", "worker"))
_UNIT_SECONDS = 30  # on a machine that does ten other things; nearly all take less than one


def _is_unit(item: pytest.Item) -> bool:
    parameters = getattr(item, "callspec", None)
    uses = {*getattr(item, "fixturenames", ()), *(map(str, parameters.params.values()) if parameters else ())}
    slow = item.get_closest_marker("slow") or _SERVERS & uses
    return _scope(item.nodeid) in _UNIT and not slow


class _ByFile(LoadScopeScheduling):
    """By `_scope`. (`--dist loadgroup` would be the plain way; with pytest 9.2 xdist 3.8 sets a group where pytest no
    longer reads it, and spreads every file.)"""

    def _split_scope(self, nodeid: str) -> str:
        return _scope(nodeid)


def pytest_configure(config: pytest.Config) -> None:
    trust_one(config)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing what `-m unit` leaves out would take longer than many of its tests, in each process."""
    others = config.option.markexpr == "unit" and collection_path.suffix == ".py"
    return True if others and collection_path.stem not in _UNIT and collection_path.stem != "conftest" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {scope: n for n, scope in enumerate(_LONG)}
    items.sort(key=lambda item: rank.get(_scope(item.nodeid), len(rank)))
    for item in items:
        if _is_unit(item):
            item.add_marker("unit")
            item.add_marker(pytest.mark.timeout(_UNIT_SECONDS))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: no collection of garbage need look at it, then or later."""
    with uncollected():
        return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    return _ByFile(config, log)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A started server; gone with its data when the session ends, so that it need not wait for the disk, nor be on one:
    a file system without a journal makes a file slowly where many were removed a minute before, as databases are."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > _MEMORY_FREE_BYTES:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="engram-tests-", dir=_MEMORY)))
        else:
            directory = tmp_path_factory.mktemp("postgres")
        with mock.patch.dict(configuration, fsync="off", max_wal_size="64MB"):
            made = EmbeddedPostgres(directory, port)
        yield stack.enter_context(made)


@pytest.fixture(scope="session")
def migrated_template(postgres: EmbeddedPostgres) -> EmbeddedPostgres:
    with psycopg.connect(postgres.url("postgres"), autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(_TEMPLATE)))
    with ControlPlane(Settings(control_plane_url=SecretStr(postgres.url(_TEMPLATE)))) as control_plane:
        control_plane.migrate()
    return postgres


@pytest.fixture
def control_plane_url(migrated_template: EmbeddedPostgres) -> Iterator[str]:
    """A fresh database with all migrations, copied from a template in a few milliseconds."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(migrated_template.url("postgres"), autocommit=True) as connection:
        create = sql.SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY")
        connection.execute(create.format(sql.Identifier(name), sql.Identifier(_TEMPLATE)))
        yield migrated_template.url(name)
        connection.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
