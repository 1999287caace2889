"""Under which licences the image's dependencies are: none that is not on the list.

`python -m tests.test_supply_licences` prints them all.
"""

from __future__ import annotations

import re
import sys
from importlib import metadata

from tests.test_container import closure, image_requirements

# Permissive ones; MPL-2.0 and LGPL-3.0-only ask for the source of changes to their own files, and we change none.
ALLOWED = frozenset(
    {
        *("MIT", "MIT-0", "ISC", "BSD-2-Clause", "BSD-3-Clause", "BSD", "Apache-2.0", "PSF-2.0", "CNRI-Python"),
        *("Artistic", "Public Domain", "MPL-2.0", "LGPL-3.0-only"),
    }
)
# What packages wrote before there were expressions.
SPELT = {
    "MIT License": "MIT",
    "MIT license": "MIT",
    "BSD License": "BSD",
    "ISC License": "ISC",
    "ISC License (ISCL)": "ISC",
    "Apache License, Version 2.0": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Artistic License": "Artistic",
    "GNU General Public License (GPL)": "GPL",
    "GNU General Public License v2 or later (GPLv2+)": "GPL",
}
# Read by a person: the metadata says nothing, or two things.
READ = {
    "pyrage": "MIT",
    "rich-click": "MIT",
    "python-dateutil": "Apache-2.0 OR BSD-3-Clause",
    "text-unidecode": "Artistic OR GPL",
}


def licence(name: str) -> str:
    """As an expression: what was read, else the package's expression, its short name, or its classifiers."""
    found = metadata.metadata(name)
    short = (found.get("License") or "").strip()
    classified = [c.rpartition(" :: ")[2] for c in found.get_all("Classifier") or [] if c.startswith("License ::")]
    if name in READ:
        return READ[name]
    if expression := found.get("License-Expression"):
        return str(expression)
    if classified:
        return " AND ".join(SPELT.get(c, c) for c in classified)  # which of OR and AND it is they do not say
    return SPELT.get(short, short) if len(short) < 60 else ""


def is_allowed(expression: str) -> bool:
    """One of the alternatives has nothing but licences from the list."""
    alternatives = re.sub(r"[()]", "", expression).split(" OR ")
    return any(all(term.strip() in ALLOWED for term in one.split(" AND ")) for one in alternatives)


def test_every_dependency_of_the_image_is_under_a_licence_from_the_list() -> None:
    """A new one under another licence is a decision, not an accident."""
    found = {name: licence(name) for name in closure(image_requirements())}
    assert {name: text for name, text in found.items() if not is_allowed(text)} == {}
    assert set(READ) <= set(found), "an exception that is needed no more"


def test_copyleft_and_silence_are_not_on_the_list() -> None:
    """The list must be able to say no."""
    for expression in ("", "GPL", "AGPL-3.0-only", "GPL-3.0 AND MIT", "Proprietary"):
        assert not is_allowed(expression), expression
    for expression in ("GPL-3.0-only OR MIT", "MPL-2.0 AND (Apache-2.0 OR MIT)"):
        assert is_allowed(expression), expression


if __name__ == "__main__":
    for dependency in sorted(closure(image_requirements())):
        sys.stdout.write(f"{dependency:28} {metadata.version(dependency):14} {licence(dependency)}\n")
