"""What a sequence's text becomes: a delta of content, reasoning and tool calls.

A `Delta` gathers until somebody takes it: a stream after each step it can write, a unary reply at the end.
"""

from __future__ import annotations

from typing import Protocol

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.reasoning import ReasoningParser
from tokenrelay.services.router.tools import (
    CallArguments,
    CallBroken,
    CallEnd,
    CallStart,
    Event,
    Parser,
    Text,
    Thought,
)


class Delta:
    """What is new since it was last taken. `size` is about its bytes, for the bound on slow readers."""

    __slots__ = ("content", "events", "logprobs", "reasoning", "token_ids")

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.events: list[Event] = []  # where calls may be: those, and the text (`content` once more), in order
        self.token_ids: list[int] = []
        self.logprobs: list[worker_pb2.TokenLogprobs] = []

    @property
    def size(self) -> int:
        """About how many bytes this takes."""
        events = sum(len(event.text) if isinstance(event, CallArguments) else 64 for event in self.events)
        return len(self.content) + len(self.reasoning) + events + 4 * len(self.token_ids) + 64 * len(self.logprobs)

    @property
    def says_something(self) -> bool:
        """Whether a client would miss anything, tokens and log-probabilities aside."""
        return bool(
            self.content
            or self.reasoning
            or (self.events and any(isinstance(event, CallStart | CallArguments) for event in self.events))
        )

    def ordered(self) -> list[Event]:
        """Content and calls in the order in which they were written."""
        return self.events or ([Text(self.content)] if self.content else [])


class TextSink(Protocol):
    """Turns one sequence's text into deltas."""

    needs_tags: bool  # special tokens that the parsers know must be in the text
    may_end: bool  # the sink may find that the sequence is over

    @property
    def ended(self) -> bool:
        """Nothing further is wanted."""

    def feed(self, text: str, delta: Delta) -> None:
        """Take text."""

    def finish(self, delta: Delta) -> None:
        """The text is whole: let go of what was held back."""

    def finish_reason(self, reason: str) -> str:
        """The reason that a client should see."""


class PlainText:
    """Completions: the text is the answer."""

    needs_tags = False
    may_end = False
    ended = False

    def feed(self, text: str, delta: Delta) -> None:
        """All of it is content."""
        delta.content += text

    def finish(self, delta: Delta) -> None:
        """Nothing is held."""

    def finish_reason(self, reason: str) -> str:
        """As it was."""
        return reason


class ChatText:
    """Chat: reasoning, then content and tool calls. Parsers that the request does not need are not run."""

    def __init__(
        self,
        *,
        think: tuple[str, str] | None = None,
        inside_thinking: bool = False,
        tools: Parser | None = None,
        calls_max: int | None = None,
    ) -> None:
        """`think`: the tags around reasoning, if there are any; `tools`: what finds calls."""
        self._reasoning = ReasoningParser(inside=inside_thinking, tags=think) if think is not None else None
        self._tools = tools
        self._calls_max = calls_max
        self._calls = 0  # whole ones
        self.needs_tags = think is not None or tools is not None
        self.may_end = tools is not None and calls_max is not None

    @property
    def ended(self) -> bool:
        """All calls that may be made were made."""
        return self._calls_max is not None and self._calls >= self._calls_max

    def feed(self, text: str, delta: Delta) -> None:
        """Split reasoning off, then calls."""
        if self._reasoning is not None:
            if not self._reasoning.done:
                reasoning, text = self._reasoning.feed(text)
                delta.reasoning += reasoning
            if not text:
                return
        self._feed_content(text, delta)

    def _feed_content(self, text: str, delta: Delta) -> None:
        if self._tools is None:
            delta.content += text
        else:
            self._take(self._tools.feed(text), delta)

    def _take(self, events: list[Event], delta: Delta) -> None:
        for event in events:
            if self.ended:
                return
            if isinstance(event, Thought):
                delta.reasoning += event.text
                continue
            if isinstance(event, Text | CallBroken):
                delta.content += event.text
            elif isinstance(event, CallEnd):
                self._calls += 1
            delta.events.append(event)

    def finish(self, delta: Delta) -> None:
        """Let go of what the parsers held."""
        if self._reasoning is not None and not self._reasoning.done:
            reasoning, text = self._reasoning.finish()
            delta.reasoning += reasoning
            if text:
                self._feed_content(text, delta)
        if self._tools is not None:
            self._take(self._tools.finish(), delta)

    def finish_reason(self, reason: str) -> str:
        """`tool_calls` when there are any and nothing cut the answer short."""
        return "tool_calls" if self._calls and reason == "stop" else reason


def whole_calls(events: list[Event]) -> list[tuple[str, str, str]]:
    """(id, name, arguments) of the calls that are whole, for a unary reply."""
    calls: dict[int, tuple[str, str, list[str]]] = {}
    whole = []
    for event in events:
        if isinstance(event, CallStart):
            calls[event.index] = (event.call_id, event.name, [])
        elif isinstance(event, CallArguments):
            calls[event.index][2].append(event.text)
        elif isinstance(event, CallEnd):
            call_id, name, pieces = calls[event.index]
            whole.append((call_id, name, "".join(pieces)))
    return whole
