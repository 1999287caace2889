"""`python -m gateway.serve` whose workers die as they start while the file that `FATAL` names is there, and whose
supervisor counts two deaths as too many."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from gateway import supervisor

if __name__ == "__mp_main__" and Path(os.environ["FATAL"]).exists():
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    from gateway.serve import serve
    from shared.settings import settings

    supervisor.DEATHS = 1
    serve(settings())
