"""`python -m tests.bench.gateway`: the table on stdout, the figures as JSON in `--out`."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from tests.bench.gateway.plan import Bench
from tests.bench.gateway.report import document, show
from tests.bench.gateway.world import world


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one burst")
    parser.add_argument("--rounds", type=int, default=3, help="bursts a case, taking turns")
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        help="cases that begin with this: bare edge get search create mix tenants",
    )
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "engram-bench-gateway.json")
    parser.add_argument("--against", type=Path, help="another checkout, for the curve over tenants")
    options = parser.parse_args()
    with world() as made, Bench(made, options.seconds, options.rounds, set(options.only), options.against) as bench:
        bench.run()
        show(bench)
        options.out.write_text(json.dumps(document(bench), indent=2))
        print(f"JSON: {options.out}")


if __name__ == "__main__":
    main()
