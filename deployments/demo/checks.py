"""The table of a demo: what was expected, what was seen, and where to look."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    what: str
    expected: str
    seen: str
    link: str

    @property
    def holds(self) -> bool:
        return self.expected == self.seen


class Checks:
    """Rows in the order they were made. A check compares two values and never raises."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def equal(self, what: str, expected: object, seen: object, link: str = "") -> bool:
        row = Row(what, str(expected), str(seen), link)
        self.rows.append(row)
        return row.holds

    @property
    def all_hold(self) -> bool:
        return bool(self.rows) and all(row.holds for row in self.rows)

    def as_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) | {"holds": row.holds} for row in self.rows]
