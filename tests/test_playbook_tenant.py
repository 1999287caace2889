"""Permissions of a tenant's files, and what a restore would bring back: on a real tenant's directory."""

from __future__ import annotations

import os
import stat
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared import backup
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import NewMemory
from shared.errors import Refused
from shared.objects import ObjectStore
from shared.playbook import file_tree, permissions
from shared.playbook.action import BadRequest
from shared.settings import Settings
from shared.tenant import TenantPaths
from tests.gateway_stack import Stack, stack  # noqa: F401
from tests.playbook_fixtures import ask, newest, settings  # noqa: F401

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="changing owners needs root")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_wrong_owners_and_modes_are_found_fixed_and_put_back(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """Found as what they are, fixed where they are, verified by a transaction; its undo restores each of them."""
    tenant = stack.tenant()
    paths = TenantPaths.of(settings.tenants_dir, tenant)
    file = Path(os.path.realpath(paths.database))
    assert ask(stack, settings, "check-permissions", tenant).summary.startswith("0 of ")
    os.chown(file, 12345, 54321)
    file.chmod(0o466)
    paths.generations.chmod(0o777)
    paths.root.chmod(0o755)
    seen = ask(stack, settings, "check-permissions", tenant)
    wrong = {row["path"]: (row["owner"], row["mode"]) for row in seen.tables["wrong"]}
    assert wrong[f"generations/{file.parent.name}/engram.db"] == ("12345:54321", "0466")
    assert {wrong["."][1], wrong["generations"][1]} == {"0755", "0777"} and len(wrong) == 3
    assert seen.proposal[:4] == ["engram", "act", "fix-permissions", tenant]
    tried = ask(stack, settings, "fix-permissions", tenant, dry_run=True)
    assert len(tried.after) == 3 and mode(file) == 0o466 and not tried.undo
    done = ask(stack, settings, "fix-permissions", tenant)
    assert done.verified and len(done.before) == 3
    assert mode(file) == 0o644 and file.stat().st_uid == settings.tenants_dir.stat().st_uid
    assert (mode(paths.root), mode(paths.generations)) == (0o700, 0o755)
    assert ask(stack, settings, "fix-permissions", tenant).after == [], "twice is once"
    assert done.undo[:6] == ["engram", "act", "fix-permissions", tenant, "--put-back", done.action_id]
    undone = ask(stack, settings, "fix-permissions", tenant, put_back=done.action_id)
    assert undone.verified and (mode(file), file.stat().st_uid) == (0o466, 12345)
    assert newest(stack)["arguments"] == {"put_back": done.action_id}
    assert ask(stack, settings, "fix-permissions", tenant).verified
    with pytest.raises(BadRequest):
        ask(stack, settings, "fix-permissions", stack.idle_tenant, put_back=done.action_id)


def test_nothing_outside_of_the_directory_is_ever_touched(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Links to files and directories elsewhere, second names of files elsewhere; a tenant directory that is a link."""
    tenant = stack.tenant()
    root = TenantPaths.of(settings.tenants_dir, tenant).root
    secret, folder = settings.data_dir / "secret", settings.data_dir / "folder"
    secret.write_text("x")
    folder.mkdir(exist_ok=True)
    (folder / "inside").write_text("x")
    for path in (secret, folder / "inside", folder):
        path.chmod(0o666)
    (root / "link").symlink_to(secret)
    (root / "folder").symlink_to(folder)
    (root / "second-name").hardlink_to(secret)
    os.mkfifo(root / "pipe", 0o666)
    seen = ask(stack, settings, "check-permissions", tenant)
    assert {row["path"] for row in seen.tables["left alone"]} == {"second-name", "pipe"}
    ask(stack, settings, "fix-permissions", tenant)
    assert [mode(path) for path in (secret, folder / "inside", folder)] == [0o666] * 3
    moved = tmp_path / "moved"
    other = stack.tenant()
    home = TenantPaths.of(settings.tenants_dir, other).root
    home.rename(moved)
    home.symlink_to(moved)
    moved.chmod(0o777)
    with pytest.raises(Refused, match="not followed"):
        ask(stack, settings, "fix-permissions", other)
    assert mode(moved) == 0o777
    for path in (secret, folder / "inside"):
        path.unlink()


def test_an_entry_that_was_exchanged_meanwhile_is_left_alone(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
) -> None:
    """Between the look and the change a file may become a link to somewhere else: what was seen is what is changed."""
    tenant = stack.tenant()
    paths = TenantPaths.of(settings.tenants_dir, tenant)
    elsewhere = settings.data_dir / "elsewhere"
    elsewhere.write_text("x")
    elsewhere.chmod(0o666)
    (paths.root / "victim").write_text("x")
    entry = next(e for e in file_tree.walk(paths) if e.path == "victim")
    (paths.root / "victim").unlink()
    (paths.root / "victim").symlink_to(elsewhere)
    assert permissions._apply(paths, [(entry, 0, 0, 0o600)]) == 0
    (paths.root / "victim").unlink()
    (paths.root / "victim").write_text("another")
    (paths.root / "victim").chmod(0o666)
    done = permissions._apply(paths, [(entry, 0, 0, 0o600)])
    assert done == 0 or (paths.root / "victim").stat().st_ino == entry.inode  # an inode may be given out again
    assert mode(elsewhere) == 0o666
    elsewhere.unlink()


def test_looking_at_a_live_databases_files_does_not_drop_its_locks(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """POSIX locks go with any close() of the file in the same process (FACTS): here the checks run beside a writer of
    this very process, whose lock a second process must go on seeing."""
    tenant = stack.tenant()
    paths = TenantPaths.of(settings.tenants_dir, tenant)
    file = Path(os.path.realpath(paths.database))
    with closing(TenantDatabase(paths)) as database, database.write() as connection:
        memories.create(connection, NewMemory("held"))
        before = _locks(file)
        entries = list(file_tree.walk(paths))
        permissions._apply(paths, [(e, e.uid, e.gid, e.mode) for e in entries if e.type == "file"])
        assert before and _locks(file) == before


def _locks(file: Path) -> list[str]:
    """The kernel's POSIX locks of this process on that database and its files."""
    inodes = {str(f.stat().st_ino) for f in file.parent.iterdir()}
    lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return sorted(" ".join(line[1:]) for line in lines if line[1] == "POSIX" and line[5].rpartition(":")[2] in inodes)


def test_a_whole_database_wants_no_restore_and_a_corrupt_one_gets_a_proposal(
    stack: Stack,  # noqa: F811
    settings: Settings,  # noqa: F811
) -> None:
    """Which backup, and how many memories would be lost; nothing is restored."""
    tenant = stack.tenant()
    paths = TenantPaths.of(settings.tenants_dir, tenant)
    whole = ask(stack, settings, "propose-restore", tenant)
    assert whole.summary == "the database is whole: nothing to restore" and not whole.proposal
    with closing(TenantDatabase(paths)) as database:
        with database.write() as connection:
            for n in range(200):
                memories.create(connection, NewMemory(f"memory {n} " + "x" * 500))
        stored = _backed_up(stack, settings, tenant)
        with database.write() as connection:
            memories.create(connection, NewMemory("after the backup"))
    good = ask(stack, settings, "propose-restore", tenant)
    seen = {finding.name: finding.seen for finding in good.findings}
    assert seen["memories changed since, which would be lost"] == 1 and not good.proposal
    file = Path(os.path.realpath(paths.database))
    with file.open("r+b") as raw:
        raw.seek(4096)
        raw.write(os.urandom(file.stat().st_size - 8192))
    (file.parent / "engram.db-wal").unlink(missing_ok=True)
    found = ask(stack, settings, "propose-restore", tenant)
    assert found.summary.startswith("corrupt: restore the backup of")
    assert found.proposal[:5] == ["engram", "restore", tenant, "--backup", stored]


def test_a_corrupt_database_without_a_backup_is_told_as_that(stack: Stack, settings: Settings) -> None:  # noqa: F811
    """There is nothing to propose, and it says so."""
    tenant = stack.tenant()
    file = Path(os.path.realpath(TenantPaths.of(settings.tenants_dir, tenant).database))
    file.write_bytes(b"not a database" * 1000)
    found = ask(stack, settings, "propose-restore", tenant)
    assert "there is no good backup" in found.summary and not found.proposal


def _backed_up(stack: Stack, settings: Settings, tenant_id: str) -> str:  # noqa: F811
    began = datetime.now(UTC)
    with backup.work(settings.data_dir / "tmp", "test") as directory:
        snapshot = backup.take(settings, tenant_id, directory)
        stored = backup.store(ObjectStore(settings), snapshot, stack.control_plane, kind="manual")
    row = backup.register(stack.control_plane, stored, kind="manual")
    assert row.ts >= began
    return str(row.backup_id)
