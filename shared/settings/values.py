"""What a setting's text says, and what of it may be printed."""

from __future__ import annotations

import re


def words(value: str) -> list[str]:
    """The parts of a comma-separated setting."""
    return [part.strip() for part in value.split(",") if part.strip()]


def by_machine(value: str) -> tuple[str, dict[str, str]]:
    """A setting that names something of each machine: the pattern with `{machine_id}` (or ""), and what stands for
    single machines. Raises `ValueError`."""
    pattern, named = "", {}
    for word in words(value):
        machine_id, mark, of_machine = word.partition("=")
        if mark and machine_id and of_machine and "{" not in word:
            named[machine_id] = of_machine
        elif not (mark or pattern) and word.count("{machine_id}") == word.count("{") == 1:
            pattern = word
        else:
            raise ValueError("want one pattern with {machine_id}, or machine=value, or both, comma-separated")
    return pattern, named


def redact_url(url: str) -> str:
    """The URL without its password, for logs and tables."""
    url = re.sub(r"(password=)('[^']*'|[^&\s]*)", r"\1***", url)  # libpq takes it as a parameter too
    return re.sub(r"(://[^:/?#@]*):.*@", r"\1:***@", url)  # up to the last @: a password may hold any character
