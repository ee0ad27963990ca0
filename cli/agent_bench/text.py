"""Texts of about so many tokens, for an endpoint whose tokenizer nobody knows.

    ruler = Ruler(chars_per_token=3.9, overhead_tokens=12)
    ruler.text("session 7 turn 2", 800)

Words of code, in an order of each text's own, behind a header that names it: no two texts share a prefix by chance.
Lengths come out right to a few percent once the endpoint has said how many tokens two samples of this kind have.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass

POOL_CHARS = 1 << 20
_VOCABULARY = (
    "def return import class self None True raise yield async await lambda while range index value result path line "
    "file test error token cache block worker router request session commit branch merge parse render config option "
    "if else for in not and or is with as try except finally assert print len list dict set tuple str int float "
    "buffer stream header body status retry timeout lease handle offer claim release prefix suffix hash key state"
)
_WORDS = _VOCABULARY.split()
_MARKS = ("(", ")", ":", ",", ".", " = ", " == ", "[0]", "{}", "\n    ", "\n", "()", " + 1", "'", '"')


@functools.cache
def pool() -> str:
    """A megabyte of it, the same in every process."""
    source = random.Random("tokenrelay bench")
    parts: list[str] = []
    size = 0
    while size < POOL_CHARS:
        word = source.choice(_WORDS) + (f"_{source.choice(_WORDS)}" if source.random() < 0.3 else "")
        parts.append(word + (source.choice(_MARKS) if source.random() < 0.4 else " "))
        size += len(parts[-1])
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class Ruler:
    """How long texts are at an endpoint."""

    chars_per_token: float = 3.5
    overhead_tokens: float = 0.0  # of a conversation with one message: its template

    def text(self, name: str, tokens: int) -> str:
        """The text of that name; the same name and length give the same text."""
        chars = max(len(name) + 4, round(tokens * self.chars_per_token))
        header, words = f"[{name}] ", pool()
        at = random.Random(name).randrange(len(words))
        wanted = chars - len(header)
        repeated = words[at:] + words * (wanted // len(words) + 1) if wanted > len(words) - at else words[at:]
        return header + repeated[:wanted]

    def tokens(self, chars: int) -> int:
        """About how many tokens a conversation of so many characters has."""
        return round(self.overhead_tokens + chars / self.chars_per_token)

    @classmethod
    def measured(cls, samples: tuple[tuple[int, int], tuple[int, int]]) -> Ruler:
        """From two samples, (characters, prompt tokens as the endpoint counted them)."""
        (chars_a, tokens_a), (chars_b, tokens_b) = samples
        if tokens_b <= tokens_a:
            raise ValueError(f"a text of {chars_b} characters has no more tokens than one of {chars_a}")
        per_token = (chars_b - chars_a) / (tokens_b - tokens_a)
        return cls(per_token, max(0.0, tokens_a - chars_a / per_token))
