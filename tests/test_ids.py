"""Ids: UUIDv7, from any thread and any process, never the same twice."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from shared.ids import as_text, mint, new_id, new_text_id


def test_ids_are_version_7_and_sort_by_their_millisecond() -> None:
    """The drain and the partitions rely on the time in the id."""
    ids = [mint(ms) for ms in (1, 2, 1_800_000_000_000)]
    assert ids == sorted(ids)
    assert all(i[6] >> 4 == 7 and i[8] >> 6 == 2 and len(i) == 16 for i in ids)
    assert int.from_bytes(ids[2][:6], "big") == 1_800_000_000_000


def test_a_forked_process_never_mints_its_parents_ids() -> None:
    """Random bytes are fetched ahead; two processes that shared them would overwrite each other's usage."""
    mint(0)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"".join(mint(1) for _ in range(20)))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reading, 320)
    os.close(reading)
    os.close(writing)
    ids = {theirs[at : at + 16] for at in range(0, 320, 16)} | {mint(1) for _ in range(1_000)}
    assert len(ids) == 1_020 and all(UUID(bytes=i).version == 7 for i in ids)


def test_threads_never_mint_the_same_id() -> None:
    """They take random bytes from one supply; one millisecond, so that nothing else tells the ids apart."""
    with ThreadPoolExecutor(8) as threads:
        made = [i for ids in threads.map(lambda _: [mint(1) for _ in range(5_000)], range(8)) for i in ids]
    assert len(set(made)) == 40_000


def test_all_forms_are_the_standard_librarys() -> None:
    """Drivers take `UUID`, clients the 36 characters."""
    assert as_text(mint(1)) != as_text(mint(1))
    assert UUID(new_text_id()).version == new_id().version == 7
    key = mint(1_800_000_000_000)
    assert as_text(key) == str(UUID(bytes=key))
