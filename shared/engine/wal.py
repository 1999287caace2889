"""How many pages a database's `-wal` holds, read from the file itself: Python's `sqlite3` does not say.

The format (https://sqlite.org/fileformat2.html#the_write_ahead_log): 32 bytes of header, then frames of a 24-byte
header and a page. Once all of it is in the database, the next transaction begins at the first frame again, with new
salts in the file's header, and what was behind stays there. So a frame belongs to what is there now if its salts are
those of the file's header.

No SQLite lock is on this file: unlike the database and the `-shm`, of which closing one descriptor gives back all
locks of the process (https://sqlite.org/howtocorrupt.html#posix_advisory_locks_canceled), it may be opened beside it.
"""

from __future__ import annotations

import os
from pathlib import Path

_HEADER_BYTES = 32
_PAGE_SIZE = slice(8, 12)
_SALTS = slice(16, 24)
_FRAME_HEADER_BYTES = 24
_FRAME_SALTS_AT = 8


class Wal:
    """For as long as a connection that has read from the database is open: then the file stays the same one."""

    def __init__(self, database: Path) -> None:
        self._fd = os.open(f"{database}-wal", os.O_RDONLY | os.O_CLOEXEC)
        self._copied_salts, self._copied_pages = b"", 0

    def holds(self, pages: int) -> bool:
        """Whether at least so many were written since it was begun anew, or since `copied`. 2 µs."""
        header = os.pread(self._fd, _HEADER_BYTES, 0)
        salts = header[_SALTS]
        if len(header) < _HEADER_BYTES:
            return False
        last = pages - 1 + (self._copied_pages if salts == self._copied_salts else 0)
        frame_bytes = _FRAME_HEADER_BYTES + int.from_bytes(header[_PAGE_SIZE], "big")
        return os.pread(self._fd, len(salts), _HEADER_BYTES + last * frame_bytes + _FRAME_SALTS_AT) == salts

    def copied(self, pages: int) -> None:
        """A checkpoint has seen so many. They count no more, also when somebody who reads keeps it from being begun
        anew: else a checkpoint would follow every transaction then."""
        self._copied_salts, self._copied_pages = os.pread(self._fd, _HEADER_BYTES, 0)[_SALTS], pages

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
