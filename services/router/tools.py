"""What parsers find in a reply: text, and calls whose arguments stream as they come.

A call that turns out malformed becomes text, tags and all: `CallBroken` carries it; a unary reply then shows the text
alone, a stream cannot take back what it sent and shows both, without finish_reason "tool_calls". What has streamed of
arguments is always the beginning of a valid JSON object, and all of them one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Text:
    """Text outside calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """Reasoning, where it is the same parser that tells it apart."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call whose name is known."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of a call's arguments, JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The call is whole and valid JSON."""

    index: int


@dataclass(frozen=True, slots=True)
class CallBroken:
    """The call with this index, which has started, is none: here is what was written, as text."""

    index: int
    text: str


Event = Text | Thought | CallStart | CallArguments | CallEnd | CallBroken


class Parser(Protocol):
    """One sequence's text as events. However the text is cut into pieces, the events say the same."""

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""

    def finish(self) -> list[Event]:
        """The text is whole: let go of what was held back."""
