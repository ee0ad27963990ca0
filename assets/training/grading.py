"""Read what a model wrote, and compare it with what the world wanted."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

TOOL_CALL = re.compile(r"<tool_call>\n?(.*?)\n?</tool_call>", re.DOTALL)
THINK = re.compile(r"^\s*<think>\n?(.*?)\n?</think>\s*", re.DOTALL)


@dataclass(frozen=True)
class Reply:
    """An assistant turn taken apart. A call that is not the JSON it should be is None."""

    calls: tuple[tuple[str, str] | None, ...]
    content: str
    reasoning: str
    closed: bool


def parse(text: str, closed: bool = True) -> Reply:
    """An assistant turn's text; `closed` says that its end marker came within the limit."""
    thought = THINK.match(text)
    rest = text[thought.end() :] if thought else text
    calls = tuple(_call(match[1]) for match in TOOL_CALL.finditer(rest))
    content = TOOL_CALL.sub("", rest).strip()
    dangling = any(tag in content for tag in ("<tool_call>", "</tool_call>", "<think>", "</think>"))
    return Reply((*calls, None) if dangling else calls, content, thought[1] if thought else "", closed)


def _call(text: str) -> tuple[str, str] | None:
    try:
        value = json.loads(text)
        name, arguments = value["name"], value["arguments"]
    except (ValueError, KeyError, TypeError):
        return None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, sort_keys=True)


def expected(message: dict[str, Any]) -> list[tuple[str, str]]:
    """The calls of an assistant message, as `parse` gives them."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [(function["name"], json.dumps(function["arguments"], sort_keys=True)) for function in functions]


@dataclass
class Tally:
    """Counts of tool calls and answers. A turn's calls count as many as were wanted or made, whichever is more."""

    calls: int = 0
    well_formed: int = 0
    right_tool: int = 0
    right_arguments: int = 0
    answers: int = 0
    right_answers: int = 0

    def grade(self, reply: Reply, message: dict[str, Any], facts: tuple[str, ...]) -> bool:
        """Count one turn; returns whether all of it was right. The order of parallel calls is free; in a turn that
        never ended no call counts."""
        wanted = expected(message)
        made = [call for call in reply.calls if call is not None and reply.closed]
        total = max(len(wanted), len(reply.calls))
        names = Counter(name for name, _ in wanted) & Counter(name for name, _ in made)
        exact = sum((Counter(wanted) & Counter(made)).values())
        self.calls += total
        self.well_formed += len(made)
        self.right_tool += sum(names.values())
        self.right_arguments += exact
        right = exact == total
        if not wanted:
            self.answers += 1
            right = right and reply.closed and all(fact in reply.content for fact in facts)
            self.right_answers += right
        return right

    def shares(self) -> dict[str, float]:
        """Each figure as a share between 0 and 1."""
        calls, answers = max(1, self.calls), max(1, self.answers)
        return {
            "well-formed calls": self.well_formed / calls,
            "right tool": self.right_tool / calls,
            "right tool and arguments": self.right_arguments / calls,
            "right answers": self.right_answers / answers,
        }
