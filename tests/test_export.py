"""A tenant's data in a file: complete, whole or not there, and never in the place of another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.demo import corpus
from shared import export as module
from shared.engine import memories
from shared.engine.database import TenantDatabase
from shared.engine.memories import Changes, NewMemory
from shared.errors import CorruptBackup, Refused
from shared.export import Exported, Format
from tests.core_fixtures import World, contents_of, new_world, sha256_of

pytest_plugins = ("tests.core_fixtures",)


@pytest.fixture
def filled(world: World) -> World:
    """Memories with tags, metadata, text of all sorts, and one that was updated twice."""
    world.write("one", "zwei\n“quoted” 🍞", "three")
    database = TenantDatabase(world.paths)
    with database.write() as connection:
        made = memories.create(connection, NewMemory("v1", "fact", ["a", "b"], {"deep": {"n": [1, None]}}, 0.9))
        memories.update(connection, made.id, Changes(content="v2", tags=["b"]))
        memories.update(connection, made.id, Changes(content="v3"))
    database.close()
    return world


def export(world: World, path: Path, format: Format, backup_id: str | None = None) -> Exported:
    return module.export(
        world.settings, world.control_plane, world.objects, world.tenant_id, path, format=format, backup_id=backup_id
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_hold_every_memory_and_its_earlier_states(filled: World, tmp_path: Path) -> None:
    """Also for the tool that reads them back, and for the demo."""
    path = tmp_path / "out.jsonl"
    done = export(filled, path, "jsonl")
    found = lines(path)
    assert [m["content"] for m in found] == filled.rows()
    assert (done.memories, done.versions, done.sha256) == (4, 2, sha256_of(path))
    last = found[-1]
    assert (last["tags"], last["metadata"], last["memory_type"], last["importance"], last["version"]) == (
        *(["b"], {"deep": {"n": [1, None]}}, "fact", 0.9, 3),
    )
    assert [(v["version"], v["content"], v["tags"]) for v in last["versions"]] == [
        *((1, "v1", ["a", "b"]), (2, "v2", ["b"])),
    ]
    assert all(m["versions"] == [] for m in found[:-1])
    assert [m["content"] for m in corpus.load([path])[0].memories] == filled.rows()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [p.name for p in tmp_path.iterdir() if "export" in p.name] == []


def test_what_was_exported_can_be_written_into_a_new_tenant(filled: World, tmp_path: Path) -> None:
    """Leaving for another service and coming back is the same thing."""
    export(filled, tmp_path / "out.jsonl", "jsonl")
    url = filled.settings.control_plane_url.get_secret_value()
    other = new_world(tmp_path / "other", url, filled.control_plane)
    database = TenantDatabase(other.paths)
    with database.write() as connection:
        for memory in lines(tmp_path / "out.jsonl"):
            fields = ("content", "memory_type", "tags", "metadata", "importance")
            memories.create(connection, NewMemory(**{name: memory[name] for name in fields}))
    database.close()
    export(other, tmp_path / "again.jsonl", "jsonl")
    fresh = ("id", "created_at", "updated_at", "version", "versions")
    first, second = (
        [{k: v for k, v in m.items() if k not in fresh} for m in lines(tmp_path / name)]
        for name in ("out.jsonl", "again.jsonl")
    )
    assert first == second


def test_sqlite_is_a_snapshot_and_a_backup_is_exported_as_it_was(filled: World, tmp_path: Path) -> None:
    """Any SQLite opens it; from a backup it is its very bytes, whatever was written since."""
    made = filled.back_up()
    filled.write("later")
    live = export(filled, tmp_path / "live.sqlite", "sqlite")
    old = export(filled, tmp_path / "old.sqlite", "sqlite", str(made.backup_id))
    export(filled, tmp_path / "old.jsonl", "jsonl", str(made.backup_id))
    assert (old.sha256, old.ts, old.backup_id) == (made.sha256, made.ts, made.backup_id)
    assert sha256_of(live.path) == live.sha256
    assert contents_of(live.path) == filled.rows()
    assert [m["content"] for m in lines(tmp_path / "old.jsonl")] == filled.rows()[:-1]


def test_nothing_is_overwritten_and_a_failure_leaves_nothing(filled: World, tmp_path: Path) -> None:
    """An export that ends in the middle must not look like one."""
    path = tmp_path / "mine"
    path.write_text("mine")
    with pytest.raises(Refused, match="exists"):
        export(filled, path, "jsonl")
    assert path.read_text() == "mine"
    made = filled.back_up()
    data = bytearray(filled.object_path(made).read_bytes())
    data[len(data) // 2] ^= 1
    filled.object_path(made).write_bytes(data)
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptBackup):
        export(filled, tmp_path / "out" / "file", "sqlite", str(made.backup_id))
    assert list((tmp_path / "out").iterdir()) == []
