"""Incremental text equals the tokenizer's own decode, and no piece ends in half a character."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_worker import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from tokenrelay.services.router.detokenize import REPLACEMENT, Vocabulary

ROOT = Path(__file__).resolve().parents[2]


def byte_fallback_tokenizer() -> Tokenizer:
    """Llama 2's kind: `▁` for spaces, `<0xNN>` for bytes; its decoder looks at neighbours."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁Hello", "▁world", "Hello", "!", "é"]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    return tokenizer


BYTE_LEVEL, FALLBACK = tiny_tokenizer(), byte_fallback_tokenizer()
VOCABULARIES = {
    name: Vocabulary(tokenizer, json.loads(tokenizer.to_str()))
    for name, tokenizer in {"byte-level": BYTE_LEVEL, "byte-fallback": FALLBACK}.items()
}


def pushed(vocabulary: Vocabulary, cuts: list[list[int]]) -> list[str]:
    detokenizer = vocabulary.detokenizer()
    return [*(detokenizer.push(token_ids) for token_ids in cuts), detokenizer.finish()]


@settings(deadline=None)
@given(st.lists(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=4), max_size=12))
def test_byte_level_equals_decode_for_any_ids(cuts: list[list[int]]) -> None:
    vocabulary = VOCABULARIES["byte-level"]
    assert vocabulary.byte_level
    flat = [token_id for ids in cuts for token_id in ids]
    assert "".join(pushed(vocabulary, cuts)) == BYTE_LEVEL.decode(flat, skip_special_tokens=True)


@settings(deadline=None)
@given(st.lists(st.integers(0, FALLBACK.get_vocab_size() - 1), max_size=16))
def test_other_decoders_equal_decode_for_text(token_ids: list[int]) -> None:
    vocabulary = VOCABULARIES["byte-fallback"]
    assert not vocabulary.byte_level
    expected = FALLBACK.decode(token_ids, skip_special_tokens=True)
    if REPLACEMENT not in expected:
        assert "".join(pushed(vocabulary, [[token_id] for token_id in token_ids])) == expected


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_text_arrives_whole_and_never_in_half_characters(name: str, text: str) -> None:
    vocabulary = VOCABULARIES[name]
    token_ids = vocabulary.tokenizer.encode(text, add_special_tokens=False).ids
    expected = vocabulary.tokenizer.decode(token_ids, skip_special_tokens=True)
    pieces = pushed(vocabulary, [[token_id] for token_id in token_ids])
    assert "".join(pieces) == expected
    if REPLACEMENT not in expected:
        assert not any(REPLACEMENT in piece for piece in pieces)


def test_emoji_is_held_until_it_is_complete() -> None:
    vocabulary = VOCABULARIES["byte-level"]
    token_ids = [BYTE_LEVEL.token_to_id(piece) for piece in ("ð", "Ł", "ĳ", "ĭ")]  # F0 9F 91 8B, one byte a token
    assert pushed(vocabulary, [[token_id] for token_id in token_ids]) == ["", "", "", "👋", ""]
    assert pushed(vocabulary, [[token_ids[0]], [BYTE_LEVEL.token_to_id("a")]]) == ["", "\ufffda", ""]


def test_special_tokens_are_skipped_and_tags_kept() -> None:
    vocabulary = VOCABULARIES["byte-level"]
    start, think = BYTE_LEVEL.token_to_id("<|im_start|>"), BYTE_LEVEL.token_to_id("<think>")
    assert vocabulary.decode([start, think]) == "<think>", "tags are no special tokens here"
    assert vocabulary.decode([start], keep_ids=[start]) == "<|im_start|>"
    assert vocabulary.decode([start], skip_special=False) == "<|im_start|>"


def test_ids_beyond_the_vocabulary_say_nothing() -> None:
    """A model's embedding may be padded: its last ids have no token."""
    vocabulary = VOCABULARIES["byte-level"]
    assert vocabulary.decode([vocabulary.size + 5, (1 << 32) - 1]) == ""


def test_bundled_tokenizer() -> None:
    folder = ROOT / "assets/tokenrelay-tiny"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vocabulary = Vocabulary(tokenizer, json.loads((folder / "tokenizer.json").read_text()))
    assert vocabulary.byte_level
    every = list(range(tokenizer.get_vocab_size()))
    assert vocabulary.decode(every, skip_special=False) == tokenizer.decode(every, skip_special_tokens=False)
