"""The toy world: deterministic short agent transcripts, one a seed.

    dialogue = write(seed=7, split="train")
    render(dialogue.messages, dialogue.tools)

A dialogue is a `Script` that a few skills (skills.py) append to: each plays one episode, a user turn and the assistant
turns that answer it. With tools on offer the assistant first thinks in a sentence; without, it answers at once.

Splits differ twice. Seeds: training counts up from `TRAIN_SEED`, the exam from `EXAM_SEED`. Wording: one combination of
phrase alternatives in eight is reserved by its hash, never drawn for training and always preferred in the exam.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "exam"]
Message = dict[str, Any]
Call = tuple[str, dict[str, Any]]

TRAIN_SEED, EXAM_SEED = 1_000_000, 0
EXAM_SEEDS_MAX = 1_000_000
RESERVED_ONE_IN = 8
REDRAWS_MAX = 12
MISSING_TRAIN = 0.07

ALTERNATIVES = re.compile(r"\[([^\]]*)\]")


@dataclass
class Dialogue:
    """OpenAI-shaped messages and tools. `facts[i]` is what assistant message i must mention to be right, `episodes[i]`
    the index in `skills` of the episode that wrote message i."""

    messages: list[Message]
    tools: list[Message]
    facts: dict[int, tuple[str, ...]]
    episodes: tuple[int, ...]
    skills: tuple[str, ...]


@dataclass
class Script:
    """A dialogue being written. `memory` is what the user has told so far."""

    rng: random.Random
    split: Split
    tools: dict[str, Message]
    messages: list[Message] = field(default_factory=list)
    facts: dict[int, tuple[str, ...]] = field(default_factory=dict)
    memory: dict[str, str] = field(default_factory=dict)
    skills: list[str] = field(default_factory=list)

    def phrase(self, pattern: str, **slots: object) -> str:
        """One of the wordings of `pattern`, `[a|b]` being alternatives and `{slot}` being filled."""
        for _ in range(REDRAWS_MAX):
            chosen = ALTERNATIVES.sub(lambda match: self.rng.choice(match[1].split("|")), pattern)
            if reserved(pattern, chosen) == (self.split == "exam"):
                break
        return chosen.format(**slots)

    def user(self, pattern: str, **slots: object) -> None:
        """A user turn. Capitals and the final mark vary, as they do when people type."""
        text = self.phrase(pattern, **slots)
        if self.rng.random() < 0.8:
            text = text[0].upper() + text[1:]
        if text[-1] in ".?!" and self.rng.random() < 0.15:
            text = text[:-1]
        self.messages.append({"role": "user", "content": text})

    def say(self, text: str, *facts: object, think: str = "") -> None:
        """An assistant turn that answers; `facts` must be in it word for word."""
        self.facts[len(self.messages)] = tuple(str(fact) for fact in facts)
        self.messages.append({"role": "assistant", "content": text} | self._reasoning(think))

    def call(self, calls: list[Call], results: list[str], think: str = "") -> None:
        """An assistant turn that calls tools, several at once in parallel, and the tools' answers in that order."""
        wrapped = [
            {
                "id": f"call_{len(self.messages)}_{index}",
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for index, (name, arguments) in enumerate(calls)
        ]
        self.messages.append({"role": "assistant", "content": None, "tool_calls": wrapped} | self._reasoning(think))
        for call, result in zip(wrapped, results, strict=True):
            self.messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})

    def _reasoning(self, think: str) -> Message:
        return {"reasoning_content": think} if think and self.tools else {}

    def offers(self, *names: str) -> bool:
        """Whether all these tools are on offer."""
        return all(name in self.tools for name in names)


def reserved(pattern: str, chosen: str) -> bool:
    """Whether this choice of a pattern's alternatives belongs to the exam. Patterns of few wordings have none."""
    wordings = 1
    for match in ALTERNATIVES.finditer(pattern):
        wordings *= match[1].count("|") + 1
    return wordings >= 2 * RESERVED_ONE_IN and zlib.crc32(chosen.encode()) % RESERVED_ONE_IN == 0


ROLES = [
    "a helpful assistant",
    "a coding agent",
    "an office assistant",
    "TokenRelay",
    "an agent that uses tools",
    "a bot",
]
STYLES = [
    "Answer in short sentences.",
    "Use the tools when they help.",
    "Be brief and correct.",
    "Be kind.",
    "Think before you act.",
]


def system_text(rng: random.Random) -> str:
    """A plain system prompt."""
    styles = rng.sample(STYLES, rng.choice((0, 0, 1, 1, 2)))
    return " ".join([f"You are {rng.choice(ROLES)}.", *styles])


def write(seed: int, split: Split, episodes_max: int = 4, missing: float = 0.0) -> Dialogue:
    """The dialogue of one seed: the same arguments always give the same one. `missing` is the probability that a tool
    which the user will ask for is not on offer, though others are."""
    from tokenrelay.assets.training import skills, tools  # they build on Script

    rng = random.Random(f"{split}:{seed}")
    episodes = min(episodes_max, rng.choices((1, 2, 3, 4, 6, 9), weights=(40, 24, 16, 12, 6, 2))[0])
    chosen = skills.choose(rng, episodes)
    script = Script(rng, split, tools.offer(rng, [skill.needs for skill in chosen], missing))
    if rng.random() < 0.7:
        script.messages.append({"role": "system", "content": system_text(rng)})
    owners = [0] * len(script.messages)
    for index, skill in enumerate(chosen):
        script.skills.append(skill.name)
        skill.play(script)
        owners += [index] * (len(script.messages) - len(owners))
    skills_played = tuple(script.skills)
    return Dialogue(script.messages, list(script.tools.values()), script.facts, tuple(owners), skills_played)


def write_train(index: int, episodes_max: int = 4, missing: float = MISSING_TRAIN) -> Dialogue:
    """The index-th dialogue of the endless training corpus."""
    return write(TRAIN_SEED + index, "train", episodes_max, missing)


def write_exam(index: int, episodes_max: int = 4, missing: float = 0.0) -> Dialogue:
    """The index-th held-out dialogue."""
    assert index < EXAM_SEEDS_MAX
    return write(EXAM_SEED + index, "exam", episodes_max, missing)
