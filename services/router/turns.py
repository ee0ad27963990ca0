"""The turns that workers still hold the text of, so that a next turn is sent as (parent, appended tokens).

A conversation's next prompt begins with the last one, and mostly with what was answered to it. Where a worker has
that text, 50,000 tokens need not travel again, nor be hashed again. It is a hint: a worker that no longer has it says
so, and gets all tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from tokenrelay.services.chassis.client import WorkerClient

PARENT_TOKENS_MIN = 512  # a shorter beginning is sent as it is
TURNS_MAX = 512  # a look-up looks at each length of prompt that is known
_TAIL_BYTES = 256  # compared first: conversations differ there, not in their system prompt
_ENTRY_BYTES = 400  # what a turn costs beside its text


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A sequence that a worker has ended: the packed ids of its prompt and output."""

    client: WorkerClient
    connection: int  # which session with it: a worker that came back knows nothing of before
    sequence: int
    text: bytes
    prompt_bytes: int
    salt: bytes

    def at(self, client: WorkerClient) -> bool:
        """Whether this worker may have its text."""
        return self.client is client and self.connection == client.connections


@dataclass(frozen=True, slots=True)
class Inherited:
    """The beginning of a prompt: so many tokens of a turn."""

    turn: Turn
    tokens: int


class TurnMemory:
    """Turns of one router, least recently used first out. Bounded in bytes and in number; one thread."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._turns: OrderedDict[Turn, None] = OrderedDict()
        self._by_end: dict[int, list[Turn]] = {}  # bytes of the prompt -> turns, the last one last
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._turns)

    def remember(self, turn: Turn, parent: Turn | None = None) -> None:
        """A sequence ended. Its parent's text is part of its own: that turn is forgotten."""
        if parent is not None:
            self._forget(parent)
        if len(turn.text) < 4 * PARENT_TOKENS_MIN or len(turn.text) + _ENTRY_BYTES > self._bytes_max:
            return
        self._turns[turn] = None
        self._by_end.setdefault(turn.prompt_bytes, []).append(turn)
        self.bytes += len(turn.text) + _ENTRY_BYTES
        while self.bytes > self._bytes_max or len(self._turns) > TURNS_MAX:
            self._forget(next(iter(self._turns)))

    def find(self, packed: bytes, salt: bytes) -> Inherited | None:
        """The turn with the longest prompt that this prompt begins with, and how far it goes along with it."""
        best: Turn | None = None
        for end, turns in self._by_end.items():
            if end < len(packed) and (best is None or end > best.prompt_bytes):
                best = next((turn for turn in reversed(turns) if _begins(packed, turn, salt)), best)
        if best is None:
            return None
        self._turns.move_to_end(best)
        tokens = _common_tokens(packed, best.text, best.prompt_bytes // 4)
        return Inherited(best, tokens) if tokens >= PARENT_TOKENS_MIN else None

    def _forget(self, turn: Turn) -> None:
        if turn not in self._turns:
            return
        del self._turns[turn]
        self.bytes -= len(turn.text) + _ENTRY_BYTES
        others = self._by_end[turn.prompt_bytes]
        others.remove(turn)
        if not others:
            del self._by_end[turn.prompt_bytes]


def _begins(packed: bytes, turn: Turn, salt: bytes) -> bool:
    """Whether the prompt begins with the turn's prompt."""
    end = turn.prompt_bytes
    start = max(0, end - _TAIL_BYTES)
    if packed[start:end] != turn.text[start:end] or turn.salt != salt:
        return False
    return memoryview(packed)[:end] == memoryview(turn.text)[:end]


def _common_tokens(packed: bytes, text: bytes, known: int) -> int:
    """Tokens that both begin with, `known` of them for certain; one of the prompt is left to be appended at least."""
    low, high = known, min(len(packed) // 4 - 1, len(text) // 4)
    one, other = memoryview(packed), memoryview(text)
    while low < high:  # equal up to `low`, not known beyond
        middle = (low + high + 1) // 2
        if one[4 * low : 4 * middle] == other[4 * low : 4 * middle]:
            low = middle
        else:
            high = middle - 1
    return low
