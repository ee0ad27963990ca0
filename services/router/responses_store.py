"""Responses that a next request may go on from (`previous_response_id`), or that somebody asks for again.

    store = ResponseStore(bytes_max)
    store.put(tenant, Stored(id, messages, unanswered, reply))
    store.get(tenant, id)              # None: never here, or no longer

In this router's memory, least recently used first out, and only for who made them. A response that is gone is an
error that the client can mend by sending its items; no answer depends on one silently.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenrelay.services.router.openai_types import Message

_ENTRY_BYTES = 500  # what an entry costs beside its texts
_MESSAGE_BYTES = 200


@dataclass(frozen=True)
class Stored:
    """One response: the conversation up to its end, calls without an output, and the reply as JSON."""

    response_id: str
    messages: Sequence[Message]
    unanswered: frozenset[str]
    reply: bytes
    bytes: int = field(init=False)

    def __post_init__(self) -> None:
        size = _ENTRY_BYTES + len(self.reply) + sum(_size(message) for message in self.messages)
        object.__setattr__(self, "bytes", size)


def _size(message: Message) -> int:
    content = message.content
    text = content if isinstance(content, str) else ""
    calls = sum(
        len(call.function.name) + len(str(call.function.arguments)) + _MESSAGE_BYTES
        for call in message.tool_calls or ()
    )
    return _MESSAGE_BYTES + len(text) + len(message.reasoning_content or "") + calls


class ResponseStore:
    """Bounded in bytes, texts that two responses share counted for each. Event loop only."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[tuple[bytes, str], Stored] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, tenant: bytes, stored: Stored) -> None:
        """Keep it, and forget what was not used for the longest time."""
        self.drop(tenant, stored.response_id)
        if stored.bytes > self._bytes_max:
            return
        self._entries[tenant, stored.response_id] = stored
        self.bytes += stored.bytes
        while self.bytes > self._bytes_max:
            _, oldest = self._entries.popitem(last=False)
            self.bytes -= oldest.bytes

    def get(self, tenant: bytes, response_id: str) -> Stored | None:
        """This tenant's response."""
        stored = self._entries.get((tenant, response_id))
        if stored is not None:
            self._entries.move_to_end((tenant, response_id))
        return stored

    def drop(self, tenant: bytes, response_id: str) -> bool:
        """Forget it; whether it was there."""
        stored = self._entries.pop((tenant, response_id), None)
        if stored is not None:
            self.bytes -= stored.bytes
        return stored is not None
