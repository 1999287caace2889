"""`engram demo`: the main job on a running stack, or on one of its own that it starts and stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from deployments.cli.output import Json, note, print_json
from shared.errors import Permanent

if TYPE_CHECKING:
    from deployments.demo.checks import Checks
    from deployments.demo.corpus import Conversation
    from shared.settings import Settings


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo(
    memories: Annotated[
        list[Path] | None,
        typer.Option("--memories", metavar="FILE.jsonl", help="One tenant a file, one memory a line; repeatable."),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(metavar="[FILE.jsonl …]", help="More such files.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave a stack running that the demo started.")] = False,
    as_json: Json = False,
) -> None:
    """Tenants, real traffic, backups, damage, a restore, a drill, usage: done for real, checked from outside."""
    from deployments.demo import corpus

    conversations = corpus.load([*(memories or []), *(more or [])])
    with _stack(keep) as settings:
        checks = _play(settings, conversations)
    if as_json:
        print_json({"ok": checks.all_hold, "checks": checks.as_dicts()})
    else:
        _show(checks)
    if not checks.all_hold:
        wrong = [row.what for row in checks.rows if not row.holds]
        raise Permanent(f"{len(wrong)} of {len(checks.rows)} checks do not hold: {'; '.join(wrong)}")


def _play(settings: Settings, conversations: list[Conversation]) -> Checks:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from deployments.demo import steps, usage
    from deployments.demo.checks import Checks
    from deployments.demo.stage import Stage, cast
    from deployments.prefect_api import PrefectApi
    from shared.control_plane import ControlPlane
    from shared.objects import ObjectStore

    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with ControlPlane(settings) as control_plane, Progress(*columns, console=Console(stderr=True)) as progress:
        actors = cast(settings, control_plane, conversations)
        stage = Stage(settings, control_plane, PrefectApi(settings), ObjectStore(settings), Checks(), actors)
        total = sum(len(c.memories) for c in conversations)
        writing = progress.add_task(f"{len(actors)} tenants write over REST", total=total)
        steps.write(stage, lambda: progress.advance(writing))
        using = progress.add_task("searches, reads, updates, deletes", total=len(actors))
        steps.use(stage, lambda: progress.advance(using))
        agents = progress.add_task("tenants store, search and read over MCP", total=len(actors))
        steps.use_mcp(stage, lambda: progress.advance(agents))
        for title, step in (
            ("backups (Prefect deployment)", steps.back_up),
            ("damage: rows deleted, file overwritten", steps.damage),
            ("restore (Prefect deployment)", steps.restore),
            ("other tenants compared", steps.others_untouched),
            ("restore test (Prefect deployment)", steps.drill),
        ):
            task = progress.add_task(title, total=1)
            step(stage)
            progress.advance(task)
        task = progress.add_task("usage in PostgreSQL", total=1)
        usage.compare(stage)
        progress.advance(task)
    return stage.checks


def _show(checks: Checks) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", "what", "expected", "seen", header_style="bold")
    table.add_column("in the Prefect UI", overflow="fold")
    for row in checks.rows:
        mark, style = ("ok", None) if row.holds else ("WRONG", "bold red")
        table.add_row(mark, row.what, row.expected, row.seen, row.link, style=style)
    console = Console()
    console.print(table) if console.is_terminal else Console(width=240).print(table)


@contextmanager
def _stack(keep: bool) -> Iterator[Settings]:
    """The running stack's settings; without one, a stack is started and, unless `keep`, stopped again."""
    from deployments import detached
    from deployments.running import UpLock, running_settings
    from shared.settings import Settings as Model

    mine = not UpLock(Model().data_dir).holder()
    if mine:
        note("no stack runs here: starting one")
        detached.up(Model(), note)
    try:
        yield running_settings("control_plane_url", "prefect_api_url", "jwks_url")
    finally:
        if mine and not keep:
            note("stopping the stack that was started for the demo")
            detached.down(Model())
