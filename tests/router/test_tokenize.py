"""Incremental tokenization is exact: equal to the plain tokenizer on any conversation, and cheap on a next turn."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mock_worker import SPECIAL, TAGS, tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.services.router.template import ChatTemplate
from tokenrelay.services.router.tokenize import PieceCache, PromptTokenizer, unpack_ids

BUNDLED = Path(__file__).resolve().parents[2] / "assets/tokenrelay-tiny"


def with_odd_tokens() -> Tokenizer:
    """Added tokens that swallow whitespace, that begin like others, that are matched after normalization."""
    tokenizer = tiny_tokenizer()
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    odd = [
        AddedToken("<r>", rstrip=True, normalized=False),
        AddedToken("<l>", lstrip=True, normalized=False),
        AddedToken("<|im_start|>x", normalized=False),
        AddedToken("quick", normalized=True),
    ]
    tokenizer.add_tokens(odd)
    return tokenizer


def with_prefix_space() -> Tokenizer:
    """GPT-2 with add_prefix_space and a beginning-of-sequence token from the post-processor."""
    tokenizer = tiny_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    bos = tokenizer.token_to_id("<|endoftext|>")
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", None, [("<|endoftext|>", bos)])
    return tokenizer


def with_single_word() -> Tokenizer:
    """A token that looks at its neighbours: cutting is not exact."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("fox", single_word=True, normalized=False)])
    return tokenizer


def with_metaspace() -> Tokenizer:
    """A pre-tokenizer that treats the beginning of the text apart: cutting is not exact."""
    tokenizer = tiny_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return tokenizer


def bundled() -> Tokenizer:
    return Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))


CASES: dict[str, tuple[Callable[[], Tokenizer], bool]] = {
    "tiny": (tiny_tokenizer, True),
    "bundled": (bundled, True),
    "odd tokens": (with_odd_tokens, True),
    "prefix space": (with_prefix_space, True),
    "single word": (with_single_word, False),
    "metaspace": (with_metaspace, False),
}
_made: dict[str, PromptTokenizer] = {}


def prompt_tokenizer(name: str, cache_bytes: int = 1 << 16) -> PromptTokenizer:
    """One per case for all examples, so that examples meet each other's cache entries."""
    if name not in _made:
        tokenizer = CASES[name][0]()
        _made[name] = PromptTokenizer(tokenizer, json.loads(tokenizer.to_str()), cache_bytes=cache_bytes)
    return _made[name]


FRAGMENTS = st.one_of(
    st.sampled_from(
        [
            *SPECIAL,
            *TAGS,
            "<r>",
            "<l>",
            "<|im_start|>x",
            "quick",
            "QUICK",
            "fox",
            "foxes",
            "\u0301",
            " ",
            "\n",
            "<|im_",
            "x",
        ]
    ),
    st.text(max_size=6),
    st.text("ab <|>é\n", max_size=8),
)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=150, deadline=None)
@given(fragments=st.lists(FRAGMENTS, max_size=14), special=st.booleans())
def test_equals_the_plain_tokenizer(name: str, fragments: list[str], special: bool) -> None:
    tokenizer = prompt_tokenizer(name)
    text = "".join(fragments)
    for _ in range(2):  # cold, then from the cache
        assert asyncio.run(tokenizer.encode(text, add_special_tokens=special)) == tokenizer.encode_whole(
            text, add_special_tokens=special
        )


@pytest.mark.parametrize("name", CASES)
def test_incremental_only_where_it_is_exact(name: str) -> None:
    assert prompt_tokenizer(name).incremental is CASES[name][1]


ROLE = st.sampled_from(["user", "assistant", "tool"])


@settings(max_examples=60, deadline=None)
@given(
    turns=st.lists(st.tuples(ROLE, st.one_of(st.text(max_size=30), FRAGMENTS)), min_size=1, max_size=8),
    system=st.text(max_size=20),
)
def test_turns_of_a_conversation(turns: list[tuple[str, str]], system: str) -> None:
    """Each turn appends a message; each prompt equals the plain tokenizer's."""
    template = ChatTemplate.load(BUNDLED, {})
    assert template is not None
    tokenizer = prompt_tokenizer("bundled")
    messages = [{"role": "system", "content": system}]
    for role, content in turns:
        messages.append({"role": role, "content": content})
        text = template.render(messages)
        assert asyncio.run(tokenizer.encode(text)) == tokenizer.encode_whole(text)


async def test_a_next_turn_encodes_only_what_it_appended() -> None:
    tokenizer = PromptTokenizer(bundled(), json.loads((BUNDLED / "tokenizer.json").read_text()), cache_bytes=1 << 24)
    template = ChatTemplate.load(BUNDLED, {})
    assert template is not None
    messages = [{"role": "user", "content": f"message {n}: " + "some words " * 500} for n in range(40)]
    await tokenizer.encode(template.render(messages))
    misses = tokenizer.cache.miss_chars
    messages.append({"role": "user", "content": "and one more"})
    await tokenizer.encode(template.render(messages))
    assert tokenizer.cache.miss_chars - misses < 200


async def test_a_long_text_leaves_the_loop_alone() -> None:
    tokenizer = prompt_tokenizer("tiny")
    text = "some words and more of them, with ünï code " * 40_000  # 1.7 MB: most of a second
    longest_s, began_s = 0.0, time.monotonic()
    last_s = began_s
    task = asyncio.create_task(tokenizer.encode(text))
    while not task.done():
        await asyncio.sleep(0.005)
        now_s = time.monotonic()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    assert len(unpack_ids(await task)) > 100_000
    took_s = last_s - began_s  # a busy machine stretches both
    assert longest_s < took_s / 2, f"the loop stood still for {longest_s:.2f} of {took_s:.2f} s"


async def test_lone_surrogates_are_the_clients_fault() -> None:
    with pytest.raises(InvalidRequest):
        await prompt_tokenizer("tiny").encode("a\ud800b")


def test_the_cache_is_bounded_and_forgets_the_oldest() -> None:
    cache = PieceCache(4096)
    for n in range(100):
        cache.put(f"piece {n}", b"1234")
        cache.get("piece 0")
    assert 0 < cache.bytes <= 4096
    assert cache.get("piece 0") is not None, "used all the time"
    assert cache.get("piece 1") is None
    assert cache.get("piece 99") is not None
    cache.put("x" * 4096, b"")
    assert cache.get("x" * 4096) is None, "one giant must not push out everything"
