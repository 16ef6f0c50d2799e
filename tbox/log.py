"""Logging set-up: one line an event on stderr, for people or as JSON. It never logs a secret or a VIN."""

from __future__ import annotations

import logging
import sys

from tbox.imports import import_without

# It would load rich for tracebacks in colour, which a log has no use for: 50 modules, 4 MB.
import_without("structlog", "rich")
import structlog  # noqa: E402

# A value under one of these keys never reaches a log, whoever passes it.
SECRET_KEYS = frozenset({"password", "secret", "key", "vin", "token", "private_key"})


def _redact(_logger: object, _method: str, event: structlog.types.EventDict) -> structlog.types.EventDict:
    for name in SECRET_KEYS.intersection(event):
        event[name] = "<redacted>"
    return event


def set_up(level: str = "info", *, json: bool = False) -> None:
    """Send structlog events of at least `level` to stderr; JSON when a machine reads them."""
    renderer: structlog.types.Processor = (
        structlog.processors.JSONRenderer()
        if json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _redact,
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        # Looked up at every event: who runs us in his own process may have closed the stderr of before.
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )
