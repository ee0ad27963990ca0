"""Ids: of requests (global), of incarnations (which life of a process)."""

from __future__ import annotations

import os
import secrets
import time


def request_id(prefix: str = "req") -> str:
    """A global request id, for example `req-5f2c9a…` (96 random bits)."""
    return f"{prefix}-{secrets.token_hex(12)}"


def incarnation() -> str:
    """A name for this life of this process: start time, pid and 32 random bits. Never equal for two lives."""
    return f"{time.time_ns():x}-{os.getpid():x}-{secrets.token_hex(4)}"
