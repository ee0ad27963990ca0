"""The committed tokenizer: exact round trips, one token a digit and a marker, and turns that append token by token."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenrelay.assets.training import template, tokenizer, world

TOKENIZER = tokenizer.load()


def encode(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False).ids
    return ids


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert TOKENIZER.decode(encode(text), skip_special_tokens=False) == text


def test_transcripts_come_back_in_few_tokens() -> None:
    characters = tokens = 0
    for index in range(50):
        dialogue = world.write_exam(index)
        text = template.render(dialogue.messages, dialogue.tools or None)
        ids = encode(text)
        assert TOKENIZER.decode(ids, skip_special_tokens=False) == text
        characters, tokens = characters + len(text), tokens + len(ids)
    assert characters / tokens > 3.5


def test_every_digit_is_a_token() -> None:
    assert [TOKENIZER.id_to_token(each) for each in encode("4096")] == list("4096")


@pytest.mark.parametrize("marker", [*tokenizer.SPECIAL, *tokenizer.TAGS])
def test_markers_are_single_tokens(marker: str) -> None:
    (only,) = encode(marker)
    hidden = TOKENIZER.decode([only], skip_special_tokens=True) == ""
    assert hidden == (marker in tokenizer.SPECIAL)


@pytest.mark.parametrize("index", range(8))
def test_a_prompt_and_its_reply_tokenize_apart_as_together(index: int) -> None:
    """So the ids a model emitted are the ids the next turn's prompt has at that place."""
    dialogue = world.write_exam(index)
    for place, message in enumerate(dialogue.messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(dialogue.messages[:place], dialogue.tools or None, add_generation_prompt=True)
        whole = template.render(dialogue.messages[: place + 1], dialogue.tools or None)
        assert whole.startswith(prompt)
        assert encode(prompt) + encode(whole.removeprefix(prompt)) == encode(whole)


@pytest.mark.slow
def test_the_committed_tokenizer_is_what_the_script_makes() -> None:
    """Byte for byte on the corpus' first dialogues: the tokenizer is reproducible."""
    assert tokenizer.train().to_str() == TOKENIZER.to_str()
