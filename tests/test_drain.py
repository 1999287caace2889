"""The resident drain as a process, with Prefect servers that are away, broken, or answer their health check alone."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from flows import drain
from shared import storage
from shared.control_plane import ControlPlane
from shared.settings import Settings
from tests.core_fixtures import event, start_child, wait_until
from tests.http_fixtures import Handler, Server
from tests.metering_fixtures import own_control_plane, own_settings, query, segment

pytest_plugins = ("tests.metering_fixtures",)
settings, control_plane = own_settings, own_control_plane
DRAIN = """
    from flows.drain import main
    from shared.settings import settings
    main(settings())
"""


@dataclass
class PoorPrefect:
    """A run begins by asking for the server's version; that is never answered, or always by a 500."""

    url: str
    asked: list[str] = field(default_factory=list)

    @property
    def runs(self) -> int:
        return sum(path.endswith("/admin/version") for path in self.asked)


@pytest.fixture
def frozen_prefect() -> Iterator[PoorPrefect]:
    with poor_prefect(seconds=120) as prefect:
        yield prefect


@contextmanager
def poor_prefect(seconds: float) -> Iterator[PoorPrefect]:
    """Answers its health check; all else after `seconds`, by a 500."""
    released = threading.Event()

    class Poor(Handler):
        def do_GET(self) -> None:
            if not self.path.endswith("/health"):
                self.do_POST()
                return
            self.reply(200, b"true")

        def do_POST(self) -> None:
            prefect.asked.append(self.path)
            released.wait(seconds)
            self.reply(500)

    with Server(Poor) as server:
        prefect = PoorPrefect(f"{server.url}/api")
        yield prefect
        released.set()


@contextmanager
def drain_of(settings: Settings, prefect: PoorPrefect, **more: str) -> Iterator[Path]:
    """A resident drain; its log."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ENGRAM_", "PREFECT_"))}
    environment |= {
        "ENGRAM_DATA_DIR": str(settings.data_dir),
        "ENGRAM_CONTROL_PLANE_URL": settings.control_plane_url.get_secret_value(),
        "ENGRAM_DRAIN_POLL_SECONDS": "0.1",
        "PREFECT_API_URL": prefect.url,
        "PREFECT_HOME": str(settings.data_dir / "prefect"),
    } | more
    log = settings.data_dir / "drain.log"
    with pytest.MonkeyPatch.context() as patch, log.open("ab") as stderr:
        for name in [name for name in os.environ if name.startswith(("ENGRAM_", "PREFECT_"))]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        process = start_child(DRAIN, stderr=stderr)
    try:
        yield log
        process.terminate()
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def events_in(control_plane: ControlPlane) -> int:
    [(count,)] = query(control_plane, "SELECT count(*)::int AS n FROM usage_events")
    assert isinstance(count, int)
    return count


def test_a_frozen_prefect_delays_usage_by_seconds_and_is_never_asked_for_a_second_run(
    control_plane: ControlPlane, settings: Settings, frozen_prefect: PoorPrefect
) -> None:
    """The core drains beside the run that hangs, also after PostgreSQL was away meanwhile: a run for each failure would
    be a herd of them when the server comes back."""
    segment(settings, [event()])
    with drain_of(settings, frozen_prefect) as log:
        wait_until(lambda: events_in(control_plane) == 1, 60)
        for n in (2, 3):
            with control_plane.transaction() as connection:
                connection.execute("ALTER TABLE usage_segments RENAME TO usage_segments_away")
            segment(settings, [event()])
            wait_until(lambda n=n: log.read_text().count("drain_failed") >= n - 1, 30)  # type: ignore[misc]
            with control_plane.transaction() as connection:
                connection.execute("ALTER TABLE usage_segments_away RENAME TO usage_segments")
            wait_until(lambda n=n: events_in(control_plane) == n, 30)  # type: ignore[misc]
        assert frozen_prefect.runs == 1, frozen_prefect.asked
        assert "metering_run_silent" in log.read_text()


@pytest.mark.parametrize(("away", "said"), [(True, "prefect_unavailable"), (False, "metering_run_failed")])
def test_usage_arrives_while_prefect_is_away_or_broken(
    control_plane: ControlPlane, settings: Settings, away: bool, said: str
) -> None:
    """Runs only show what the core does; the log says that nobody could see it."""
    with poor_prefect(seconds=0) as broken:
        prefect = PoorPrefect("http://127.0.0.1:1/api") if away else broken
        with drain_of(settings, prefect) as log:
            for n in (1, 2):
                segment(settings, [event()])
                wait_until(lambda n=n: events_in(control_plane) == n, 60)  # type: ignore[misc]
            assert said in log.read_text()


def test_a_sweep_that_meets_a_fault_nobody_foresaw_says_so_and_goes_on(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It is the thread that frees tenants of dead restores: it must not end unseen while the drain goes on."""
    stop, looks = threading.Event(), 0

    def look(_settings: Settings) -> list[object]:
        nonlocal looks
        looks += 1
        if looks == 1:
            raise ZeroDivisionError("a fault")
        stop.set()
        return []

    monkeypatch.setattr(drain.core_sweep, "sweep_disk", look)
    drain._sweep(settings.model_copy(update={"sweep_seconds": 0.01}), stop)
    assert looks == 2
    out = "".join(capfd.readouterr())
    assert "sweep_failed" in out and "a fault" in out


def test_a_measurement_that_takes_long_keeps_no_sweep_from_the_disk_and_goes_on_after_a_fault(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And what was measured is known the next time."""
    stop, looked, measuring = threading.Event(), threading.Event(), threading.Event()
    given: list[dict[str, object]] = []

    def look(_settings: Settings) -> list[object]:
        if measuring.is_set():
            looked.set()
        return []

    def measure(_control_plane: object, _settings: Settings, last: dict[str, object]) -> storage.Measured:
        given.append(dict(last))
        last[f"t{len(given)}"] = storage.Measurement(1)
        if len(given) == 1:
            raise ZeroDivisionError("a fault")
        measuring.set()
        assert looked.wait(10), "the sweep stands still"
        stop.set()
        return storage.Measured(1, 1, 0)

    monkeypatch.setattr(drain.core_sweep, "sweep_disk", look)
    monkeypatch.setattr(drain.core_sweep, "sweep_records", lambda *_: [])
    monkeypatch.setattr(drain.move_settle, "sweep_moves", lambda *_: [])
    monkeypatch.setattr(drain.storage, "measure", measure)
    monkeypatch.setattr(drain, "control_plane", lambda: None)
    quick = settings.model_copy(update={"sweep_seconds": 0.01})
    threads = [threading.Thread(target=each, args=(quick, stop)) for each in (drain._sweep, drain._measure)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert looked.is_set() and given == [{}, {"t1": storage.Measurement(1)}]
    out = "".join(capfd.readouterr())
    assert "storage_failed" in out and "a fault" in out and "storage_measured" in out
