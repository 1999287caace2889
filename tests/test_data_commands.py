"""`engram tenant delete` and `engram export` as a script uses them: exit codes, one line of cause, JSON on stdout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from shared import registry
from shared.fence import RestoreMutex
from tests.core_fixtures import ROOT, World, sha256_of

pytest_plugins = ("tests.core_fixtures",)


def engram(world: World, *words: object) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ENGRAM_", "PREFECT_"))}
    given = {
        "ENGRAM_DATA_DIR": str(world.settings.data_dir),
        "ENGRAM_CONTROL_PLANE_URL": world.settings.control_plane_url.get_secret_value(),
        "ENGRAM_LOG_LEVEL": "error",
    }
    return subprocess.run(
        [sys.executable, "-m", "deployments.cli", *map(str, words)],
        env=kept | given, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line on stderr of a command that did not do it; nothing is on stdout."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert code == 2 or (done.stderr.startswith("engram: ") and done.stderr.count("\n") == 1), done.stderr
    return done.stderr


def test_a_deletion_that_is_not_meant_or_not_safe_exits_3_and_changes_nothing(world: World) -> None:
    """There is no way back: the id must be typed twice, and a restore that runs is in the way."""
    world.write("kept")
    tenant = world.tenant_id
    assert f"--confirm {tenant}" in refused(engram(world, "tenant", "delete", tenant, "--reason", "r"), 3)
    assert refused(engram(world, "tenant", "delete", tenant, "--reason", "r", "--confirm", f"{tenant}x"), 3)
    assert refused(engram(world, "tenant", "delete", tenant, "--yes"), 2), "a reason is part of the receipt"
    assert "unknown" not in refused(engram(world, "tenant", "delete", "never-created", "--reason", "r", "--yes"), 1)
    mutex = RestoreMutex(world.paths)
    try:
        said = refused(engram(world, "tenant", "delete", tenant, "--reason", "r", "--yes"), 3)
    finally:
        mutex.release()
    assert "nothing was deleted" in said
    assert world.rows() == ["kept"] and registry.get(world.control_plane, tenant).state == "active"


def test_a_deletion_that_is_done_exits_0_with_its_receipt_alone_on_stdout(world: World) -> None:
    """What a script keeps is the receipt; a dry run before it lists the same things."""
    world.write("gone")
    world.back_up()
    tenant = world.tenant_id
    dry = engram(world, "tenant", "delete", tenant, "--reason", "r", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    assert len(json.loads(dry.stdout)["objects"]) == 1 and world.rows() == ["gone"]
    done = engram(world, "tenant", "delete", tenant, "--reason", "contract ended", "--confirm", tenant, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["erased"] is True and not world.paths.root.exists()


def test_an_export_says_by_its_exit_code_why_it_wrote_nothing(world: World, tmp_path: Path) -> None:
    """1: there is nothing to write, or nowhere; 2: asked wrongly; 3: it would have replaced a file."""
    world.write("one", "two")
    taken, out = tmp_path / "taken.jsonl", tmp_path / "out.jsonl"
    taken.write_text("somebody's")
    tenant = world.tenant_id

    def export(of: str, path: Path, *more: str) -> subprocess.CompletedProcess[str]:
        return engram(world, "export", of, "--out", path, "--format", "jsonl", *more)

    assert "exists already" in refused(export(tenant, taken), 3)
    assert "not a directory" in refused(export(tenant, tmp_path / "none" / "x"), 1)
    assert refused(export("never-created", out), 1)
    assert refused(export(tenant, out, "--format", "csv"), 2)
    assert refused(export(tenant, out, "--backup", "no-id"), 1)
    assert taken.read_text() == "somebody's" and not out.exists()
    done = export(tenant, out, "--json")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert (printed["memories"], printed["sha256"]) == (2, sha256_of(out))
