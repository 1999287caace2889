"""A flow run's own process, by `command` in prefect.yaml: `python -m deployments.flow_process`.

Without a command the worker starts each run as two Pythons, one after the other: the first prepares a workspace by the
deployment's pull steps, of which there are none here, and becomes the second, which has to import Prefect again. That
costs every run a second of a core before its first step.

A session of its own, as the first Python would have made: a signal to the worker's group is not for its runs.
"""

from __future__ import annotations

import os
import runpy
from contextlib import suppress


def main() -> None:
    with suppress(PermissionError):  # it leads one already
        os.setsid()
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
