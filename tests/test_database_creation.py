"""A tenant's first generation: made once, completed after any crash."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shared.engine import database
from shared.tenant import TenantPaths
from tests.core_fixtures import add_memories, contents_of, start_child
from tests.database_fixtures import opened, read_all, write_one

pytest_plugins = ("tests.database_fixtures",)


def test_creating_twice_keeps_the_first_database(paths: TenantPaths) -> None:
    """The registry may run it again after a crash of its own."""
    add_memories(paths, "one")
    assert database.create(paths) is False
    assert contents_of(paths.database) == ["one"]


CALLS = ("replace", "rename", "symlink", "fsync", "mkdir", "unlink", "rmdir")


def fail_at(monkeypatch: pytest.MonkeyPatch, nth: int) -> Callable[[], int]:
    """Make the n-th changing call of `os` raise; returns the count of calls so far."""
    seen = 0

    def wrap(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            nonlocal seen
            seen += 1
            if seen == nth:
                raise InterruptedError(f"injected at call {nth}")
            return real(*args, **kwargs)

        return call

    for name in CALLS:
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return lambda: seen


def test_creation_that_fails_at_any_call_is_completed_by_the_next_try(tmp_path: Path) -> None:
    """A crash leaves either no tenant or a whole one."""
    for nth in range(1, 200):
        paths = TenantPaths.of(tmp_path / str(nth), "acme")
        with pytest.MonkeyPatch.context() as patch:
            count = fail_at(patch, nth)
            try:
                database.create(paths)
                failed = False
            except InterruptedError:
                failed = True
        if failed and os.path.lexists(paths.current):
            assert contents_of(paths.database) == []
        database.create(paths)
        add_memories(paths, "one")
        assert contents_of(paths.database) == ["one"]
        assert paths.generation() == 1
        if count() < nth:
            break
    assert not failed
    assert nth > 10


def test_creation_killed_at_any_call_is_completed_by_the_next_try(tmp_path: Path) -> None:
    """The same with SIGKILL: no handler, no rollback, only what is on disk."""
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from shared.engine import database
        from shared.tenant import TenantPaths
        root, n = Path(sys.argv[1]), 0
        for nth in map(int, sys.argv[2:]):
            if os.fork():
                os.wait()
                continue
            def wrap(real):
                def call(*args, **kwargs):
                    global n
                    n += 1
                    if n == nth:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **kwargs)
                return call
            for name in {CALLS!r}:
                setattr(os, name, wrap(getattr(os, name)))
            database.create(TenantPaths.of(root / str(nth), "acme"))
            os._exit(0)
    """
    points = range(1, 26)
    assert start_child(code, tmp_path, *points).wait(60) == 0
    whole = 0
    for nth in points:
        paths = TenantPaths.of(tmp_path / str(nth), "acme")
        whole += not database.create(paths)
        with opened(paths) as tenant:
            write_one(tenant, "one")
            assert read_all(tenant) == ["one"]
    assert 0 < whole < len(points)
