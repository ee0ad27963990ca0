"""Tool calls in a reply, as Hermes and Qwen write them: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`.

    parser = ToolCallParser()
    parser.feed('Let me see.\\n<tool_call>\\n{"name": "read", "arguments": {"pa')
    # [Text("Let me see."), CallStart(0, "call_…", "read"), CallArguments(0, '{"pa')]
    parser.feed('th": "a"}}\\n</tool_call>')
    # [CallArguments(0, 'th": "a"}'), CallEnd(0)]

Arguments stream as they come. A call that turns out malformed becomes text, tags and all: `CallBroken` carries it; a
unary reply then shows the text alone, a stream cannot take back what it sent and shows both, without finish_reason
"tool_calls". Whitespace around the tags belongs to them.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any

import msgspec

from tokenrelay.services.router.reasoning import held_suffix

OPEN = "<tool_call>"
CLOSE = "</tool_call>"
CALL_CHARS_MAX = 1 << 20  # a call that grows beyond this is text
_HEAD_CHARS_MAX = 1_024  # a name that takes longer does not stream

_WHITESPACE = " \t\r\n"
_STRUCTURE = re.compile(r'[\\"{}\[\]<]')
_NAME = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """Text outside calls."""

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
    """The call with this index is none: here is what was written, as text. `started`: a CallStart has left."""

    index: int
    text: str
    started: bool


Event = Text | CallStart | CallArguments | CallEnd | CallBroken


class ToolCallParser:
    """One sequence. Feeding costs O(new characters)."""

    def __init__(self) -> None:
        self._held = ""  # outside: what may begin a tag, and the whitespace before it
        self._between = False  # after a call: whitespace up to the next text or call is dropped
        self._call: _Call | None = None
        self._calls = 0  # indices given out

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        events: list[Event] = []
        while text or self._held:
            if self._call is None:
                text = self._feed_outside(text, events)
            else:
                text = self._feed_inside(self._call, text, events)
            if not text:
                break
        return events

    def _feed_outside(self, text: str, events: list[Event]) -> str:
        """Emit text up to the next open tag; returns what follows the tag."""
        before, tag, after = (self._held + text).partition(OPEN)
        if tag:
            self._held = ""
            self._emit(before.rstrip(_WHITESPACE), events)
            self._call = _Call(self._calls)
            return after
        ready = before[: len(before) - held_suffix(before, OPEN)].rstrip(_WHITESPACE)
        self._held = before[len(ready) :]
        self._emit(ready, events)
        return ""

    def _emit(self, text: str, events: list[Event]) -> None:
        if self._between:
            text = text.lstrip(_WHITESPACE)
        if text:
            self._between = False
            events.append(Text(text))

    def _feed_inside(self, call: _Call, text: str, events: list[Event]) -> str:
        after = call.feed(text, events)
        if after is not None:
            self._end(call, call.close(), events)
            return after
        if call.size > CALL_CHARS_MAX:
            self._end(call, False, events)
        return ""

    def _end(self, call: _Call, valid: bool, events: list[Event]) -> None:
        self._call = None
        if valid:
            events.extend(call.last_events())
            self._between = True
        else:
            events.append(CallBroken(call.index, call.raw(), call.started))
            self._between = False
        if valid or call.started:
            self._calls += 1

    def finish(self) -> list[Event]:
        """At the end of the sequence: a call that only lacks its close tag counts; one cut short is text."""
        events: list[Event] = []
        if self._call is not None:
            call = self._call
            call.flush(events)
            self._end(call, call.close(), events)
        elif self._held and not (self._between and not self._held.strip(_WHITESPACE)):
            self._emit(self._held, events)
        self._held = ""
        return events


class _Call:
    """The inside of one pair of tags."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.started = False
        self.closed = False  # the close tag was seen
        self.size = 0
        self._pieces: list[str] = []  # everything so far but `_held`
        self._held = ""  # what may begin the close tag
        self._head = ""  # until the arguments begin
        self._depth = 0  # of the arguments object: 0 before and after it
        self._in_string = False
        self._escaped = False
        self._value: dict[str, Any] | None = None

    def raw(self) -> str:
        """What was written, tags and all."""
        return OPEN + "".join(self._pieces) + self._held + (CLOSE if self.closed else "")

    def feed(self, text: str, events: list[Event]) -> str | None:
        """Take more; returns what follows the close tag, or None while that has not come.

        A close tag inside a JSON string is a part of the string as long as the arguments are being read.
        """
        text = self._held + text
        self._held = ""
        while True:
            if self._depth:
                text = self._arguments(text, events)
                if not text:
                    return None
            before, tag, after = text.partition(CLOSE)
            if not tag:
                keep = held_suffix(before, CLOSE)
                self._held = before[len(before) - keep :] if keep else ""
                before = before[: len(before) - keep]
            rest = self._outside_arguments(before, events)
            if rest is not None:  # the arguments begin in this piece, and with them a tag may be a part of a string
                text = rest + self._held + tag + after
                self._held = ""
                continue
            if tag:
                self.closed = True
                return after
            return None

    def _outside_arguments(self, text: str, events: list[Event]) -> str | None:
        """Before or after the arguments object. Returns the rest of `text` where the object begins in it."""
        if not self.started and len(self._head) < _HEAD_CHARS_MAX:
            self._head += text
            found = _NAME.match(self._head)
            name = _decode_string(found.group(1)) if found else None
            if found and name:
                self.started = True
                self._depth = -1  # the next character opens the object
                call_id = f"call_{secrets.token_hex(12)}"
                events.append(CallStart(self.index, call_id, name))
                rest = self._head[found.end() :]
                self._take(text[: len(text) - len(rest)])
                return rest
        self._take(text)
        return None

    def _arguments(self, text: str, events: list[Event]) -> str:
        """Inside the arguments object; returns what follows it."""
        position, end = (1 if self._escaped and text else 0), None
        self._escaped = self._escaped and not text
        while (found := _STRUCTURE.search(text, position)) is not None:
            position = found.end()
            character = found.group()
            if self._in_string:
                if character == "\\":
                    if position == len(text):
                        self._escaped = True
                    position += 1
                elif character == '"':
                    self._in_string = False
            elif character == '"':
                self._in_string = True
            elif character == "<":  # no JSON: most likely the close tag after too few braces
                self._depth, end = 0, position - 1
                break
            elif character in "{[":
                self._depth = max(self._depth, 0) + 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    end = position
                    break
        piece = text if end is None else text[:end]
        if piece:
            self._take(piece)
            events.append(CallArguments(self.index, piece))
        return text[len(piece) :]

    def flush(self, events: list[Event]) -> None:
        """The sequence ended: what was held back is no close tag."""
        if self._held:
            held, self._held = self._held, ""
            self._take(held)

    def close(self) -> bool:
        """Whether what stands between the tags is a call."""
        try:
            value = msgspec.json.decode("".join(self._pieces).strip())
        except (ValueError, RecursionError):
            return False
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            return False
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # JSON in a JSON string, as OpenAI's own API has it
            try:
                arguments = msgspec.json.decode(arguments)
            except (ValueError, RecursionError):
                return False
        self._value = {"name": value["name"], "arguments": arguments}
        return isinstance(arguments, dict)

    def last_events(self) -> list[Event]:
        """What has not streamed, and the end."""
        if self.started or self._value is None:
            return [CallEnd(self.index)]
        arguments = msgspec.json.encode(self._value["arguments"]).decode()
        call_id = f"call_{secrets.token_hex(12)}"
        start = CallStart(self.index, call_id, self._value["name"])
        return [start, CallArguments(self.index, arguments), CallEnd(self.index)]

    def _take(self, text: str) -> None:
        self._pieces.append(text)
        self.size += len(text)


def _decode_string(text: str) -> str | None:
    try:
        return msgspec.json.decode(text, type=str)
    except ValueError:
        return None
