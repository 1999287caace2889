"""From a fresh clone to a running command, with nothing but Python: `python3 -m deployments ARGS…`.

Makes `.venv` beside the code, installs the project with the versions of `constraints.txt`, then becomes
`.venv/bin/engram ARGS`. `python3 -m deployments test [pytest arguments]` runs the checks instead: formatting,
lint, types, tests, in that order, stopping at the first that fails.

Only the standard library is imported: nothing else is there yet. What was installed is remembered as a hash in a
marker that is written last, so an interrupted installation is done again; a lock lets two of these run at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CONSTRAINTS = ROOT / "deployments" / "constraints.txt"
OLDEST_PYTHON = (3, 11)
CHECKS = (("ruff", "format", "--check", "."), ("ruff", "check", "."), ("mypy",))
# A file's tests stay together in one process (`tests/conftest.py`), and there are twice as many of these as cores: much
# of what they do is waiting for a real process to start or stop.
PROCESSES = str(min(8, 2 * (os.cpu_count() or 1)))
TESTS = ("pytest", "-n", PROCESSES, "--dist", "loadfile", "--no-loadscope-reorder", "--durations=25", "-rs")


def main() -> None:
    arguments = sys.argv[1:]
    testing = arguments[:1] == ["test"]
    if sys.version_info < OLDEST_PYTHON:
        fail(f"needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, this is {sys.version.split()[0]}")
    if not (ROOT / "pyproject.toml").exists():
        fail(f"{ROOT} is not a checkout of the project; the installed command is `engram`")
    with exclusive():
        install("test" if testing else "")
    if not testing:
        engram = VENV / "bin" / "engram"
        os.execv(engram, [str(engram), *arguments])
    for check in (*CHECKS, (*TESTS, *arguments[1:])):
        say(" ".join(check))
        code = subprocess.run([VENV / "bin" / check[0], *check[1:]], cwd=ROOT, check=False).returncode
        if code != 0:
            sys.exit(code if code > 0 else 128 - code)


def install(extra: str) -> None:
    """Bring `.venv` up to date; a no-op when its marker says it is."""
    wanted = fingerprint()
    installed = read_markers()
    if wanted in (installed.get(extra), installed.get("test")):
        return
    make_venv()
    for stale in VENV.glob("engram-installed*"):
        stale.unlink()
    say(f"installing into {VENV} (once; takes about a minute)")
    target = f"{ROOT}[{extra}]" if extra else str(ROOT)
    pip = [str(VENV / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if subprocess.run([*pip, "-c", str(CONSTRAINTS), "-e", target], check=False).returncode != 0:
        fail("pip could not install the project; its own message is above")
    marker(extra).write_text(wanted)


def make_venv() -> None:
    if (VENV / "bin" / "python").exists() and (VENV / "bin" / "pip").exists():
        return
    say(f"making {VENV}")
    try:
        import ensurepip  # noqa: F401  Debian splits it off
        import venv

        venv.create(VENV, clear=True, with_pip=True)
    except ImportError:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(f"this Python has no venv or ensurepip: install them (Debian: apt install python{version}-venv)")
    except (OSError, subprocess.CalledProcessError) as e:
        fail(f"cannot make {VENV}: {e}")


def fingerprint() -> str:
    """Changes with the project's requirements, its location and its Python."""
    digest = hashlib.sha256(f"{ROOT}\0{sys.version_info[:2]}".encode())
    for path in (ROOT / "pyproject.toml", CONSTRAINTS):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def marker(extra: str) -> Path:
    return VENV / f"engram-installed{'-' + extra if extra else ''}"


def read_markers() -> dict[str, str]:
    found = {}
    for extra in ("", "test"):
        with contextlib.suppress(FileNotFoundError):
            found[extra] = marker(extra).read_text()
    return found


@contextlib.contextmanager
def exclusive() -> Iterator[None]:
    """One installation at a time; the kernel gives the lock back whatever happens to its holder."""
    fd = os.open(ROOT, os.O_RDONLY | os.O_CLOEXEC)  # the directory itself: no lock file to ignore or remove
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another installation to finish")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def say(text: str) -> None:
    sys.stderr.write(f"engram: {text}\n")
    sys.stderr.flush()


def fail(message: str) -> None:
    say(message)
    sys.exit(1)


if __name__ == "__main__":
    main()
