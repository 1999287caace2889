"""What every command shares: the `--json` option, results on stdout, notes on stderr."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, alone on stdout.")]


def print_json(value: Any) -> None:
    """One document, with times in ISO 8601 and anything else unknown as its text."""
    json.dump(value, sys.stdout, indent=2, default=lambda v: v.isoformat() if hasattr(v, "isoformat") else str(v))
    sys.stdout.write("\n")
    sys.stdout.flush()


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Aligned columns, never cut: people copy addresses from them. No heading when the names are empty."""
    from rich.console import Console

    lines = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *lines]) for i in range(len(columns))]
    console = Console(soft_wrap=True, markup=False, emoji=False)

    def aligned(cells: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()

    if any(columns):
        console.print(aligned(columns), style="bold", highlight=False)
    for line in lines:
        console.print(aligned(line))


def note(text: str) -> None:
    """A line for the person, on stderr."""
    with contextlib.suppress(OSError):  # a closed terminal must not keep the stack from stopping
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
