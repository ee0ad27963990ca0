"""Calls whose arguments are JSON, as different models write them. Formats are the models' own chat templates'.

- Hermes, Qwen, the bundled model: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`
- DeepSeek V3, R1: `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a fenced block of JSON, `<｜tool▁call▁end｜>`;
  V3.1: `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`
- Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>`
- Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and newer `[TOOL_CALLS]NAME[ARGS]{…}`
- Llama 3: `{"name": …, "parameters": {…}}`, alone or behind `<|python_tag|>`, several separated by `;`
"""

from __future__ import annotations

import re

import msgspec

from tokenrelay.services.router.tool_scanner import WHITESPACE, NoCall, Reading, Scanner, Steps

_STRING = r'"(?:[^"\\]|\\.)*"'
_NAMED = re.compile(
    rf'\s*\{{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*({_STRING})\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)',
    re.DOTALL,
)


def decode_string(text: str) -> str:
    """A JSON string that must say something. Raises NoCall."""
    try:
        value = msgspec.json.decode(text, type=str)
    except ValueError:
        raise NoCall from None
    if not value:
        raise NoCall
    return value


class HermesParser(Scanner):
    """`<tool_call>{"name": …, "arguments": {…}}</tool_call>`. Other keys, and another order, do not stream."""

    OPEN, CLOSE = "<tool_call>", "</tool_call>"

    def _read(self) -> Steps:
        while (yield from self._text_until((self.OPEN,))) is not None:
            yield from self._call_at(self.OPEN, self._one)

    def _one(self) -> Steps:
        try:
            found = yield from self._match(_NAMED, until=(self.CLOSE,))
        except NoCall:
            yield from self._whole()
            return
        self._start(decode_string(found.group(1)))
        yield from self._json_arguments()
        yield from self._expect("}")
        yield from self._expect(self.CLOSE, or_end=True)
        self._end()

    def _whole(self) -> Steps:
        """A call that is read once all of it is there."""
        while self.CLOSE not in self._buffer:
            if self._ended:
                break
            self._more_of_call()
            yield
        text, _, _ = self._buffer.partition(self.CLOSE)
        name, arguments = _named_call(text)
        self._take(len(text) + len(self.CLOSE))
        self._start(name)
        self._arguments(arguments)
        self._end()


def _named_call(text: str) -> tuple[str, str]:
    """(name, arguments as JSON) of an object. Raises NoCall."""
    try:
        value = msgspec.json.decode(text.strip(WHITESPACE))
        if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not value["name"]:
            raise NoCall
        arguments = value.get("arguments", value.get("parameters", {}))
        if isinstance(arguments, str):  # JSON in a JSON string, as OpenAI's own API has it
            arguments = msgspec.json.decode(arguments)
    except (ValueError, RecursionError):
        raise NoCall from None
    if not isinstance(arguments, dict):
        raise NoCall
    return value["name"], msgspec.json.encode(arguments).decode()


class _Sectioned(Scanner):
    """Calls between marks, in a section with marks of its own, which are dropped."""

    SECTION: tuple[str, ...] = ()
    OPEN = ""
    CLOSE = ""
    HEAD: re.Pattern[str]
    TAIL = ""  # may stand between the arguments and the close mark

    def _read(self) -> Steps:
        markers = (*self.SECTION, self.OPEN)
        while (marker := (yield from self._text_until(markers))) is not None:
            if marker == self.OPEN:
                yield from self._call_at(marker, self._one)
            else:
                self._take(len(marker))
                self._between = True

    def _one(self) -> Steps:
        head = yield from self._match(self.HEAD, until=(self.CLOSE,))
        groups = head.groupdict()
        name = next((value for key, value in groups.items() if key.startswith("name") and value), "").strip()
        if not name:
            raise NoCall
        self._start(name, groups.get("id"))
        yield from self._json_arguments()
        yield from self._space()
        if self.TAIL and (yield from self._follows(self.TAIL)):
            yield from self._space()
        yield from self._expect(self.CLOSE, or_end=True)
        self._end()


class DeepSeekParser(_Sectioned):
    """DeepSeek V3, R1 and V3.1."""

    SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
    OPEN, CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    TAIL = "```"
    HEAD = re.compile(
        r"\s*(?:function<｜tool▁sep｜>(?P<name_fenced>[^\n<{]+)\s*```(?:json)?|(?P<name>[^\n<{]+)<｜tool▁sep｜>)\s*(?=\{)"
    )


class KimiParser(_Sectioned):
    """Kimi K2. The id is the model's own: its template shows it again."""

    SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
    OPEN, CLOSE = "<|tool_call_begin|>", "<|tool_call_end|>"
    HEAD = re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[^\s:<{]+):\d+)\s*<\|tool_call_argument_begin\|>\s*(?=\{)")


class MistralParser(Scanner):
    """Mistral, older tokenizers and newer ones."""

    OPEN = "[TOOL_CALLS]"
    _HEAD = re.compile(r"\s*(?P<name>[^\s\[\]{}]+)\s*(?:\[CALL_ID\](?P<id>[^\[{]+))?(?:\[ARGS\])?\s*(?=\{)")

    def _read(self) -> Steps:
        while (yield from self._text_until((self.OPEN,))) is not None:
            yield from self._call_at(self.OPEN, self._calls_behind)

    def _calls_behind(self) -> Steps:
        yield from self._space()
        if (yield from self._follows("[")):
            yield from self._array()
            return
        head = yield from self._match(self._HEAD, until=(self.OPEN,))
        self._start(head.group("name"), head.group("id"))
        yield from self._json_arguments()
        self._end()

    def _array(self) -> Steps:
        while True:
            found = yield from self._match(_NAMED)
            self._start(decode_string(found.group(1)))
            yield from self._json_arguments()
            yield from self._expect("}")
            self._end()
            if not (yield from self._another()):
                return

    def _another(self) -> Reading[bool]:
        """Behind a call of an array: whether another one comes. What is neither that nor the array's end is text."""
        try:
            yield from self._space()
            if (yield from self._follows(",")):
                return True
            yield from self._follows("]")
        except NoCall:
            pass
        return False


class LlamaParser(Scanner):
    """Llama 3: the whole reply is calls, or none of it is."""

    TAG = "<|python_tag|>"

    def _read(self) -> Steps:
        while not self._buffer.lstrip(WHITESPACE) and not self._ended:
            yield
        yield from self._call_at("", self._all)
        yield from self._text_until((self.TAG,))
        while self._buffer:
            yield from self._call_at(self.TAG, self._all)
            yield from self._text_until((self.TAG,))

    def _all(self) -> Steps:
        """Calls, until one does not end in a separator."""
        yield from self._space()
        yield from self._follows(self.TAG)
        yield from self._space()
        while True:
            if not self._buffer.startswith("{"):
                raise NoCall
            found = yield from self._match(_NAMED)
            self._start(decode_string(found.group(1)))
            yield from self._json_arguments()
            yield from self._expect("}")
            self._end()
            if not (yield from self._separated()):
                return

    def _separated(self) -> Reading[bool]:
        try:
            yield from self._space()
            if not (yield from self._follows(";")):
                return False
            yield from self._space()
        except NoCall:
            return False
        return bool(self._buffer)
