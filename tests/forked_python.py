"""`engram` without an interpreter's start for each command: one that has imported everything forks for it.

Importing is most of what a short command does, up to three seconds of a core where it runs a flow. What is run is what
the console script runs, in a process of its own: with its arguments, environment, folder, stdin, stdout and stderr. The
program for that is `ForkedPython.program`, which also knows `-m MODULE` and `-c CODE`.

Only for what ends by itself, and not for `up` and `down`: a signal to the program does not reach what it asked for.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import pkgutil
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from shared.orphan import end_with_parent

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """#!{python} -IS
import json, os, socket, sys
if sys.argv[1:2] and sys.argv[1] in ("up", "down", "serve", "worker", "drain", "litestream", "bridge", "monitor"):
    os.execv(sys.executable, [sys.executable, "-m", "deployments.cli", *sys.argv[1:]])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
socket.send_fds(server, [b"."], [0, 1, 2])
server.sendall(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode())
server.shutdown(socket.SHUT_WR)
code = server.recv(1)
sys.exit(code[0] if code else "it ended without an exit code")
"""


class ForkedPython:
    """That interpreter, beside the stack that is up and that these variables, or the folder, name."""

    def __init__(self, environment: Mapping[str, str], folder: Path = ROOT) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="engram-")  # a socket's path is at most 107 bytes
        address, self.program = Path(self._directory.name, "socket"), Path(self._directory.name, "engram")
        self.program.write_text(PROGRAM.format(python=sys.executable, address=str(address)))
        self.program.chmod(0o755)
        with socket.socket(socket.AF_UNIX) as listener:  # whoever asks before all is imported waits
            listener.bind(str(address))
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forked_python", str(listener.fileno()), str(os.getpid())],
                env={**environment, "PYTHONPATH": str(ROOT)},
                cwd=folder,
                pass_fds=[listener.fileno()],
                stdin=subprocess.DEVNULL,
            )

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._directory.cleanup()


def main(listener: socket.socket) -> None:
    """Fork for each that asks, until SIGTERM."""
    _import_everything()
    gc.collect()
    gc.freeze()
    server = os.getpid()
    while True:
        connection, _ = listener.accept()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            listener.close()
            _answer(connection, server)
        connection.close()


def _import_everything() -> None:
    """Prefect as `deployments.cli.beside` imports it: it reads its environment then."""
    from deployments.parts import child_environment
    from deployments.running import running_settings

    settings = running_settings("control_plane_url", "prefect_api_url", "object_store_url")
    os.environ.update(child_environment(settings) | {"PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL"})
    for name in ("shared", "deployments.cli", "deployments.demo", "flows"):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)


def _answer(connection: socket.socket, server: int) -> None:
    """Run what is asked for, and end this process."""
    from shared.settings import settings

    end_with_parent(server, signal.SIGKILL)
    _, given, _, _ = socket.recv_fds(connection, 1, 3)
    for number, descriptor in enumerate(given):
        os.dup2(descriptor, number)
        os.close(descriptor)
    words, environment, folder = json.loads(b"".join(iter(lambda: connection.recv(65_536), b"")))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    settings.cache_clear()
    code = _run(words)
    threading._shutdown()  # type: ignore[attr-defined] # as an interpreter ends
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.send(bytes([code]))
    os._exit(code)


def _not_yet(_code: int) -> None:
    """Whoever asked is still to be told."""


def _run(words: list[str]) -> int:
    """The exit code of Python or of the command line with these arguments."""
    try:
        match words:
            case "-m", module, *rest:
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case "-c", code, *rest:
                sys.argv = ["-c", *rest]
                exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})  # as `python -c` does
            case _:
                from deployments import cli

                cli.ends_with = _not_yet
                sys.argv = ["engram", *words]
                cli.main()
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # noqa: BLE001 - the edge of a process
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    end_with_parent(int(sys.argv[2]), signal.SIGKILL)
    main(socket.socket(fileno=int(sys.argv[1])))
