"""Packed backups: what is stored is packed as asked, opens with public tools, and comes back as it was."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyrage
import pytest
import zstandard
from msgspec import structs

from shared import backup, catalogue, keys, pack
from shared.catalogue import Backup
from shared.errors import CorruptBackup, KeyUnavailable, NoSpace
from shared.pack import Packing
from shared.tenant import parse_object_key
from tests.core_fixtures import World, contents_of, sha256_of

pytest_plugins = ("tests.core_fixtures",)

PACKINGS = {"none": "", "zstd": ".zst", "age": ".age", "zstd+age": ".zst.age"}


def packed(world: World, packing: str, **more: object) -> World:
    """The same tenant, packing like this from now on."""
    values = {
        "backup_compression": "zstd" if "zstd" in packing else "none",
        "backup_encryption": "age" if "age" in packing else "none",
        "backup_master_key": MASTER,
        **more,
    }
    return world.change(**values)


def fetch(world: World, made: Backup, name: str = "back.sqlite") -> Path:
    destination = world.settings.data_dir / name
    backup.fetch(world.objects, made, destination, world.control_plane)
    return destination


MASTER = str(pyrage.x25519.Identity.generate())


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_backup_comes_back_as_it_was_however_it_is_packed(world: World, packing: str) -> None:
    """The catalogue says the plain file's sha256 and size, and the object's; the key says what opens it."""
    packed(world, packing)
    world.write("one", "two " * 1000)
    made = world.back_up()
    assert made.packing == packing
    assert made.key.endswith(f"_v{made.schema_version}.sqlite{PACKINGS[packing]}")
    parts = parse_object_key(made.key)
    assert parts is not None and parts.ts == made.ts
    stored = world.object_path(made)
    assert (made.stored_sha256, made.stored_bytes) == (sha256_of(stored), stored.stat().st_size)
    file = fetch(world, made)
    assert (made.sha256, made.size_bytes) == (sha256_of(file), file.stat().st_size)
    assert contents_of(file) == ["one", "two " * 1000]
    assert (made.key_id is not None) == ("age" in packing)
    assert [p.name for p in world.settings.data_dir.glob("*.sqlite*")] == ["back.sqlite"]


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p != "none"])
def test_a_packed_backup_opens_with_public_tools_alone(world: World, tmp_path: Path, packing: str) -> None:
    """Whoever holds the master key and the bucket needs nothing of this product."""
    for tool in ("zstd", "age"):
        if shutil.which(tool) is None:
            pytest.skip(f"no `{tool}`: apt-get install {tool}")
    packed(world, packing)
    world.write("one")
    made = world.back_up()
    master, wrapped, tenant = tmp_path / "master.key", tmp_path / "tenant.key.age", tmp_path / "tenant.key"
    stored, plain = world.object_path(made), tmp_path / "plain.sqlite"
    if "age" in packing:
        master.write_text(MASTER)
        row = world.control_plane.row("tenant_key_get", key_id=made.key_id)
        assert row is not None
        wrapped.write_bytes(row["wrapped"])
        run("age", "--decrypt", "-i", master, "-o", tenant, wrapped)
        opened = tmp_path / "opened"
        run("age", "--decrypt", "-i", tenant, "-o", opened, stored)
        stored = opened
    if "zstd" in packing:
        run("zstd", "-q", "-d", "-o", plain, stored)
        stored = plain
    assert sha256_of(stored) == made.sha256
    assert contents_of(stored) == ["one"]


def run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=30)


def test_nothing_of_the_content_or_of_a_key_can_be_read_from_an_encrypted_object(world: World) -> None:
    """Neither in the object nor in the control plane does a key lie open."""
    packed(world, "age")
    world.write("a sentence nobody else may read")
    made = world.back_up()
    row = world.control_plane.row("tenant_key_get", key_id=made.key_id)
    assert row is not None
    for data in (world.object_path(made).read_bytes(), row["wrapped"], repr(row).encode(), repr(made).encode()):
        assert b"nobody else" not in data and b"AGE-SECRET-KEY" not in data
    assert b"SQLite format" not in world.object_path(made).read_bytes()
    assert MASTER not in repr(world.settings)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("damage", ["flipped at the start", "flipped in the middle", "cut", "longer", "empty"])
def test_a_damaged_object_is_a_corrupt_backup_and_leaves_no_file(world: World, packing: str, damage: str) -> None:
    """However it is packed, what reaches a restore has the catalogue's sha256 or does not exist."""
    packed(world, packing)
    world.write(*(f"{n} " + "x" * 400 for n in range(100)))
    made = world.back_up()
    stored = world.object_path(made)
    data = bytearray(stored.read_bytes())
    at = 40 if "start" in damage else len(data) // 2
    data[at] ^= 0x10
    whole = stored.read_bytes()
    changed = {"cut": whole[:-40], "longer": whole + whole[:40], "empty": b""}.get(damage, bytes(data))
    stored.write_bytes(changed)
    with pytest.raises(CorruptBackup):
        fetch(world, made)
    assert not (world.settings.data_dir / "back.sqlite").exists()


def test_another_tenants_object_under_the_key_is_a_corrupt_backup(world: World) -> None:
    """Objects that were swapped in the bucket do not reach the wrong tenant."""
    packed(world, "zstd+age")
    world.write("one")
    made, other = world.back_up(), world.back_up()
    keys.rotate(world.control_plane, world.settings, world.tenant_id)
    newer = world.back_up()
    for theirs in (other, newer):
        world.object_path(made).write_bytes(world.object_path(theirs).read_bytes())
        if theirs is newer or theirs.sha256 != made.sha256:
            with pytest.raises(CorruptBackup):
                fetch(world, made)


def test_a_frame_that_unpacks_to_more_than_the_catalogue_says_is_stopped(world: World) -> None:
    """A few kilobytes in the bucket must not fill a disk."""
    packed(world, "zstd")
    made = world.back_up()
    world.object_path(made).write_bytes(zstandard.ZstdCompressor().compress(bytes(200 << 20)))
    with pytest.raises(CorruptBackup, match="more than"):
        fetch(world, made)


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p != "none"])
def test_what_a_thread_of_its_own_writes_is_as_it_was_or_fails_as_it_would_have(
    world: World, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is hashed and written while the next bytes are decrypted: nothing may be lost between the two."""
    monkeypatch.setattr(pack, "_LARGE_BYTES", 0)
    packed(world, packing)
    world.write(*(f"{n} " + os.urandom(2000).hex() for n in range(2000)))
    made = world.back_up()
    told: list[int] = []
    destination = world.settings.data_dir / "back.sqlite"
    got = backup.fetch(world.objects, made, destination, world.control_plane, progress=told.append)
    assert sha256_of(destination) == made.sha256
    assert told == sorted(told) and told[-1] == got.size_bytes == made.size_bytes
    with pytest.raises(CorruptBackup, match="more than"):
        fetch(world, structs.replace(made, size_bytes=made.size_bytes - 1))
    with pytest.raises(CorruptBackup, match="sha256"):
        fetch(world, structs.replace(made, sha256="0" * 64))
    destination.unlink(missing_ok=True)
    destination.symlink_to("/dev/full")
    with pytest.raises(NoSpace):
        fetch(world, made)
    whole = world.object_path(made).read_bytes()
    world.object_path(made).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CorruptBackup):
        fetch(world, made)
    assert not destination.exists() and not destination.is_symlink()
    assert not [t for t in threading.enumerate() if t.name == "sink"]


def test_without_the_right_master_key_nothing_is_stored_plain_and_nothing_is_called_corrupt(world: World) -> None:
    """A lost key is an operator's problem: loud, permanent, and no statement about the objects."""
    packed(world, "zstd+age")
    made = world.back_up()
    other = keys.new_master()[0]
    for master, says in (("", "not set"), (other, "not opened"), ("AGE-SECRET-KEY-1NONSENSE", "not an age identity")):
        packed(world, "zstd+age", backup_master_key=master)
        with pytest.raises(KeyUnavailable, match=says) as failed:
            world.back_up()
        with pytest.raises(KeyUnavailable, match=says):
            fetch(world, made)
        assert not master or master not in "".join(traceback.format_exception(failed.value))
    with pytest.raises(KeyUnavailable, match="not given"):
        backup.store(world.objects, backup.take(world.settings, world.tenant_id, world.settings.data_dir))
    assert world.objects.keys("tenants") == [made.key]
    assert catalogue.list_of(world.control_plane, world.tenant_id) == [made]
    packed(world, "none")
    assert contents_of(fetch(world, made)) == []  # how new backups are packed says nothing about old ones


def test_a_wrapped_key_of_another_tenant_or_recipient_is_refused(world: World) -> None:
    """Who can write the control plane must not be able to redirect a tenant's backups to a key of theirs."""
    packed(world, "age")
    made = world.back_up()
    own = pyrage.x25519.Identity.generate()
    with world.control_plane.transaction() as connection:
        connection.execute(
            "UPDATE tenant_keys SET recipient = %s WHERE key_id = %s", (str(own.to_public()), made.key_id)
        )
    with pytest.raises(KeyUnavailable, match="recipient"):
        world.back_up()
    forged = pyrage.encrypt(f"# tenant: x\n# key: {made.key_id}\n{own}\n".encode(), [own_master().to_public()])
    with world.control_plane.transaction() as connection:
        connection.execute("UPDATE tenant_keys SET wrapped = %s WHERE key_id = %s", (forged, made.key_id))
    with pytest.raises(KeyUnavailable, match="somebody else"):
        world.back_up()


def own_master() -> pyrage.x25519.Identity:
    return pyrage.x25519.Identity.from_str(MASTER)


def test_a_tenants_new_key_is_for_new_backups_and_old_ones_stay_readable(world: World) -> None:
    """Rotation is not a migration of a thousand objects."""
    packed(world, "age")
    before = world.back_up()
    rotated = keys.rotate(world.control_plane, world.settings, world.tenant_id)
    after = world.back_up()
    assert (before.key_id, after.key_id) != (after.key_id, before.key_id)
    assert after.key_id == rotated.key_id
    for made in (before, after):
        assert contents_of(fetch(world, made)) == []
    assert [row["key_id"] for row in keys.list_of(world.control_plane, world.tenant_id)] == [
        after.key_id,
        before.key_id,
    ]


def test_a_master_key_is_rotated_by_wrapping_every_key_anew(world: World) -> None:
    """While it goes on both keys serve; afterwards the old one opens nothing and is not needed."""
    packed(world, "age")
    made = world.back_up()
    new = keys.new_master()[0]
    packed(world, "age", backup_master_key=new, backup_master_keys_older=f"{keys.new_master()[0]}, {MASTER}")
    assert contents_of(fetch(world, made)) == []
    mine = {row["key_id"] for row in keys.list_of(world.control_plane, world.tenant_id)}
    done = keys.rewrap(world.control_plane, world.settings)
    assert done.rewrapped >= len(mine) and not mine & set(done.failed)
    assert keys.rewrap(world.control_plane, world.settings).rewrapped == 0
    packed(world, "age", backup_master_key=new, backup_master_keys_older="")
    assert contents_of(fetch(world, made)) == []
    packed(world, "age")
    with pytest.raises(KeyUnavailable):
        fetch(world, made)


def test_erasing_a_tenants_keys_makes_its_backups_unreadable_for_everybody(world: World) -> None:
    """Copies of the objects may lie anywhere; without the key they are noise."""
    packed(world, "zstd+age")
    made = world.back_up()
    assert keys.erase(world.control_plane, world.tenant_id) == (made.key_id,)
    assert keys.list_of(world.control_plane, world.tenant_id) == []
    with pytest.raises(KeyUnavailable, match="erased"):
        fetch(world, made)
    assert keys.erase(world.control_plane, world.tenant_id) == ()


def test_two_first_backups_at_once_agree_on_one_key(world: World) -> None:
    """Two current keys would be a lottery."""
    packed(world, "age")
    with ThreadPoolExecutor(4) as pool:
        made = list(
            pool.map(lambda _: keys.current(world.control_plane, world.settings, world.tenant_id).key_id, range(8))
        )
    assert len(set(made)) == 1


def test_a_full_disk_while_packing_or_unpacking_is_no_space(tmp_path: Path) -> None:
    """Not a corrupt backup: the object is whole, this machine is full."""
    plain = tmp_path / "plain"
    plain.write_bytes(os.urandom(1 << 20))
    full = tmp_path / "full"  # a link: the file that could not be written is removed
    full.symlink_to("/dev/full")
    with pytest.raises(NoSpace):
        pack.pack(plain, full, Packing(zstd=True, age=False, level=1))
    with pytest.raises(NoSpace):
        pack.receive([plain.read_bytes()], full, "0" * 64, name="x")
    assert not full.is_symlink()


def test_the_command_line_rotates_keys_and_says_what_could_not_be(world: World) -> None:
    """The runbook's commands, as an operator types them; the keys come from the environment, never from argv."""
    packed(world, "age")
    made = world.back_up()

    def engram(*words: str, **keys_given: str) -> subprocess.CompletedProcess[str]:
        variables = {
            "ENGRAM_DATA_DIR": str(world.settings.data_dir),
            "ENGRAM_CONTROL_PLANE_URL": world.settings.control_plane_url.get_secret_value(),
            **{f"ENGRAM_BACKUP_{name.upper()}": value for name, value in keys_given.items()},
        }
        command = [sys.executable, "-m", "deployments.cli", "keys", *words]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60)

    new = engram("new").stdout.strip()
    rotated = engram("rotate", world.tenant_id, "--json", master_key=MASTER)
    assert rotated.returncode == 0, rotated.stderr
    assert json.loads(rotated.stdout)["key_id"] != str(made.key_id)
    listed = json.loads(engram("list", world.tenant_id, "--json").stdout)
    assert [row["backups"] for row in listed] == [0, 1]
    refused = engram("rotate", "--json", master_key=new)
    assert refused.returncode == 1 and str(made.key_id) in json.loads(refused.stdout)["failed"]
    engram("rotate", master_key=new, master_keys_older=MASTER)
    packed(world, "age", backup_master_key=new)
    assert contents_of(fetch(world, made)) == []
    assert new not in refused.stdout + refused.stderr


def test_what_threads_compressed_is_one_frame_that_anybody_opens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is compressed by several threads; who opens it must not need to know."""
    monkeypatch.setattr(pack, "_ASIDE_BYTES", 1 << 20)
    plain = os.urandom(3 << 20).hex().encode()
    source = tmp_path / "plain"
    source.write_bytes(plain)
    packed = pack.pack(source, tmp_path / "packed.zst", Packing(zstd=True, age=False, level=3))
    frame = packed.path.read_bytes()
    assert zstandard.get_frame_parameters(frame).has_checksum and zstandard.frame_content_size(frame) == len(plain)
    assert zstandard.ZstdDecompressor().decompress(frame) == plain, "one frame, and the whole of it"
    assert sha256_of(packed.path) == packed.sha256
