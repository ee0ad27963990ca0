"""Splits a reply into reasoning and content at `<think>` … `</think>`, or other tags.

    parser = ReasoningParser(inside=prompt_ends_inside_thinking(prompt))
    parser.feed("<think>\\nwell")       # ("well", "")     (reasoning, content)
    parser.feed("\\n</think>\\n\\nYes")  # ("", "Yes")

The tags and the newlines around them belong to neither. Only a reply that begins with the tag (or whose prompt
opened it) reasons; a tag later on is content. An unclosed tag leaves everything reasoning.
"""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


def prompt_ends_inside_thinking(prompt: str, open_tag: str = OPEN) -> bool:
    """Whether the rendered prompt already opened the tag for the reply, as templates of always-thinking models do."""
    return prompt.rstrip("\n").endswith(open_tag)


def held_suffix(text: str, tag: str) -> int:
    """How many characters at the end of `text` may be the beginning of `tag`."""
    for length in range(min(len(tag) - 1, len(text)), 0, -1):
        if text.endswith(tag[:length]):
            return length
    return 0


class ReasoningParser:
    """One sequence. `done` once everything further is content: then the caller need not ask any more."""

    __slots__ = ("_begun", "_close", "_held", "_inside", "_open", "_skip_newlines", "done")

    def __init__(self, *, inside: bool, tags: tuple[str, str] = (OPEN, CLOSE)) -> None:
        self._open, self._close = tags
        self._inside = inside
        self._held = ""
        self._begun = False  # reasoning text has left
        self._skip_newlines = False  # after the close tag
        self.done = False

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that are certain now."""
        reasoning = ""
        self._held += text
        if not self._inside and not self.done and not self._skip_newlines:
            stripped = self._held.lstrip()
            if len(stripped) < len(self._open) and self._open.startswith(stripped):
                return "", ""  # nothing yet, or a beginning of the tag
            if stripped.startswith(self._open):
                self._inside, self._held = True, stripped[len(self._open) :]
            else:
                self.done = True
        if self._inside:
            reasoning = self._feed_inside()
            if self._inside:
                return reasoning, ""
        return reasoning, self._feed_content()

    def _feed_inside(self) -> str:
        before, tag, after = self._held.partition(self._close)
        if tag:
            self._inside, self._skip_newlines = False, True
            self._held = after
            return self._trim(before).rstrip("\n")
        held = held_suffix(before, self._close)
        # Newlines before the tag belong to it: they wait, too.
        ready = before[: len(before) - held].rstrip("\n")
        self._held = before[len(ready) :]
        return self._trim(ready)

    def _trim(self, text: str) -> str:
        """Newlines after the open tag belong to it."""
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        return text

    def _feed_content(self) -> str:
        text, self._held = self._held, ""
        if self._skip_newlines:
            text = text.lstrip("\n")
            if text:
                self._skip_newlines = False
                self.done = True
        return text

    def finish(self) -> tuple[str, str]:
        """(reasoning, content) that were held back."""
        held, self._held = self._held, ""
        return (self._trim(held), "") if self._inside else ("", held)
