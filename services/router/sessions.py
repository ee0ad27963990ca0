"""Where a session's last request went, so that its next one goes there, too.

    key = session_key(b"conversation-1", salt)
    sessions.put(key, worker.target)
    sessions.get(key)                     # its target, or None

A client names its session by the header `X-Session-Id` or, as OpenAI's clients do, by `prompt_cache_key`. It is a hint
beside the prompt's beginning: where a conversation was compacted its next prompt begins anew, and the system prompt
and tools are at that worker still. Bounded, least recently used first out.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict

SESSIONS_MAX = 1 << 16


def session_key(session: bytes, salt: bytes) -> bytes:
    """16 bytes of a session's name, within what shares a cache: tenants may use the same names."""
    return hashlib.blake2b(session, digest_size=16, key=hashlib.blake2b(salt, digest_size=32).digest()).digest()


class Sessions:
    """Of one router. Event loop only."""

    def __init__(self, sessions_max: int = SESSIONS_MAX) -> None:
        self._max = sessions_max
        self._targets: OrderedDict[bytes, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._targets)

    def get(self, key: bytes) -> str | None:
        """The target of its last request."""
        return self._targets.get(key)

    def put(self, key: bytes, target: str) -> None:
        """Its request went there."""
        self._targets[key] = target
        self._targets.move_to_end(key)
        if len(self._targets) > self._max:
            self._targets.popitem(last=False)
