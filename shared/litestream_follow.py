"""Keeps Litestream on the active generation of every tenant of this machine: the part `litestream` of the stack.

It starts Litestream with a configuration of all that is active, and then looks every `point_in_time_poll_seconds`: a
tenant whose `current` moved, came or went is let go of and taken up again through the control socket, and the
configuration is written anew, so that a Litestream that is started again begins with the truth. No other tenant
notices. A file is taken up under the tenant's shared lock, so never one that a restore has just replaced.

What is written between a restore and the next look is not lost to the copy: it begins with all the file holds then.
A generation that Litestream let go of is sealed (`shared.previous`): its copy kept the `-wal` from being folded in.

Litestream dies with this process (the kernel sees to it), and this process ends when Litestream does.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import FrameType

from shared import litestream, previous
from shared.durable import write_file
from shared.errors import EngramError, LitestreamUnavailable, Permanent
from shared.fence import in_use
from shared.litestream import Control
from shared.litestream_copies import prefix_of
from shared.log import get_logger
from shared.objects import ObjectStore
from shared.orphan import end_with_parent
from shared.settings import Settings
from shared.tenant import TenantPaths, tenants_on_disk

log = get_logger("litestream")
_POLL_SECONDS = 0.05


def main(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT, then let Litestream upload what is left. Raises `Permanent` when it dies."""
    stop = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    follower = Follower(settings)
    try:
        follower.start()
        log.info("litestream_started", databases=len(follower.wanted()))
        while not stop.wait(settings.point_in_time_poll_seconds):
            try:
                follower.look()
            except (EngramError, OSError) as e:
                log.error("litestream_not_followed", cause=str(e))
            if not follower.alive():
                raise Permanent(f"litestream ended: exit code {follower.exit_code()}")
    finally:
        follower.stop()


class Follower:
    """A Litestream and what it should copy."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._control = Control(settings)
        self._child: subprocess.Popen[bytes] | None = None

    def wanted(self) -> dict[str, str]:
        """{file: tenant id} of what is active on this machine now. Asked every second for all tenants: three calls of
        the kernel each, 9 µs, and no file is opened."""
        root, found = str(self._settings.tenants_dir), {}
        for name in tenants_on_disk(self._settings.tenants_dir, missing_ok=True):
            try:
                file = f"{root}/{name}/{os.readlink(f'{root}/{name}/current')}/engram.db"
            except OSError:  # no database here, or one that is just being removed
                continue
            if os.path.exists(file) and not os.path.exists(f"{root}/{name}/maintenance"):
                found[file] = name
        return found

    def start(self) -> None:
        """Start Litestream; it copies all that is wanted when this returns. Raises `Permanent`."""
        settings = self._settings
        ObjectStore(settings)  # a mount that is missing is told here; Litestream would make the directory
        argv = [litestream.program(settings), "replicate", "-no-expand-env", "-config", str(self._file)]
        with litestream.alone(settings):
            self._write(self.wanted())
            litestream.socket_path(settings).unlink(missing_ok=True)
            self._child = subprocess.Popen(
                argv,
                env=litestream.environment(settings),
                stdin=subprocess.DEVNULL,
                preexec_fn=partial(end_with_parent, os.getpid(), int(signal.SIGTERM)),
            )
            deadline = time.monotonic() + settings.start_timeout_seconds
            while True:  # a socket it could not open it only warns of
                try:
                    self._control.databases()
                    return
                except LitestreamUnavailable as e:
                    if not self.alive() or time.monotonic() > deadline:
                        raise Permanent(f"litestream did not start: {e}; exit code {self.exit_code()}") from e
                    time.sleep(_POLL_SECONDS)

    def look(self) -> bool:
        """Bring what Litestream copies in line with what is active; whether something had changed."""
        wanted = self.wanted()
        if self._control.databases() == wanted.keys():
            return False
        with litestream.alone(self._settings):
            copied = self._control.databases()
            for path in sorted(copied - wanted.keys()):
                self._each(path, self._let_go)
            for path in sorted(wanted.keys() - copied):
                self._each(path, self._take_up)
            self._write(self.wanted())
        return True

    def alive(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def exit_code(self) -> int | None:
        return self._child.poll() if self._child is not None else None

    def stop(self) -> None:
        """SIGTERM, so that it uploads what is left; SIGKILL when it takes longer than a stop may."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(self._settings.stop_timeout_seconds * 0.8)
        except subprocess.TimeoutExpired:
            log.error("litestream_killed", cause="it did not stop in time; its copies end a little earlier")
            self._child.kill()
            self._child.wait()
        litestream.socket_path(self._settings).unlink(missing_ok=True)

    @property
    def _file(self) -> Path:
        return self._settings.run_dir / "litestream.json"

    def _each(self, path: str, change: Callable[[str], None]) -> None:
        """One tenant that cannot be followed now must not keep the others."""
        try:
            change(path)
        except (EngramError, OSError) as e:
            log.error("litestream_not_followed", path=path, cause=str(e))

    def _let_go(self, path: str) -> None:
        self._control.let_go(path)
        paths = self._paths_of(path)
        log.info("litestream_let_go", tenant_id=paths.tenant_id, path=path)
        if paths.backup.exists() and os.path.realpath(paths.backup) == path:
            previous.seal(paths)

    def _take_up(self, path: str) -> None:
        paths = self._paths_of(path)
        with in_use(paths, wait_seconds=0):
            number = paths.generation()
            if path != str(paths.generation_dir(number) / "engram.db") or paths.mark.exists():
                return  # it has moved on; the next look finds where
            self._control.take_up(path, self._url(paths, number))
        log.info("litestream_took_up", tenant_id=paths.tenant_id, path=path)

    def _paths_of(self, path: str) -> TenantPaths:
        return TenantPaths.of(self._settings.tenants_dir, Path(path).relative_to(self._settings.tenants_dir).parts[0])

    def _url(self, paths: TenantPaths, number: int) -> str:
        return litestream.replica_url(self._settings, prefix_of(paths, number))

    def _write(self, wanted: Iterable[str]) -> None:
        databases = {}
        for path in wanted:
            try:
                databases[path] = self._url(self._paths_of(path), int(Path(path).parent.name))
            except OSError as e:  # removed since
                log.error("litestream_not_followed", path=path, cause=str(e))
        self._settings.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(self._file, litestream.configuration(self._settings, databases))
