"""Reasoning and content apart, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrelay.services.router.reasoning import ReasoningParser, prompt_ends_inside_thinking


def split(pieces: list[str], inside: bool) -> tuple[str, str]:
    parser = ReasoningParser(inside=inside)
    parts = [("", piece) if parser.done else parser.feed(piece) for piece in pieces]
    parts.append(parser.finish())
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nwell\n</think>\n\nYes", False, "well", "Yes"),
        ("well\n</think>\n\nYes", True, "well", "Yes"),
        ("\n<think>a\nb</think>c", False, "a\nb", "c"),
        ("<think>\n\n</think>\n\nYes", False, "", "Yes"),
        ("<think>never closed", False, "never closed", ""),
        ("Yes, <think>no</think>", False, "", "Yes, <think>no</think>"),
        ("<thin", False, "", "<thin"),
        ("<thinking> of it", False, "", "<thinking> of it"),
        ("a < b </thin", True, "a < b </thin", ""),
        ("x</think>y</think>z", True, "x", "y</think>z"),
        ("", False, "", ""),
        ("  Yes", False, "", "  Yes"),
    ],
)
def test_transcripts(text: str, inside: bool, reasoning: str, content: str) -> None:
    for size in (1, 2, 5, 100):
        pieces = [text[start : start + size] for start in range(0, len(text), size)]
        assert split(pieces, inside) == (reasoning, content), f"in pieces of {size}"


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.sampled_from(["<think>", "</think>", "\n", "<", "think>"]), st.text("ab<\n ", max_size=5)),
        max_size=8,
    ),
    st.booleans(),
)
def test_the_cut_does_not_matter(pieces: list[str], inside: bool) -> None:
    assert split(pieces, inside) == split(["".join(pieces)], inside) == split(list("".join(pieces)), inside)


def test_prompts_that_open_the_tag() -> None:
    assert prompt_ends_inside_thinking("<|im_start|>assistant\n<think>\n")
    assert not prompt_ends_inside_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not prompt_ends_inside_thinking("say <think> please")
