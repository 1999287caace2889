"""Log lines: one JSON object each, nothing in them that must not be."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from shared import log
from shared.settings import Settings

FORBIDDEN = ("token", "authorization", "password", "secret", "content", "query", "body")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    before = structlog.get_config()
    made = io.StringIO()
    log.configure("info", made)
    yield made
    structlog.configure(**before)
    structlog.contextvars.clear_contextvars()


def lines(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_every_call_is_one_json_line_with_component_level_and_time(stream: io.StringIO) -> None:
    """Machines read it line by line; a newline in a value must not break that."""
    log.get_logger("edge").info("thing_happened", value="two\nlines", count=3)
    [line] = lines(stream)
    assert (line["component"], line["event"], line["level"]) == ("edge", "thing_happened", "info")
    assert (line["value"], line["count"]) == ("two\nlines", 3)
    assert str(line["ts"]).endswith("Z")


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_field_that_must_not_be_logged_is_redacted(stream: io.StringIO, name: str) -> None:
    """The second line of defence when somebody forgets the first."""
    log.get_logger("edge").error("oops", **{name: "hunter2"})
    assert "hunter2" not in stream.getvalue()
    assert lines(stream)[0][name] == "[redacted]"


def test_a_forbidden_field_bound_to_the_context_is_redacted_too(stream: io.StringIO) -> None:
    """Context variables join every line of a request."""
    structlog.contextvars.bind_contextvars(token="hunter2", request_id="r1")
    log.get_logger("edge").info("one")
    assert lines(stream)[0] | {"token": "[redacted]", "request_id": "r1"} == lines(stream)[0]
    assert "hunter2" not in stream.getvalue()


def test_a_secret_setting_prints_as_stars(stream: io.StringIO) -> None:
    """Settings may be logged whole."""
    log.get_logger("cli").info("started", settings=repr(Settings(control_plane_url="postgresql://u:hunter2@h/d")))
    assert "hunter2" not in stream.getvalue()


def test_an_exception_stays_one_line(stream: io.StringIO) -> None:
    """A traceback inside the object, not after it."""
    try:
        raise ValueError("broken")
    except ValueError:
        log.get_logger("edge").exception("failed")
    [line] = lines(stream)
    assert "ValueError: broken" in str(line["exception"])


def test_lines_below_the_level_are_not_written(stream: io.StringIO) -> None:
    """`info` in production means no debug lines at all."""
    log.get_logger("edge").debug("noise")
    log.get_logger("edge").warning("signal")
    assert [line["event"] for line in lines(stream)] == ["signal"]


def test_lines_of_two_processes_on_one_stderr_stay_whole(tmp_path: Path) -> None:
    """Gateway workers share one: a line and its end must be one write(2), or another's line comes between."""
    code = "from shared import log\nlog.configure()\nfor n in range(3_000): log.get_logger('x').info('said', n=n)"
    with (tmp_path / "log").open("ab") as file:
        both = [subprocess.Popen([sys.executable, "-c", code], stderr=file) for _ in range(2)]
        assert [p.wait() for p in both] == [0, 0]
    said = [json.loads(line)["n"] for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(said) == sorted([*range(3_000), *range(3_000)])
