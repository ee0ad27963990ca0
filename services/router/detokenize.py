"""Token ids to text, incrementally: O(new tokens) a step, never half a character.

    vocabulary = Vocabulary(tokenizer, spec)        # one per model
    detokenizer = vocabulary.detokenizer()          # one per sequence
    detokenizer.push([9707, 11])                    # "Hello,"
    detokenizer.finish()                            # what an unfinished character leaves: "" or U+FFFD

The pushed pieces, joined, equal `tokenizer.decode(ids)`. Byte-level BPE (GPT-2's byte alphabet: Llama 3, Qwen,
DeepSeek) goes by a table of bytes per token; any other decoder by a sliding window over the tokenizer's own `decode`.
"""

from __future__ import annotations

import codecs
import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")
REPLACEMENT = "\ufffd"
# A window that still ends in a replacement character after so many tokens holds invalid bytes, not an unfinished
# character (UTF-8 needs 4 bytes at most, and a token carries at least one).
_WINDOW_TOKENS_MAX = 8


class Detokenizer(Protocol):
    """One sequence's text."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete."""

    def finish(self) -> str:
        """The rest at the end of the sequence."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's map of printable characters to bytes (openai/gpt-2, `bytes_to_unicode`), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return table


class Vocabulary:
    """What one model's tokens say. `spec` is the parsed tokenizer.json."""

    def __init__(self, tokenizer: Tokenizer, spec: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.size = tokenizer.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(token["id"] for token in spec.get("added_tokens") or () if token.get("special"))
        self.byte_level = _is_byte_level(spec.get("decoder"))
        self._alphabet = byte_alphabet()
        self._bytes: dict[int, bytes] = {}  # filled as tokens appear; bounded by the vocabulary
        self._text: dict[int, str] = {}  # those of them that are valid UTF-8 by themselves

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, special or not; none for an id that the vocabulary lacks."""
        found = self._bytes.get(token_id)
        return self._learn(token_id) if found is None else found

    def token_text(self, token_id: int) -> str:
        """One token as text for people, as in log-probabilities: U+FFFD where it is a part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def _learn(self, token_id: int) -> bytes:
        token = self.tokenizer.id_to_token(token_id) if 0 <= token_id < 1 << 32 else None
        if token is None:
            return b""
        if self.byte_level:
            alphabet = self._alphabet
            known = all(character in alphabet for character in token)
            data = bytes([alphabet[character] for character in token]) if known else token.encode()
        elif token_id in self.special_ids:
            data = token.encode()
        else:
            data = self.tokenizer.decode([token_id], skip_special_tokens=False).encode()
        self._bytes[token_id] = data
        with contextlib.suppress(UnicodeDecodeError):  # a part of a character has bytes only
            self._text[token_id] = data.decode()
        return data

    def detokenizer(self, *, skip_special: bool = True, keep_ids: Iterable[int] = ()) -> Detokenizer:
        """For one sequence. `keep_ids` are special tokens that stay in the text all the same (tags that parsers
        need).
        """
        skipped = self.special_ids.difference(keep_ids) if skip_special else frozenset()
        if self.byte_level:
            return _ByteLevel(self, self._text, skipped)
        return _Window(lambda ids: str(self.tokenizer.decode(ids, skip_special_tokens=False)), skipped)

    def decode(self, token_ids: Sequence[int], *, skip_special: bool = True, keep_ids: Iterable[int] = ()) -> str:
        """The whole text at once."""
        detokenizer = self.detokenizer(skip_special=skip_special, keep_ids=keep_ids)
        return detokenizer.push(token_ids) + detokenizer.finish()


def _is_byte_level(decoder: dict[str, Any] | None) -> bool:
    if decoder is None:
        return False
    if decoder.get("type") == "Sequence":
        parts = decoder.get("decoders") or []
        return len(parts) == 1 and _is_byte_level(parts[0])
    return decoder.get("type") == "ByteLevel"


class _ByteLevel:
    __slots__ = ("_decoder", "_pending", "_skipped", "_text", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, text: dict[int, str], skipped: frozenset[int]) -> None:
        self._vocabulary = vocabulary
        self._text = text
        self._skipped = skipped
        self._decoder: codecs.IncrementalDecoder | None = None
        self._pending = False  # bytes of an unfinished character wait in the decoder

    def push(self, token_ids: Sequence[int]) -> str:
        if len(token_ids) == 1 and not self._pending:
            token_id = token_ids[0]
            text = self._text.get(token_id)
            if text is not None:
                return "" if token_id in self._skipped else text
        vocabulary, skipped = self._vocabulary, self._skipped
        data = b"".join([vocabulary.token_bytes(token_id) for token_id in token_ids if token_id not in skipped])
        if not self._pending:
            try:
                return data.decode()
            except UnicodeDecodeError:
                pass  # the incremental decoder below keeps what is unfinished and replaces what is invalid
        if self._decoder is None:
            self._decoder = _UTF8("replace")
        text = self._decoder.decode(data)
        self._pending = bool(self._decoder.getstate()[0])
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", True) if self._decoder is not None and self._pending else ""


class _Window:
    """Decode the tokens since the last clean border, with a few before it as context, and return what is new."""

    __slots__ = ("_border", "_decode", "_ids", "_skipped", "_start")

    def __init__(self, decode: Callable[[list[int]], str], skipped: frozenset[int]) -> None:
        self._decode = decode
        self._skipped = skipped
        self._ids: list[int] = []  # from `_start` of the window on; older ones are forgotten
        self._border = 0  # tokens of `_ids` whose text has left

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(token_id) for token_id in token_ids if token_id not in self._skipped])

    def _push_one(self, token_id: int) -> str:
        self._ids.append(token_id)
        before = self._decode(self._ids[: self._border])
        after = self._decode(self._ids)
        if after.endswith(REPLACEMENT) and len(self._ids) - self._border < _WINDOW_TOKENS_MAX:
            return ""  # perhaps an unfinished character
        if len(after) <= len(before):
            return ""
        self._ids = self._ids[self._border :]
        self._border = len(self._ids)
        return after[len(before) :]

    def finish(self) -> str:
        before, after = self._decode(self._ids[: self._border]), self._decode(self._ids)
        self._border = len(self._ids)
        return after[len(before) :]
