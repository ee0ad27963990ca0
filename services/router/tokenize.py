"""Text to token ids, for agents: a turn that appends to a known conversation encodes only what it appended.

    tokenizer = PromptTokenizer(Tokenizer.from_file(path), spec, cache_bytes=64 << 20)
    packed = await tokenizer.encode(text)            # little-endian uint32, as the wire has them
    ids = unpack_ids(packed)

Why pieces may be encoded apart. A tokenizer first cuts the text at its added tokens (leftmost, longest); what lies
between two of them is normalized, pre-tokenized and encoded on its own. So ids(text) is the concatenation of
ids(piece), with the added tokens' ids between, and a piece's ids depend on nothing but the piece. This holds as long as
  - the cut tokens are matched before normalization and swallow no whitespace (no `normalized`, `lstrip`, `rstrip`),
  - no added token looks at its neighbours (`single_word`),
  - the pre-tokenizer does not care where in the text a piece stands (Metaspace with prepend_scheme "first" does).
A tokenizer for which this is not certain is used whole, without the cache. Each piece is looked up in a bounded LRU
cache, so a next turn finds everything but its last messages, and so does a conversation that shares a system prompt.
"""

from __future__ import annotations

import asyncio
import re
import sys
from array import array
from collections import OrderedDict
from concurrent.futures import Executor
from typing import Any

from tokenizers import Tokenizer

from tokenrelay.base.errors import InvalidRequest

assert sys.byteorder == "little" and array("I").itemsize == 4, "packed token ids are little-endian uint32"

_ENTRY_BYTES = 300  # what a cache entry costs beside its text and ids: two objects, a slot
_POSITION_FREE = frozenset(
    {"ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer"}
    | {"CharDelimiterSplit", "UnicodeScripts"}
)


def pack_ids(token_ids: list[int]) -> bytes:
    """Ids as the wire has them: little-endian uint32."""
    return array("I", token_ids).tobytes()


def unpack_ids(packed: bytes) -> list[int]:
    """The inverse of pack_ids."""
    return memoryview(packed).cast("I").tolist()


def cut_tokens(spec: dict[str, Any]) -> tuple[re.Pattern[str], dict[str, int]] | None:
    """(pattern of all added tokens that are matched in the raw text, those of them at which to cut -> id), from
    tokenizer.json.

    None when cutting is not certain to be exact.
    """
    added = spec.get("added_tokens") or []
    if any(token.get("single_word") for token in added) or not _position_free(spec.get("pre_tokenizer")):
        return None
    raw = [token for token in added if not token.get("normalized") and token.get("content")]
    cuts = {token["content"]: token["id"] for token in raw if not token.get("lstrip") and not token.get("rstrip")}
    if not cuts:
        return None
    longest_first = sorted((token["content"] for token in raw), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))), cuts


def _position_free(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return True
    kind = pre_tokenizer.get("type")
    if kind == "Sequence":
        return all(_position_free(part) for part in pre_tokenizer.get("pretokenizers") or [])
    if kind == "Metaspace":
        return pre_tokenizer.get("prepend_scheme") in ("always", "never")
    return kind in _POSITION_FREE


class PieceCache:
    """Text -> packed ids, least recently used first out. Bounded in bytes; one thread.

    A piece is found under the cache salt that it was put there with only: how fast a prompt is tokenized tells nobody
    what others asked.
    """

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._entries: OrderedDict[tuple[bytes, str], bytes] = OrderedDict()
        self.bytes = 0
        self.hit_chars = 0
        self.miss_chars = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, text: str, salt: bytes = b"") -> bytes | None:
        """The ids of this piece, if known."""
        packed = self._entries.get((salt, text))
        if packed is None:
            self.miss_chars += len(text)
        else:
            self.hit_chars += len(text)
            self._entries.move_to_end((salt, text))
        return packed

    def put(self, text: str, packed: bytes, salt: bytes = b"") -> None:
        """Remember a piece; one larger than a quarter of the cache is not worth the others."""
        size = self._size((salt, text), packed)
        if (salt, text) in self._entries or size * 4 > self._bytes_max:
            return
        self._entries[salt, text] = packed
        self.bytes += size
        while self.bytes > self._bytes_max:
            self.bytes -= self._size(*self._entries.popitem(last=False))

    @staticmethod
    def _size(piece: tuple[bytes, str], packed: bytes) -> int:
        return sys.getsizeof(piece[1]) + len(packed) + _ENTRY_BYTES


class PromptTokenizer:
    """One model's tokenizer. `spec` is the parsed tokenizer.json."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        spec: dict[str, Any],
        *,
        cache_bytes: int,
        inline_chars: int = 8192,
        executor: Executor | None = None,
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.tokenizer = tokenizer
        self.cache = PieceCache(cache_bytes)
        self._inline_chars = inline_chars
        self._executor = executor
        self._cut = cut_tokens(spec)
        self._around = _special_tokens_around(tokenizer)

    @property
    def incremental(self) -> bool:
        """Whether next turns profit."""
        return self._cut is not None

    async def encode(self, text: str, *, add_special_tokens: bool = False, salt: bytes = b"") -> bytes:
        """Packed ids of `text`. Long texts are encoded in a thread. Raises InvalidRequest for a lone surrogate.

        `salt`: the cache salt of whose text it is.
        """
        if add_special_tokens and self._around is None:
            return pack_ids((await self._encode_all([text], add_special_tokens=True))[0])
        pieces, missing = self._split(text, salt)
        if missing:
            self._fill(pieces, missing, await self._encode_all(list(missing)), salt)
        if add_special_tokens and self._around is not None:
            pieces = [self._around[0], *pieces, self._around[1]]
        return b"".join(pieces)

    def encode_whole(self, text: str, *, add_special_tokens: bool = False) -> bytes:
        """The plain tokenizer, for comparison."""
        return pack_ids(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)

    def _split(self, text: str, salt: bytes) -> tuple[list[bytes], dict[str, list[int]]]:
        """(packed ids piece by piece, the pieces that are not known -> where they belong in that list)."""
        pieces: list[bytes] = []
        missing: dict[str, list[int]] = {}
        start = 0
        if self._cut is not None:
            pattern, cuts = self._cut
            for found in pattern.finditer(text):
                token_id = cuts.get(found.group())
                if token_id is not None:
                    if found.start() > start:
                        self._look_up(text[start : found.start()], pieces, missing, salt)
                    pieces.append(token_id.to_bytes(4, "little"))
                    start = found.end()
        if start < len(text):
            self._look_up(text[start:], pieces, missing, salt)
        return pieces, missing

    def _look_up(self, piece: str, pieces: list[bytes], missing: dict[str, list[int]], salt: bytes) -> None:
        known = self.cache.get(piece, salt) if self._cut is not None else None
        if known is None:
            missing.setdefault(piece, []).append(len(pieces))
        pieces.append(known or b"")

    def _fill(self, pieces: list[bytes], missing: dict[str, list[int]], encoded: list[list[int]], salt: bytes) -> None:
        for (piece, places), token_ids in zip(missing.items(), encoded, strict=True):
            packed = pack_ids(token_ids)
            if self._cut is not None:
                self.cache.put(piece, packed, salt)
            for place in places:
                pieces[place] = packed

    async def _encode_all(self, texts: list[str], *, add_special_tokens: bool = False) -> list[list[int]]:
        if sum(map(len, texts)) <= self._inline_chars:
            return self._encode_batch(texts, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._encode_batch, texts, add_special_tokens)

    def _encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[list[int]]:
        """`encode_batch_fast` lets go of the interpreter's lock, `encode` does not (tokenizers 0.23)."""
        try:
            encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeEncodeError) as error:
            raise InvalidRequest("the text has a lone surrogate, which UTF-8 cannot express", param="prompt") from error
        return [encoding.ids for encoding in encodings]


def _special_tokens_around(tokenizer: Tokenizer) -> tuple[bytes, bytes] | None:
    """What the post-processor puts before and after any text, packed; None where that is not all it does."""
    prefix_and_suffix = None
    for probe in ("a", "b c"):
        bare = tokenizer.encode(probe, add_special_tokens=False).ids
        whole = tokenizer.encode(probe, add_special_tokens=True).ids
        start = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), None)
        if start is None or not bare:
            return None
        around = (pack_ids(whole[:start]), pack_ids(whole[start + len(bare) :]))
        if prefix_and_suffix not in (None, around):
            return None
        prefix_and_suffix = around
    return prefix_and_suffix
