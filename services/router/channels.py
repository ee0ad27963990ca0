"""Replies in channels, as gpt-oss writes them (OpenAI's harmony format,
https://github.com/openai/harmony/blob/main/docs/format.md).

    <|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary to=functions.read <|constrain|>json
    <|message|>{"path": "a"}<|call|>

`analysis` is reasoning; `final`, and `commentary` to nobody, are content; a message to `functions.NAME` is a call.
"""

from __future__ import annotations

import re

from tokenrelay.services.router.tool_scanner import NoCall, Reading, Scanner, Steps
from tokenrelay.services.router.tools import Thought

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
END, CALL, RETURN, CONSTRAIN = "<|end|>", "<|call|>", "<|return|>", "<|constrain|>"
TAGS = (START, CHANNEL, MESSAGE, END, CALL, RETURN, CONSTRAIN)
_HEADERS = (START, CHANNEL, " to=", "to=")  # the first one of a reply begins behind the prompt's `<|start|>assistant`
_BODY_ENDS = (END, CALL, RETURN, START, CHANNEL)
_HEADER_CHARS_MAX = 256
_RECIPIENT = re.compile(r"to=functions\.([^\s<]+)")
_REASONING = re.compile(r"<\|channel\|>\s*analysis")


class ChannelParser(Scanner):
    """One reply: reasoning, content and calls (`tools`: where there may be any)."""

    def __init__(self, *, tools: bool) -> None:
        self._tools = tools
        super().__init__()

    def _read(self) -> Steps:
        """Headers and bodies in turn. What has no header is content."""
        while (yield from self._any_left()):
            header = yield from self._header()
            if header is None:
                self._emit_text(self._take(1))  # a tag that begins no header is text
            recipient = _RECIPIENT.search(header or "") if self._tools else None
            if recipient is not None:
                name = recipient.group(1)
                yield from self._call_at("", lambda name=name: self._call(name))  # type: ignore[misc]
            yield from self._body(reasoning=recipient is None and _REASONING.search(header or "") is not None)

    def _any_left(self) -> Reading[bool]:
        while not self._buffer:
            if self._ended:
                return False
            yield
        return True

    def _header(self) -> Reading[str | None]:
        """A header, taken; "" where none begins here, None where something only begins like one."""
        while not any(self._buffer.startswith(tag) for tag in _HEADERS):
            if self._ended or not any(tag.startswith(self._buffer) for tag in _HEADERS):
                return ""
            yield
        while True:
            place = self._buffer.find(MESSAGE)
            if 0 <= place <= _HEADER_CHARS_MAX:
                return self._take(place + len(MESSAGE))
            if self._ended or len(self._buffer) > _HEADER_CHARS_MAX + len(MESSAGE):
                return None
            yield

    def _body(self, *, reasoning: bool) -> Steps:
        while True:
            place, marker = self._find(_BODY_ENDS)
            text = self._take(place)
            if not reasoning:
                self._emit_text(text)
            elif text:
                self._events.append(Thought(text))
            if marker is not None:
                if marker in (END, CALL, RETURN):
                    self._take(len(marker))
                return
            if self._ended:
                return
            yield

    def _call(self, name: str) -> Steps:
        yield from self._space()
        if not self._buffer.startswith("{"):
            raise NoCall
        self._start(name)
        yield from self._json_arguments()
        self._end()
