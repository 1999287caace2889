"""How a stored object is packed: plain SQLite, a zstd frame, an age file, or a zstd frame inside an age file.

The formats are the public ones, so a backup opens without this product: `age -d -i tenant.key X.sqlite.zst.age |
zstd -d > X.sqlite`. What may be needed to open it is in its name: `.zst`, `.age`, `.zst.age`.

Both ways stream. pyrage reads 8 KiB and writes 64 KiB at a time, zstd's window is limited below, so a gigabyte needs
no more memory than a kilobyte. Nothing unpacked is trusted before its sha256 is the catalogue's: a frame cut short, a
flipped bit and another tenant's object are all `CorruptBackup`, and what was written by then is removed.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple, cast

import pyrage
import zstandard

from shared.durable import flushed_along, fsync_path
from shared.errors import CorruptBackup
from shared.receipt import Receipt
from shared.settings import Settings
from shared.streams import AgeError, Clock, Progress, Sink, Source, Timed, TooLarge, aside, disk_errors, through

PackingName = Literal["none", "zstd", "age", "zstd+age"]
Identity = pyrage.x25519.Identity

_CHUNK_BYTES = 1 << 20
_LARGE_BYTES = 32 << 20  # a smaller file is flushed at its end, and written by who unpacks it
_WINDOW_BYTES = 8 << 20  # what zstd's level 19 uses; a frame that asks for more is not ours
# A large file is compressed by threads of zstd while age and sha256 work on what came before: one frame all the same.
_ASIDE_BYTES, _ASIDE_THREADS, _JOB_BYTES = 32 << 20, 2, 1 << 20  # jobs of 1 MB: 11 MB of memory, by itself it takes 58


class Packing(Receipt, frozen=True):
    """What is done to the plain file, in this order."""

    zstd: bool
    age: bool
    level: int = 0

    @classmethod
    def of(cls, settings: Settings) -> Packing:
        """How new backups are packed."""
        return cls(
            zstd=settings.backup_compression == "zstd",
            age=settings.backup_encryption == "age",
            level=settings.backup_compression_level,
        )

    @classmethod
    def named(cls, name: str) -> Packing:
        """The inverse of `name`, for unpacking. Raises `CorruptBackup` for a packing this build does not know."""
        if name not in ("none", "zstd", "age", "zstd+age"):
            raise CorruptBackup(f"the catalogue names an unknown packing {name!r:.40}")
        return cls(zstd="zstd" in name, age="age" in name)

    @property
    def name(self) -> PackingName:
        if self.zstd:
            return "zstd+age" if self.age else "zstd"
        return "age" if self.age else "none"

    @property
    def suffix(self) -> str:
        """What an object's key ends with after `.sqlite`."""
        return (".zst" if self.zstd else "") + (".age" if self.age else "")


PLAIN = Packing(zstd=False, age=False)


class Packed(Receipt, frozen=True):
    """A packed file on local disk."""

    path: Path
    size_bytes: int
    sha256: str


class Received(Receipt, frozen=True):
    """A plain file on local disk that is what the catalogue says, and where the time went."""

    size_bytes: int
    stored_bytes: int
    download_ms: float
    decrypt_ms: float
    decompress_ms: float
    write_ms: float  # sha256, write and fsync of the plain file


def pack(source: Path, destination: Path, packing: Packing, recipient: str = "") -> Packed:
    """Write `source` packed to `destination` (replaced) and hash what is written. Not fsynced: it is on its way out.

    Raises `NoSpace`. `recipient` is an age X25519 recipient, looked at only for encryption.
    """
    sink = Sink()
    with disk_errors(destination), source.open("rb") as file, destination.open("wb") as out:
        sink.file = out
        reader: Any = file
        if packing.zstd:
            size = source.stat().st_size
            compressor = zstandard.ZstdCompressor(compression_params=_parameters(packing.level, size))
            frame = compressor.stream_reader(file, size=size, read_size=_CHUNK_BYTES, closefd=False)
            reader = io.BufferedReader(cast(io.RawIOBase, frame), _CHUNK_BYTES)  # age reads 8 KiB at a time
        if packing.age:
            to = [pyrage.x25519.Recipient.from_str(recipient)]
            through(lambda r, w: pyrage.encrypt_io(r, w, to), reader, sink)
        else:
            while chunk := reader.read(_CHUNK_BYTES):
                sink.write(chunk)
    return Packed(destination, sink.size, sink.digest.hexdigest())


def _parameters(level: int, size_bytes: int) -> zstandard.ZstdCompressionParameters:
    aside = {"threads": min(_ASIDE_THREADS, os.cpu_count() or 1), "job_size": _JOB_BYTES}
    more = aside if size_bytes >= _ASIDE_BYTES and aside["threads"] > 1 else {}
    return zstandard.ZstdCompressionParameters.from_level(level, source_size=size_bytes, write_checksum=True, **more)


def receive(
    chunks: Iterable[Any],
    destination: Path,
    sha256: str,
    *,
    name: str,
    packing: Packing = PLAIN,
    identity: Identity | None = None,
    size_bytes: int | None = None,
    stored_bytes: int | None = None,
    progress: Progress | None = None,
) -> Received:
    """Unpack a stored object's bytes into `destination` (replaced), fsynced.

    `name` is for messages; `size_bytes` and `stored_bytes` are the catalogue's: what unpacks to more is stopped;
    `progress` is told the plain bytes written so far. Raises `CorruptBackup` when the result has another sha256 than
    the catalogue says, or cannot be unpacked; `NoSpace`. The file is removed whenever this raises.
    """
    started = time.perf_counter()
    sink, flush = Sink(limit=size_bytes, progress=progress), Clock()
    large = size_bytes is not None and size_bytes >= _LARGE_BYTES
    try:
        with disk_errors(destination), destination.open("wb") as file:
            sink.file = file
            with flushed_along(destination) if large else nullcontext():
                took = _unpack(chunks, sink, name, packing, identity, beside=large)
            with flush:
                file.flush()
                os.fsync(file.fileno())
        if stored_bytes not in (None, took.source.size):
            raise CorruptBackup(f"{name}: the object has {took.source.size} bytes, the catalogue says {stored_bytes}")
        if sink.digest.hexdigest() != sha256:
            raise CorruptBackup(f"{name}: sha256 is {sink.digest.hexdigest()[:12]}…, the catalogue says {sha256[:12]}…")
        with flush:
            fsync_path(destination.parent)
    except BaseException:
        destination.unlink(missing_ok=True)
        raise
    total, download, write = (
        time.perf_counter() - started,
        took.source.clock.seconds,
        took.write_seconds + flush.seconds,
    )
    decrypt = total - download - write - took.unzip_seconds if packing.age else 0.0
    times = (download, decrypt, took.unzip_seconds, write)
    return Received(sink.size, took.source.size, *(round(max(0.0, s) * 1000, 3) for s in times))


def digest(chunks: Iterable[Any], *, name: str, packing: Packing, identity: Identity | None) -> tuple[str, int]:
    """Hex sha256 and size in bytes of what a stored object unpacks to. Raises `CorruptBackup`."""
    sink = Sink()
    _unpack(chunks, sink, name, packing, identity)
    return sink.digest.hexdigest(), sink.size


class _Unpacked(NamedTuple):
    """Where the time went: what was done beside counts as far as it was waited for."""

    source: Source
    unzip_seconds: float
    write_seconds: float


def _unpack(
    chunks: Iterable[Any], sink: Sink, name: str, packing: Packing, identity: Identity | None, *, beside: bool = False
) -> _Unpacked:
    """`beside`: hash and write in a thread, while the next bytes are decrypted and decompressed."""
    source, unzip = Source(chunks), Clock()
    unzip_seconds = 0.0
    try:
        with aside(sink, beside and packing != PLAIN) as end:
            writer: Any = end
            if packing.zstd:
                decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
                # Writes on in pieces: a frame that grows without end is stopped by the sink's limit, not by the memory.
                frame = decompressor.stream_writer(cast(BinaryIO, end), write_size=_CHUNK_BYTES, closefd=False)
                writer = Timed(frame, unzip)
            if packing.age:
                identities = [identity] if identity is not None else []
                through(lambda r, w: pyrage.decrypt_io(r, w, identities), source, writer)
            else:
                while chunk := source.read(_CHUNK_BYTES):
                    writer.write(chunk)
            if packing.zstd:
                unzip_seconds = unzip.seconds - end.clock.seconds
    except AgeError as e:
        raise CorruptBackup(f"{name}: age cannot decrypt it: {e}") from e
    except zstandard.ZstdError as e:
        raise CorruptBackup(f"{name}: zstd cannot decompress it: {e}") from e
    except TooLarge as e:
        raise CorruptBackup(f"{name}: unpacks to more than the {sink.limit} bytes of the catalogue") from e
    return _Unpacked(source, unzip_seconds, end.clock.seconds)
