"""Calls whose arguments are written one by one between tags, and leave as JSON.

- Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>\\nVALUE\\n</parameter>…</function></tool_call>`
- GLM 4.5 and later: `<tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>…</tool_call>`
- DeepSeek V3.2: `<｜DSML｜invoke name="NAME">`, for each argument `<｜DSML｜parameter name="KEY" string="true">VALUE`
  and `</｜DSML｜parameter>`, then `</｜DSML｜invoke>`

Values carry no types, so the tool's schema says what is a string: those stream. Anything else is read as JSON once it
is whole, and is a string where it is none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from tokenrelay.services.router.reasoning import held_suffix
from tokenrelay.services.router.tool_scanner import NoCall, Reading, Scanner, Steps

_PYTHON = {"True": "true", "False": "false", "None": "null"}


def json_string(text: str) -> str:
    """The inside of a JSON string that says this."""
    return msgspec.json.encode(text).decode()[1:-1]


def _types(tools: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Tool -> argument -> its `type`."""
    result: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function")
        if isinstance(function, Mapping) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
            known = properties.items() if isinstance(properties, Mapping) else ()
            result[function["name"]] = {key: schema.get("type") for key, schema in known if isinstance(schema, Mapping)}
    return result


class _Pairs(Scanner):
    """One way to write pairs."""

    SECTION: tuple[str, ...] = ()
    OPEN = ""
    HEAD: re.Pattern[str]  # behind the open mark: `name`
    KEY: re.Pattern[str]  # `key`, and perhaps `string`: whether it is one
    KEY_BEGIN = ""
    CLOSE_VALUE = ""
    CLOSE: tuple[str, ...] = ()  # what stands behind the last pair
    TRIM = ""  # once at either end of a value it is no part of it

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._known = _types(tools)
        super().__init__()

    def _read(self) -> Steps:
        markers = (*self.SECTION, self.OPEN)
        while (marker := (yield from self._text_until(markers))) is not None:
            if marker == self.OPEN:
                yield from self._call_at(marker, self._one)
            else:
                self._take(len(marker))
                self._between = True

    def _one(self) -> Steps:
        head = yield from self._match(self.HEAD)
        name = head.group("name").strip()
        if not name:
            raise NoCall
        self._start(name)
        before = "{"
        keys: set[str] = set()
        while True:
            yield from self._space()
            if not (yield from self._begins(self.KEY_BEGIN)):
                break
            pair = yield from self._match(self.KEY)
            key = pair.group("key").strip()
            if key in keys:
                raise NoCall  # an object has each key once
            keys.add(key)
            self._arguments(f'{before}"{json_string(key)}": ')
            yield from self._value(self._is_string(name, key, pair.groupdict().get("string")))
            before = ", "
        for index, marker in enumerate(self.CLOSE):
            yield from self._expect(marker, or_end=index == len(self.CLOSE) - 1)
        self._arguments("}" if keys else "{}")
        self._end()

    def _begins(self, marker: str) -> Reading[bool]:
        """Whether the marker comes next; it is not taken."""
        while not self._buffer.startswith(marker):
            if self._ended or not marker.startswith(self._buffer):
                return False
            self._more_of_call()
            yield
        return True

    def _is_string(self, name: str, key: str, said: str | None) -> bool:
        if said is not None:
            return said == "true"
        known = self._known.get(name)
        return known is None or known.get(key, "string") == "string"

    def _value(self, is_string: bool) -> Steps:
        if self.TRIM:
            yield from self._follows(self.TRIM)
        if is_string:
            self._arguments('"')
            yield from self._string()
            self._arguments('"')
            return
        while self.CLOSE_VALUE not in self._buffer:
            self._more_of_call()
            yield
        text = self._take(self._buffer.index(self.CLOSE_VALUE))
        self._take(len(self.CLOSE_VALUE))
        self._arguments(_as_json(text))

    def _string(self) -> Steps:
        close, trimmed = self.CLOSE_VALUE, self.TRIM + self.CLOSE_VALUE
        while (place := self._buffer.find(close)) < 0:
            held = max(held_suffix(self._buffer, close), held_suffix(self._buffer, trimmed))
            self._arguments(json_string(self._take(len(self._buffer) - held)))
            self._more_of_call()
            yield
        value = self._take(place)
        self._arguments(json_string(value.removesuffix(self.TRIM)))
        self._take(len(close))


def _as_json(text: str) -> str:
    """JSON that says the value."""
    stripped = text.strip()
    stripped = _PYTHON.get(stripped, stripped)
    try:
        msgspec.json.decode(stripped)
    except (ValueError, RecursionError):
        return f'"{json_string(text)}"'
    return stripped


class QwenCoderParser(_Pairs):
    """Qwen3-Coder."""

    OPEN = "<tool_call>"
    HEAD = re.compile(r"\s*<function=(?P<name>[^>\n]+)>")
    KEY_BEGIN, CLOSE_VALUE, TRIM = "<parameter=", "</parameter>", "\n"
    KEY = re.compile(r"<parameter=(?P<key>[^>\n]+)>")
    CLOSE = ("</function>", "</tool_call>")


class GlmParser(_Pairs):
    """GLM 4.5, 4.6, 4.7."""

    OPEN = "<tool_call>"
    HEAD = re.compile(r"\s*(?P<name>[^\s<]+)\s*(?=<(?:arg_key|/tool_call)>)")
    KEY_BEGIN, CLOSE_VALUE = "<arg_key>", "</arg_value>"
    KEY = re.compile(r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>")
    CLOSE = ("</tool_call>",)


class DsmlParser(_Pairs):
    """DeepSeek V3.2."""

    SECTION = ("<｜DSML｜function_calls>", "</｜DSML｜function_calls>")
    OPEN = '<｜DSML｜invoke name="'
    HEAD = re.compile(r'(?P<name>[^">\n]+)">')
    KEY_BEGIN, CLOSE_VALUE = "<｜DSML｜parameter", "</｜DSML｜parameter>"
    KEY = re.compile(r'<｜DSML｜parameter name="(?P<key>[^"]*)"(?: string="(?P<string>true|false)")?>')
    CLOSE = ("</｜DSML｜invoke>",)
