"""`prefect …` as a process of this stack: `python -m deployments.prefect_command server start …`.

`uncollected` is for whoever imports Prefect: what a process makes while it imports it keeps to its end, and looking
through it for garbage again and again is a sixth of what a server's start takes.
"""

from __future__ import annotations

import gc
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """What is made inside is never looked through for garbage, neither now nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def main() -> None:
    with uncollected():
        if sys.argv[1:3] == ["server", "start"]:
            import prefect.server.api.server  # noqa: F401  # the command imports it too, but late
    runpy.run_module("prefect", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
