"""Which environment this is, and the value file that goes with it.

A setting's value is the first of:

1. the process's environment: `ENGRAM_X=…`, where an empty one counts as not set;
2. `deployments/environments/{env}.env`, where `env` is `ENGRAM_ENV`: dev (the default), staging or prod;
3. the default in `shared.settings`.

The files hold what makes the three environments different and no secret: addresses and keys come from the process's
environment alone. They are plain `ENGRAM_NAME=value` lines and `#` comments; nothing is expanded or unquoted. They are
part of the project and found beside it, in a checkout and when it is installed; only the place is known here, nothing
of `deployments` is imported.

A name with the prefix that no setting has is an error in both places: `ENGRAM_RATE_LIMIT_RSP=10` limits nobody.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from shared.errors import Permanent

ENVIRONMENTS = ("dev", "staging", "prod")
PREFIX = "ENGRAM_"
DIRECTORY = Path(__file__).resolve().parent.parent / "deployments" / "environments"
# Variables with the prefix that are no settings: a mark the supervisor leaves on its children, and switches of the
# test suite, which runs what it tests in its own environment.
NOT_SETTINGS = frozenset(
    {"ENGRAM_STACK", "ENGRAM_CRASH_POINTS", "ENGRAM_CHAOS_SECONDS", "ENGRAM_CHAOS_SEED", "ENGRAM_SCREENSHOTS"}
)
_TESTS = "ENGRAM_TEST_"
_LINE = re.compile(r"([A-Z][A-Z0-9_]*)=(.*)\Z")


class BadSettings(Permanent):
    """A name that is no setting, or a value file that cannot be read."""

    exit_code = 2


class UnknownSettings(BadSettings):
    """Variables with the prefix that are no settings: `found` says of each what it is and what may have been meant."""

    def __init__(self, found: Mapping[str, str]) -> None:
        super().__init__("; ".join(f"{name} {what}" for name, what in found.items()))
        self.found = found


def value_file(env: str) -> Path:
    return DIRECTORY / f"{env}.env"


@functools.cache
def read(path: Path, known: frozenset[str]) -> Mapping[str, str]:
    """The file's values by field name. Raises `BadSettings` for a file that is not there, a line that is none, and
    every name that is not among the field names `known`, all at once."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise BadSettings(f"{path}: {getattr(e, 'strerror', None) or 'not UTF-8'}") from e
    values: dict[str, str] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        found = _LINE.match(line)
        if found is None:
            wrong.append(f"line {number} is not ENGRAM_NAME=value")  # without its text: it may hold a secret
        elif found[1] in values:
            wrong.append(f"{found[1]} is there twice")
        else:
            values[found[1]] = found[2].strip()
    wrong += [f"{name} {what}" for name, what in _unknown(values, known).items()]
    if "ENGRAM_ENV" in values:
        wrong.append("ENGRAM_ENV chooses the file and cannot be in it")
    if wrong:
        raise BadSettings(f"{path}: {'; '.join(wrong)}")
    return MappingProxyType({name.removeprefix(PREFIX).lower(): value for name, value in values.items() if value})


def check_names(names: Iterable[str], known: frozenset[str]) -> None:
    """Raises `UnknownSettings` naming every variable with the prefix that is no setting."""
    ours = [n for n in names if n.upper().startswith(PREFIX) and not n.upper().startswith(_TESTS)]
    if wrong := _unknown([n for n in ours if n.upper() not in NOT_SETTINGS], known):
        raise UnknownSettings(wrong)


def _unknown(names: Iterable[str], known: frozenset[str]) -> dict[str, str]:
    found = {}
    for name in sorted(names):
        field = name.upper().removeprefix(PREFIX).lower()
        if name.upper().startswith(PREFIX) and field in known:
            continue
        near = difflib.get_close_matches(field, known, n=1, cutoff=0.6)
        found[name] = "is no setting" + (f": did you mean {PREFIX}{near[0].upper()}?" if near else "")
    return found
