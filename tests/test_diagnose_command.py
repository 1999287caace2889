"""`engram diagnose` from a terminal: exit codes, JSON alone on stdout; it needs neither Prefect nor a stack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from shared import limits
from shared.playbook import jwks
from shared.playbook.action import Context, Request
from tests.core_fixtures import World
from tests.gateway_stack import Stack, stack  # noqa: F401

pytest_plugins = ("tests.core_fixtures",)


def engram(data_dir: Path, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
    environment |= {"ENGRAM_DATA_DIR": str(data_dir), "ENGRAM_GATEWAY_PORT": "9"} | settings
    command = [sys.executable, "-m", "deployments.cli", "diagnose", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_what_is_wrong_is_exit_code_1_and_the_proposal_is_on_stdout(tmp_path: Path) -> None:
    """Nothing runs here at all, Prefect neither: that is when it is needed."""
    done = engram(tmp_path, "latency")
    assert done.returncode == 1
    assert "NOT NORMAL" in done.stdout
    assert "engram status" in done.stdout
    document = json.loads(engram(tmp_path, "latency", "--json").stdout)
    assert (document["subject"], document["healthy"], document["proposal"]["action"]) == ("latency", False, "by-hand")


def test_an_unknown_subject_or_a_name_that_is_no_tenant_s_is_refused_in_one_line(tmp_path: Path) -> None:
    """A typing error at 3 a.m. must not look like a diagnosis."""
    assert engram(tmp_path, "everything").returncode == 2
    done = engram(tmp_path, "tenant-db", "../etc")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr


def test_a_tenant_nobody_knows_and_one_of_another_machine_are_not_diagnosed_here(world: World) -> None:
    """This machine's disk says nothing about either, and "missing" would propose a restore."""
    reach = {"ENGRAM_CONTROL_PLANE_URL": world.settings.control_plane_url.get_secret_value()}
    done = engram(world.settings.data_dir, "tenant-db", "nobody", **reach)
    assert (done.returncode, done.stdout) == (1, "")
    done = engram(world.settings.data_dir, "tenant-db", world.tenant_id, ENGRAM_MACHINE_ID="another", **reach)
    assert (done.returncode, done.stdout) == (3, "")


def test_a_healthy_gateway_is_exit_code_0_and_nothing_to_do(stack: Stack) -> None:  # noqa: F811
    """So that a script can ask."""
    # Other tests of this gateway break its issuer; its workers then say for a while that their last fetch failed.
    jwks.refresh(Context(stack.settings, None), Request("refresh-jwks", reason="a test"), None)
    limits.clear(stack.settings, "jwks_refresh")
    done = engram(
        stack.settings.data_dir,
        "auth",
        ENGRAM_GATEWAY_PORT=str(urlsplit(stack.gateway.url).port),
        ENGRAM_JWKS_URL=stack.issuer.url,
        ENGRAM_CONTROL_PLANE_URL=stack.control_plane_url,
    )
    assert "nothing to do" in done.stdout, done.stdout
    assert done.returncode == 0
