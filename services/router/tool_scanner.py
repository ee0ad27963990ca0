"""What the tool parsers share: a parser is a generator that reads its text as if all of it were there.

    class Mine(Scanner):
        def _read(self) -> Steps:
            while (yield from self._text_until(("<call>",))) is not None:
                yield from self._call_at("<call>", self._one_call)

`yield` means "more text, please". Reading functions raise `NoCall` where a call is none; `_call_at` makes it text. They
decide only on what cannot change with further text, so that how the text was cut cannot matter.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from tokenrelay.services.router.json_stream import JsonObject
from tokenrelay.services.router.reasoning import held_suffix
from tokenrelay.services.router.tools import CallArguments, CallBroken, CallEnd, CallStart, Event, Text

CALL_CHARS_MAX = 1 << 20  # a call that grows beyond this is text
HEAD_CHARS_MAX = 1_024  # a name that takes longer is none
WHITESPACE = " \t\r\n"

T = TypeVar("T")
Reading = Generator[None, None, T]
Steps = Reading[None]


class NoCall(Exception):
    """What was read is no call."""


class Scanner:
    """One sequence. Feeding costs O(new characters)."""

    def __init__(self) -> None:
        self._buffer = ""
        self._ended = False  # nothing comes behind the buffer
        self._events: list[Event] = []
        self._raw: list[str] | None = None  # what was taken of the call that is read
        self._raw_chars = 0
        self._started = False  # its CallStart has left
        self._calls = 0  # indices given out
        self._between = False  # after a call: whitespace up to the next text or call is dropped
        self._steps = self._read()
        next(self._steps, None)

    def _read(self) -> Steps:
        """The grammar. Ends when everything was read."""
        raise NotImplementedError

    def feed(self, text: str) -> list[Event]:
        """What is certain now."""
        self._buffer += text
        return self._advance()

    def finish(self) -> list[Event]:
        """The text is whole: let go of what was held back."""
        self._ended = True
        return self._advance()

    def _advance(self) -> list[Event]:
        next(self._steps, None)
        events, self._events = self._events, []
        return events

    # -- reading ------------------------------------------------------------------------------------------------------
    def _take(self, count: int) -> str:
        text, self._buffer = self._buffer[:count], self._buffer[count:]
        if self._raw is not None and text:
            self._raw.append(text)
            self._raw_chars += len(text)
        return text

    def _find(self, markers: Sequence[str]) -> tuple[int, str | None]:
        """(where the first marker begins, the marker), or (what is certainly before any, None)."""
        places = [(place, marker) for marker in markers if (place := self._buffer.find(marker)) >= 0]
        if places:
            return min(places)
        held = 0 if self._ended else max(held_suffix(self._buffer, marker) for marker in markers)
        return len(self._buffer) - held, None

    def _text_until(self, markers: Sequence[str]) -> Reading[str | None]:
        """Emit text up to the first marker, which is not taken; None at the end. Whitespace before it belongs to it."""
        while True:
            place, marker = self._find(markers)
            before = self._buffer[:place]
            if marker is not None or not self._ended:
                before = before.rstrip(WHITESPACE)
            self._take(len(before))
            self._emit_text(before)
            if marker is not None:
                self._take(place - len(before))
                return marker
            if self._ended:
                return None
            yield

    def _emit_text(self, text: str) -> None:
        if self._between:
            text = text.lstrip(WHITESPACE)
        if text:
            self._between = False
            self._events.append(Text(text))

    def _need(self, count: int) -> Steps:
        """Until so many characters are there. Raises NoCall where they never will be."""
        while len(self._buffer) < count:
            self._more_of_call()
            yield

    def _more_of_call(self) -> None:
        """Before waiting inside a call."""
        if self._ended or self._raw_chars + len(self._buffer) > CALL_CHARS_MAX:
            raise NoCall

    def _match(self, pattern: re.Pattern[str], *, until: Sequence[str] = ()) -> Reading[re.Match[str]]:
        """Take what the pattern matches: within HEAD_CHARS_MAX, and before any of `until`. Raises NoCall. The pattern
        must end in something that only can be written when it is whole.
        """
        while True:
            found = pattern.match(self._buffer)
            place, marker = self._find(until) if until else (len(self._buffer), None)
            limit = min(place, HEAD_CHARS_MAX) if marker is not None else HEAD_CHARS_MAX
            if found is not None and found.end() <= limit:
                self._take(found.end())
                return found
            if marker is not None or found is not None or len(self._buffer) > HEAD_CHARS_MAX:
                raise NoCall
            self._more_of_call()
            yield

    def _space(self) -> Steps:
        """Take whitespace, up to a character that is none or the end."""
        while True:
            self._take(len(self._buffer) - len(self._buffer.lstrip(WHITESPACE)))
            if self._buffer or self._ended:
                return
            self._more_of_call()
            yield

    def _follows(self, marker: str) -> Reading[bool]:
        """Whether the marker is what comes next; it is taken if so."""
        while not self._buffer.startswith(marker):
            if self._ended or not marker.startswith(self._buffer):
                return False
            yield
        self._take(len(marker))
        return True

    def _expect(self, marker: str, *, or_end: bool = False) -> Steps:
        """Take whitespace and the marker. Raises NoCall where something else stands; `or_end`: the end will do."""
        yield from self._space()
        if or_end and self._ended and not self._buffer:
            return
        if not (yield from self._follows(marker)):
            raise NoCall

    # -- calls --------------------------------------------------------------------------------------------------------
    def _call_at(self, marker: str, read: Callable[[], Steps]) -> Steps:
        """Take the marker and read a call; if it is none, what was taken is text, and reading goes on behind it."""
        self._raw, self._raw_chars, self._started = [], 0, False
        self._take(len(marker))
        try:
            yield from read()
        except NoCall:
            raw = "".join(self._raw)
            if self._started:
                self._events.append(CallBroken(self._calls, raw))
                self._calls += 1
            elif raw:
                self._events.append(Text(raw))
            self._between = self._between and not raw
        self._raw = None

    def _start(self, name: str, call_id: str | None = None) -> None:
        self._started = True
        self._events.append(CallStart(self._calls, call_id or f"call_{secrets.token_hex(12)}", name))

    def _arguments(self, text: str) -> None:
        if text:
            self._events.append(CallArguments(self._calls, text))

    def _end(self) -> None:
        """The call is whole; what follows may be another one."""
        self._events.append(CallEnd(self._calls))
        self._calls += 1
        self._between = True
        self._raw, self._raw_chars, self._started = [], 0, False

    def _json_arguments(self) -> Steps:
        """Stream an object. Raises NoCall where it is none."""
        scan = JsonObject()
        while True:
            text, taken = scan.feed(self._buffer)
            self._take(taken)
            self._arguments(text)
            if scan.bad or self._raw_chars > CALL_CHARS_MAX:
                raise NoCall
            if scan.done:
                return
            self._more_of_call()
            yield
