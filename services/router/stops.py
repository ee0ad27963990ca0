"""Stop strings in a stream: found across token borders, never leaked.

    stops = StopAutomaton(["\\n\\nUser:", "END"])      # one per request
    matcher = StopMatcher(stops)                     # one per sequence
    text, found = matcher.push("Hello EN")           # ("Hello ", None): "EN" may become a stop string
    text, found = matcher.push("D and more")         # ("", "END")

Aho and Corasick's automaton (CACM 18(6), 1975): one step a character however many strings there are, and its depth
is exactly how much text must be held back. The match that ends first wins, and of those that end together the
longest: the answer cannot depend on how the text was cut into pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """All stop strings of one request, shared by its sequences. State 0 is the root."""

    __slots__ = ("depth", "match", "steps", "strings", "suffix")

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.steps: list[dict[str, int]] = [{}]  # state -> character -> next state
        self.suffix = [0]  # state -> the state of its longest proper suffix: where to look on when it has no step
        self.depth = [0]  # state -> characters of the longest prefix of a stop string that the text ends in
        self.match: list[str | None] = [None]  # state -> the longest stop string that the text ends in
        for string in strings:
            self._insert(string)
        self._link()

    def _insert(self, string: str) -> None:
        state = 0
        for character in string:
            following = self.steps[state].get(character)
            if following is None:
                following = len(self.steps)
                self.steps[state][character] = following
                self.steps.append({})
                self.suffix.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = following
        self.match[state] = string

    def _link(self) -> None:
        """Breadth first, so that a state's suffixes, which are shorter, are linked before it."""
        queue = deque(self.steps[0].values())
        while queue:
            state = queue.popleft()
            if self.match[state] is None:
                self.match[state] = self.match[self.suffix[state]]
            for character, following in self.steps[state].items():
                self.suffix[following] = self.step(self.suffix[state], character)
                queue.append(following)

    def step(self, state: int, character: str) -> int:
        """The state after one more character; amortised O(1) along a text."""
        steps, suffix = self.steps, self.suffix
        while (following := steps[state].get(character)) is None and state:
            state = suffix[state]
        return following or 0


class StopMatcher:
    """One sequence's text against the automaton; holds back what may become a stop string."""

    __slots__ = ("_automaton", "_held", "_include", "_state")

    def __init__(self, automaton: StopAutomaton, *, include: bool = False) -> None:
        self._automaton = automaton
        self._include = include
        self._state = 0
        self._held = ""  # the last `depth[_state]` characters

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that may leave, the stop string that ended the sequence or None). Not to be called after a match."""
        state, match, root, step = self._state, self._automaton.match, self._automaton.steps[0], self._automaton.step
        for index, character in enumerate(text):
            state = step(state, character) if state else root.get(character, 0)
            found = match[state]
            if found is not None:
                whole = self._held + text[: index + 1]
                self._held = ""
                return (whole if self._include else whole[: -len(found)]), found
        self._state = state
        whole = self._held + text
        keep = self._automaton.depth[state]
        if keep == 0:
            self._held = ""
            return whole, None
        self._held = whole[-keep:]
        return whole[:-keep], None

    def finish(self) -> str:
        """What was held back, when the sequence ended for another reason."""
        held, self._held = self._held, ""
        return held
