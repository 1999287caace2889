"""Limits that change at run time: one file, written whole, that expires by itself and never breaks a worker."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shared import limits
from shared.errors import Permanent
from shared.limits import Limits, Rate, Watch, active, clear, path_of, set_limit
from shared.log import configure
from shared.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(data_dir=tmp_path)


def test_a_limit_is_seen_by_everybody_who_polls_until_it_is_cleared(settings: Settings) -> None:
    """Each watch has its own view, its listener is told of each change once."""
    watches, told = [Watch(settings), Watch(settings)], []
    for watch in watches:
        watch.poll()
        watch.listen(told.append)
        assert watch.now == Limits()
    set_limit(settings, "rate_limit:acme", {"rps": 5, "burst": 10, "search_rps": 1}, ttl_seconds=60, reason="abuse")
    set_limit(settings, "shed", ["search", "list"], ttl_seconds=60, reason="overload")
    for watch in watches:
        watch.poll()
        watch.poll()
        assert watch.now.tenant_rates == {"acme": Rate(5, 10, search_rps=1)}
        assert watch.now.shed == {"search", "list"}
    assert told == [w.now for w in watches]
    assert active(settings)["shed"].reason == "overload"
    assert clear(settings, "shed") and not clear(settings, "shed")
    watches[0].poll()
    assert watches[0].now.shed == frozenset() and watches[1].now.shed


def test_a_limit_ends_by_itself(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to write the file again, and the next change drops what has expired from it."""
    now = [time.time()]
    monkeypatch.setattr("shared.limits.time", SimpleNamespace(time=lambda: now[0]))
    watch = Watch(settings)
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    set_limit(settings, "rate_limit_mode", "shadow", ttl_seconds=90, reason="r")
    now[0] += 59
    watch.poll()
    assert (watch.now.pool_size, watch.now.rate_limit_mode) == (7, "shadow")
    now[0] += 2
    watch.poll()
    assert (watch.now.pool_size, watch.now.rate_limit_mode) == (None, "shadow")
    clear(settings, "shed")
    assert b"pool_size" not in path_of(settings).read_bytes()


def test_a_clock_that_jumps_ahead_and_back_ends_no_limit(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever set it was told that it holds until its end. Each way is a change for those who listen."""
    watch, told = Watch(settings), []
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    watch.poll()
    watch.listen(told.append)
    version = watch.version
    with monkeypatch.context() as patch:
        ahead = time.time() + 3_600
        patch.setattr(limits.time, "time", lambda: ahead)
        watch.poll()
        assert watch.now == Limits() and watch.version != version
    watch.poll()
    assert watch.now == Limits(pool_size=7) and watch.version == version
    assert told == [Limits(pool_size=7), Limits(), Limits(pool_size=7)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speed", 1),
        ("rate_limit", 5),
        ("rate_limit", {"rps": -1}),
        ("rate_limit", {"rps": float("inf")}),
        ("rate_limit", {"rps": "5"}),
        ("rate_limit", {"rps": 5, "brust": 1}),
        ("rate_limit:../etc", {"rps": 5}),
        ("rate_limit:", {"rps": 5}),
        ("rate_limit_mode", "strict"),
        ("shed", ["health"]),
        ("shed", "search"),
        ("pool_size", 0),
        ("jwks_refresh", False),
    ],
)
def test_what_makes_no_sense_is_refused_before_it_is_written(settings: Settings, name: str, value: Any) -> None:
    """A typing mistake at three in the morning must not become the absence of a limit."""
    with pytest.raises(Permanent):
        set_limit(settings, name, value, ttl_seconds=60, reason="r")
    assert active(settings) == {}


@pytest.mark.parametrize(("ttl_seconds", "reason"), [(0, "r"), (-1, "r"), (8 * 86_400, "r"), (60, " ")])
def test_a_limit_needs_an_end_and_a_reason(settings: Settings, ttl_seconds: float, reason: str) -> None:
    """Without either it would outlive everybody who knows why."""
    with pytest.raises(Permanent):
        set_limit(settings, "pool_size", 5, ttl_seconds=ttl_seconds, reason=reason)


def test_a_limit_that_some_workers_might_not_see_is_refused(settings: Settings) -> None:
    """Each looks every so often: what ends before its turn it never obeys, and nobody would know."""
    for poll_seconds in (0.05, 0.25, 30):
        configured = settings.model_copy(update={"limits_poll_seconds": poll_seconds})
        for ttl_seconds in (0.1 * poll_seconds, 2 * poll_seconds):
            with pytest.raises(limits.BadLimit, match=f"at least {4 * poll_seconds:g}, or not every worker"):
                set_limit(configured, "jwks_refresh", True, ttl_seconds=ttl_seconds, reason="r")
        assert active(settings) == {}
        set_limit(configured, "jwks_refresh", True, ttl_seconds=4 * poll_seconds, reason="r")
        clear(settings, "jwks_refresh")


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"entries": 5}', b"\xff", b"[" * 100_000])
def test_a_damaged_file_changes_nothing_for_workers_and_is_named_to_the_operator(
    settings: Settings, damage: bytes
) -> None:
    """Workers keep what they have; a writer does not overwrite what it cannot read."""
    watch = Watch(settings)
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    watch.poll()
    path_of(settings).write_bytes(damage)
    watch.poll()
    assert watch.now.pool_size == 7
    with pytest.raises(Permanent, match=r"limits\.json"):
        set_limit(settings, "pool_size", 8, ttl_seconds=60, reason="r")
    path_of(settings).unlink()
    watch.poll()
    assert watch.now == Limits()


def test_a_worker_that_starts_while_the_file_is_damaged_obeys_what_the_others_do(
    settings: Settings, capfd: pytest.CaptureFixture[str]
) -> None:
    """The copy says it, to the operator too. Whoever sets the file right decides what holds: the copy in its place, or
    none at all."""
    configure()
    older = Watch(settings)
    set_limit(settings, "shed", ["search"], ttl_seconds=60, reason="r")
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    clear(settings, "shed")
    older.poll()
    path_of(settings).write_bytes(b"{")
    newer = Watch(settings)
    for watch in (older, newer):
        watch.poll()
        assert watch.now == Limits(pool_size=7)
    assert newer.version == older.version
    assert capfd.readouterr().err.count("limits_unread") == 2
    found, damage = limits.standing(settings)
    assert found.keys() == {"pool_size"} and "limits.copy.json" in damage and limits.version_of(found) == newer.version
    path_of(settings).write_bytes(limits.copy_of(settings).read_bytes())
    newer.poll()
    assert newer.now == Limits(pool_size=7) and limits.standing(settings) == (found, "")
    path_of(settings).unlink()
    fresh = Watch(settings)
    for watch in (older, newer, fresh):
        watch.poll()
        assert watch.now == Limits()
    assert limits.standing(settings) == ({}, "")


def test_a_limit_that_could_not_be_set_is_in_no_copy_and_a_copy_that_could_not_be_written_is_no_other_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker that starts while the file is damaged would obey what nobody set, or what was cleared."""
    configure()
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    full, write = path_of(settings), limits.write_file

    def write_file(path: Path, data: bytes) -> None:
        if path == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, data)

    monkeypatch.setattr(limits, "write_file", write_file)
    with pytest.raises(OSError, match="No space"):
        set_limit(settings, "pool_size", 1, ttl_seconds=60, reason="r")
    sound = path_of(settings).read_bytes()
    path_of(settings).write_bytes(b"{")
    newer = Watch(settings)
    newer.poll()
    assert newer.now == Limits(pool_size=7)
    path_of(settings).write_bytes(sound)
    full = limits.copy_of(settings)
    assert clear(settings, "pool_size") and active(settings) == {}, "it is cleared, and nobody is told otherwise"
    assert "limits_copy_not_written" in capfd.readouterr().err
    path_of(settings).write_bytes(b"{")
    newer = Watch(settings)
    newer.poll()
    assert newer.now == Limits()
    with pytest.raises(Permanent, match=r"limits\.json cannot be read .* there is no copy"):
        limits.standing(settings)


def test_where_both_files_are_damaged_both_are_named_and_neither_is_recommended(settings: Settings) -> None:
    """Removing the one is enough: without it the copy says nothing."""
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    path_of(settings).write_bytes(b"{")
    limits.copy_of(settings).write_bytes(b"[")
    for ask in (limits.standing, active):
        with pytest.raises(Permanent, match=r"limits\.json cannot be read .*limits\.copy\.json cannot be read") as told:
            ask(settings)
        assert "in its place" not in str(told.value) and "remove limits.json to start" in str(told.value)
    path_of(settings).unlink()
    set_limit(settings, "pool_size", 8, ttl_seconds=60, reason="r")
    assert path_of(settings).read_bytes() == limits.copy_of(settings).read_bytes()


def test_a_file_that_could_not_be_read_once_is_read_by_the_next_poll(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A worker out of descriptors would otherwise not obey until the next change. It says so once."""
    configure()
    watch = Watch(settings)
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")

    def out_of_files(_path: Path) -> bytes:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", out_of_files)
        for _ in range(3):
            watch.poll()
    assert watch.now == Limits() and capfd.readouterr().err.count("limits_unread") == 1
    watch.poll()
    assert watch.now == Limits(pool_size=7)


def test_an_entry_nobody_understands_leaves_the_others_in_force(settings: Settings) -> None:
    """A newer build may have written it."""
    set_limit(settings, "pool_size", 7, ttl_seconds=60, reason="r")
    text = path_of(settings).read_text()
    entry = limits.Entry(1, "r", time.time(), time.time() + 60, "x")
    document = limits.msgspec.json.decode(text)
    document["entries"]["of-the-future"] = limits.msgspec.to_builtins(entry)
    path_of(settings).write_bytes(limits.msgspec.json.encode(document))
    watch = Watch(settings)
    watch.poll()
    assert watch.now == Limits(pool_size=7)


def test_writers_at_once_lose_nothing(settings: Settings) -> None:
    """Each changes its own entry under the lock."""
    threads = [
        threading.Thread(
            target=set_limit,
            args=(settings, f"rate_limit:t{n}", {"rps": n + 1}),
            kwargs={"ttl_seconds": 60, "reason": "r"},
        )
        for n in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(active(settings)) == {f"rate_limit:t{n}" for n in range(20)}


def test_setting_the_same_value_again_is_a_new_event_for_a_refresh(settings: Settings) -> None:
    """`jwks_refresh` is acted on once for each time it was set."""
    watch, seen = Watch(settings), set()
    for _ in range(3):
        set_limit(settings, "jwks_refresh", True, ttl_seconds=60, reason="rotated")
        watch.poll()
        seen.add(watch.now.jwks_refresh)
    assert len(seen) == 3 and "" not in seen
