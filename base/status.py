"""What a child process tells its supervisor while it starts: one JSON object a line on an inherited file descriptor.

    status = StatusPipe(fd)                      # None: nobody listens, every call does nothing
    status.progress("weights", done=3, total=10) # {"event": "progress", "what": "weights", "done": 3, "total": 10}
    status.ready(model="tiny", blocks=1024)      # {"event": "ready", "model": "tiny", "blocks": 1024}
    status.failed(error)                         # {"event": "failed", "code": "checkpoint_error", "message": "…"}

The supervisor reads with `parse_status`. A line is at most 64 KiB; what does not parse is not a status and is ignored.
"""

from __future__ import annotations

import contextlib
import json
import os
from typing import Any

from tokenrelay.base.errors import TokenRelayError

LINE_BYTES_MAX = 65536


class StatusPipe:
    """The writing end. A reader that went away is no reason to fail: a child learns its parent's death elsewhere."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def progress(self, what: str, *, done: int, total: int) -> None:
        """`done` of `total` parts (bytes, tensors) of `what` stand; call it some ten times a second at most."""
        self._write({"event": "progress", "what": what, "done": done, "total": total})

    def ready(self, **facts: Any) -> None:
        """The process serves now. `facts` are for people: model, dtype, device, context_tokens, blocks, port…"""
        self._write({"event": "ready", **facts})

    def failed(self, error: BaseException) -> None:
        """Start-up failed; the process exits with code 1 after this."""
        code = error.code if isinstance(error, TokenRelayError) else "internal_error"
        name = "" if isinstance(error, TokenRelayError) else f"{type(error).__name__}: "
        self._write({"event": "failed", "code": code, "message": f"{name}{error}"})

    def _write(self, fields: dict[str, Any]) -> None:
        if self._fd is not None:
            line = json.dumps(fields, default=str).encode()[: LINE_BYTES_MAX - 1] + b"\n"
            with contextlib.suppress(BrokenPipeError):
                os.write(self._fd, line)


def parse_status(line: bytes) -> dict[str, Any] | None:
    """The reading end: the object on this line, or None where it is not one of ours."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) and isinstance(fields.get("event"), str) else None
