"""A JSON object as it comes, in pieces: what leaves is at every moment the beginning of a valid object.

    scan = JsonObject()
    scan.feed('{"path": "a')      # ('{"path": "a', 11): the text that may leave, and how many characters were taken
    scan.feed('"} rest')          # ('"}', 2), and `done` is set

Where the text is none (`bad` is set) nothing of the wrong character or behind it is taken. Control characters inside
strings, which models write and JSON forbids, leave escaped. Source: RFC 8259.
"""

from __future__ import annotations

import re

DEPTH_MAX = 64
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_SPACE = re.compile(r"[ \t\r\n]+")
_ESCAPES = frozenset('"\\/bfnrt')
_HEX = frozenset("0123456789abcdefABCDEF")
_DIGITS = frozenset("0123456789")
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Numbers: state -> kind of character -> state. A number may end in a state of `_NUMBER_ENDS`.
_NUMBER = {
    "-": {"0": "0", "d": "int"},
    "0": {".": ".", "e": "e"},
    "int": {"0": "int", "d": "int", ".": ".", "e": "e"},
    ".": {"0": "frac", "d": "frac"},
    "frac": {"0": "frac", "d": "frac", "e": "e"},
    "e": {"0": "exp", "d": "exp", "+": "sign"},
    "sign": {"0": "exp", "d": "exp"},
    "exp": {"0": "exp", "d": "exp"},
}
_NUMBER_ENDS = frozenset({"0", "int", "frac", "exp"})


def _digit_kind(character: str) -> str:
    if character in "123456789":
        return "d"
    return {"E": "e", "-": "+"}.get(character, character)


class JsonObject:
    """One object. Feeding costs O(new characters)."""

    def __init__(self) -> None:
        self.done = False
        self.bad = False
        self._stack: list[str] = []  # "{" or "[" of what is open
        self._state = "begin"
        self._rest = ""  # of a literal
        self._hex = ""
        self._high = False  # a first half of a surrogate pair waits for the second
        self._is_key = False

    def feed(self, text: str) -> tuple[str, int]:
        """(what may leave, how many characters of `text` were taken)."""
        out: list[str] = []
        position = 0
        while position < len(text) and not self.done:
            skip = _PLAIN if self._state == "string" else _SPACE if self._state in _BETWEEN else None
            found = skip.match(text, position) if skip is not None and not self._high else None
            if found is not None:
                out.append(found.group())
                position = found.end()
                continue
            character = text[position]
            leaves = self._step(character)
            if leaves is None:
                if self._number_ended():
                    continue  # the same character, now behind the number
                self.bad = True
                break
            out.append(leaves)
            position += 1
        return "".join(out), position

    def _number_ended(self) -> bool:
        if self._state not in _NUMBER_ENDS:
            return False
        self._state = "after"
        return True

    def _step(self, character: str) -> str | None:
        """What leaves for this character; None: it may not stand here."""
        state = self._state
        if state == "string":
            return self._in_string(character)
        if state in _NUMBER:
            following = _NUMBER[state].get(_digit_kind(character))
            if following is None:
                return None
            self._state = following
            return character
        if state == "literal":
            if not self._rest.startswith(character):
                return None
            self._rest = self._rest[1:]
            if not self._rest:
                self._state = "after"
            return character
        if state == "escape":
            return self._escaped(character)
        if state == "hex":
            return self._hex_digit(character)
        return character if self._structure(state, character) else None

    def _in_string(self, character: str) -> str | None:
        if self._high and character != "\\":
            return None
        if character == '"':
            self._state = "colon" if self._is_key else "after"
        elif character == "\\":
            self._state = "escape"
        else:  # a control character: everything else was skipped
            return _SHORT.get(character) or f"\\u{ord(character):04x}"
        return character

    def _escaped(self, character: str) -> str | None:
        if character == "u":
            self._state, self._hex = "hex", ""
        elif self._high or character not in _ESCAPES:
            return None
        else:
            self._state = "string"
        return character

    def _hex_digit(self, character: str) -> str | None:
        if character not in _HEX:
            return None
        self._hex += character
        if len(self._hex) == 4:
            code = int(self._hex, 16)
            if self._high != (0xDC00 <= code < 0xE000):
                return None
            self._high = 0xD800 <= code < 0xDC00
            self._state = "string"
        return character

    def _structure(self, state: str, character: str) -> bool:
        """A character outside strings, numbers and literals: whether it may stand here."""
        if state in ("begin", "value", "item"):
            return self._value(state, character)
        if state in ("key", "first") and character == '"':
            self._state, self._is_key = "string", True
            return True
        if state == "first" and character == "}":
            return self._close("{")
        if state == "colon" and character == ":":
            self._state = "value"
            return True
        if state == "after" and character == ",":
            self._state = "key" if self._stack[-1] == "{" else "value"
            return True
        if state == "after" and character in "}]":
            return self._close("{" if character == "}" else "[")
        return False

    def _value(self, state: str, character: str) -> bool:
        if character == "{" or (character == "[" and state != "begin"):
            if len(self._stack) == DEPTH_MAX:
                return False
            self._stack.append(character)
            self._state = "first" if character == "{" else "item"
            return True
        if state == "begin":
            return False
        if character == "]" and state == "item":
            return self._close("[")
        if character == '"':
            self._state, self._is_key = "string", False
        elif character in _LITERALS:
            self._state, self._rest = "literal", _LITERALS[character]
        elif character == "-":
            self._state = "-"
        elif character in _DIGITS:
            self._state = "0" if character == "0" else "int"
        else:
            return False
        return True

    def _close(self, opened: str) -> bool:
        if self._stack[-1] != opened:
            return False
        self._stack.pop()
        self._state = "after"
        self.done = not self._stack
        return True


_BETWEEN = frozenset({"value", "item", "key", "first", "colon", "after"})
