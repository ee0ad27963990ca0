"""Structured logs: one JSON object a line, or rich on a terminal. Never prompts or keys.

log = get_logger("router")
log.info("request done", request_id=rid, output_tokens=12)
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, ClassVar

_EXTRA = "tokenrelay_fields"


class Logger:
    """A logger whose calls take fields as keyword arguments."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"tokenrelay.{name}")

    def debug(self, message: str, **fields: Any) -> None:
        """For the person who debugs this part."""
        self._log(logging.DEBUG, message, fields)

    def info(self, message: str, **fields: Any) -> None:
        """Something an operator would want to know."""
        self._log(logging.INFO, message, fields)

    def warning(self, message: str, **fields: Any) -> None:
        """Something an operator should look at."""
        self._log(logging.WARNING, message, fields)

    def error(self, message: str, **fields: Any) -> None:
        """Something failed."""
        self._log(logging.ERROR, message, fields)

    def exception(self, message: str, **fields: Any) -> None:
        """Something failed with an exception that is being handled; its traceback is logged."""
        self._log(logging.ERROR, message, fields, exc_info=True)

    def _log(self, level: int, message: str, fields: dict[str, Any], exc_info: bool = False) -> None:
        if self._logger.isEnabledFor(level):
            self._logger.log(level, message, extra={_EXTRA: fields}, exc_info=exc_info)


def get_logger(name: str) -> Logger:
    """The logger of one part, for example "router"."""
    return Logger(name)


def setup_logging(service: str, *, level: str = "info", incarnation: str = "", style: str = "auto") -> None:
    """Send this process's logs to stderr. `style` is "json", "terminal", or "auto" (terminal when stderr is one)."""
    handler = logging.StreamHandler(sys.stderr)
    terminal = style == "terminal" or (style == "auto" and sys.stderr.isatty())
    handler.setFormatter(_TerminalFormatter(service) if terminal else _JsonFormatter(service, incarnation))
    root = logging.getLogger("tokenrelay")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


class _JsonFormatter(logging.Formatter):
    def __init__(self, service: str, incarnation: str) -> None:
        super().__init__()
        self._common = {"service": service, "incarnation": incarnation}

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": round(time.time(), 3),
            "level": record.levelname.lower(),
            **self._common,
            "message": record.getMessage(),
        }
        line.update(getattr(record, _EXTRA, {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _TerminalFormatter(logging.Formatter):
    _COLOURS: ClassVar = {"DEBUG": "\033[2m", "INFO": "", "WARNING": "\033[33m", "ERROR": "\033[31m"}

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{key}={value}" for key, value in getattr(record, _EXTRA, {}).items())
        colour = self._COLOURS.get(record.levelname, "")
        text = f"\033[2m{time.strftime('%H:%M:%S')} {self._service:<9}\033[0m {colour}{record.getMessage()}\033[0m"
        text += f" \033[2m{fields}\033[0m" if fields else ""
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")
