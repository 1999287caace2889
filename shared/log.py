"""Structured logs: one JSON object a line on stderr (or a given stream); events are nouns, fields carry units.

Never logged: tokens, memory content, query text, bodies, secrets. `SecretStr` settings print as stars, and
`redact` drops fields by name as a second line of defence.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import MutableMapping
from typing import Any, TextIO

import structlog

_FORBIDDEN = frozenset({"token", "authorization", "password", "secret", "content", "query", "body"})


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Replace the value of any field that must never be logged."""
    for name in _FORBIDDEN & event.keys():
        event[name] = "[redacted]"
    return event


def configure(level: str = "info", stream: TextIO | None = None) -> None:
    """Set up structlog for this process. Call once, at the process edge."""
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            structlog.processors.format_exc_info,
            redact,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(stream or sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_logger(name: str) -> structlog.typing.FilteringBoundLogger:
    """A logger whose lines carry `logger=name`."""
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger(logger=name)
    return logger
