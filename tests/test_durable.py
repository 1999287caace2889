"""Directories that go away while others are still busy in them."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from shared.durable import remove_tree


def test_a_tree_that_others_remove_files_from_is_removed_without_a_complaint(tmp_path: Path) -> None:
    """A gateway closes an old generation while the sweep collects it: SQLite removes the -wal and -shm it was about
    to remove, and a sweep that calls that a failure pages somebody."""
    for n in range(20):
        trees = [tmp_path / str(n) / name for name in ("one", "two")]
        files = [tree / f"engram.db-{i}" for tree in trees for i in range(100)]
        for tree in trees:
            tree.mkdir(parents=True)
        for file in files:
            file.touch()
        removing = threading.Barrier(2)

        def close(files: list[Path] = files, removing: threading.Barrier = removing) -> None:
            removing.wait()
            for file in reversed(files):
                file.unlink(missing_ok=True)

        other = threading.Thread(target=close)
        other.start()
        removing.wait()
        remove_tree(tmp_path / str(n))
        other.join()
        assert not (tmp_path / str(n)).exists()
    remove_tree(tmp_path / "never was")


def test_a_tree_that_cannot_be_removed_is_an_error(tmp_path: Path) -> None:
    """Only what is gone already is fine."""
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        remove_tree(tmp_path / "file")
