"""Stop strings against the obvious definition: the first position at which any of them is complete."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrelay.services.router.stops import StopAutomaton, StopMatcher

ALPHABET = st.text("ab\n", max_size=12)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """(what may be seen, the stop string): character by character, the longest of those that end together."""
    for end in range(1, len(text) + 1):
        found = max((stop for stop in stops if text[:end].endswith(stop)), key=len, default=None)
        if found is not None:
            return (text[:end] if include else text[: end - len(found)]), found
    return text, None


@settings(deadline=None)
@given(
    pieces=st.lists(ALPHABET, max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=5),
    include=st.booleans(),
)
def test_equals_the_definition_however_the_text_is_cut(pieces: list[str], stops: list[str], include: bool) -> None:
    matcher = StopMatcher(StopAutomaton(stops), include=include)
    seen, found = "", None
    for piece in pieces:
        text, found = matcher.push(piece)
        seen += text
        if found is not None:
            break
    else:
        seen += matcher.finish()
    assert (seen, found) == reference("".join(pieces), stops, include)


@settings(deadline=None)
@given(
    pieces=st.lists(ALPHABET, max_size=8),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=4),
)
def test_holds_back_no_more_than_it_must(pieces: list[str], stops: list[str]) -> None:
    """What is held is the beginning of a stop string, and nothing shorter would do."""
    matcher = StopMatcher(StopAutomaton(stops))
    whole, seen = "", ""
    for piece in pieces:
        whole += piece
        text, found = matcher.push(piece)
        seen += text
        if found is not None:
            return
        held = len(whole) - len(seen)
        beginnings = [stop[:length] for stop in stops for length in range(len(stop))]
        assert held == max(len(beginning) for beginning in beginnings if whole.endswith(beginning))


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["Hello EN", "D and more"], ["Hello ", ""]),
        (["Hello EN", "ough"], ["Hello ", "ENough"]),
        (["E", "E", "ND"], ["", "E", ""]),
    ],
)
def test_a_transcript(pieces: list[str], expected: list[str]) -> None:
    matcher = StopMatcher(StopAutomaton(["END"]))
    assert [matcher.push(piece)[0] for piece in pieces] == expected
