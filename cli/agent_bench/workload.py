"""What users ask: sessions of coding agents, or a trace in Mooncake's format (FAST'25).

Sessions have the shape in which SWE-smith's are reported: a first turn of some 50,000 tokens, 800 more with each turn,
10 to 15 turns, answers of 500. They are closed: a user sends the next turn when the answer is there. A trace is open:
its requests come when they came. One JSON object a line: timestamp (ms), input_length, output_length, hash_ids (of
blocks of 512 tokens; equal ids are equal text).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.agent_bench.records import Record, Settings
from tokenrelay.cli.agent_bench.text import Ruler

TRACE_BLOCK = 512  # tokens of a hash id
Messages = list[dict[str, str]]


@dataclass(slots=True)
class Ideal:
    """What an infinite cache would have. Shared by all users of a run."""

    system_tokens: int
    seen_system: bool = False
    seen_blocks: set[int] = field(default_factory=set)


class Session:
    """One user's: `messages` is what the next request sends."""

    def __init__(self, name: str, settings: Settings, ruler: Ruler, ideal: Ideal) -> None:
        source = random.Random(f"{settings.seed} {name}")
        self.name = name
        self.turn = 0
        self.turns = source.randint(*settings.turns)
        self._settings, self._ruler, self._ideal = settings, ruler, ideal
        self._inherited = 0  # tokens of the text so far
        system, first = settings.scaled(settings.system_tokens), settings.scaled(settings.first_tokens)
        self.messages: Messages = [
            {"role": "system", "content": ruler.text("system", system)},
            {"role": "user", "content": ruler.text(f"{name} task", max(1, first - system))},
        ]

    @property
    def output_tokens(self) -> int:
        """How long the next answer shall be."""
        return self._settings.scaled(self._settings.output_tokens)

    def asked(self) -> int:
        """A turn is being sent; how much of its prompt an infinite cache would have."""
        if self.turn:
            return self._inherited
        seen, self._ideal.seen_system = self._ideal.seen_system, True
        return self._ideal.system_tokens if seen else 0

    def answered(self, record: Record) -> bool:
        """The answer becomes part of the conversation; False: that was the last turn."""
        self.turn += 1
        self._inherited = record.prompt_tokens + record.output_tokens
        tokens = self._settings.scaled(self._settings.turn_tokens)
        self.messages += [
            {"role": "assistant", "content": record.text or "."},
            {"role": "user", "content": self._ruler.text(f"{self.name} result {self.turn}", tokens)},
        ]
        return self.turn < self.turns


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    at_s: float  # after the first one
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path, count: int) -> list[TraceRow]:
    """The first rows, those of one instant spread up to the next (the conversation trace has instants of 3 s).

    Raises ConfigError that names the line and what is wrong with it.
    """
    rows: list[TraceRow] = []
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if len(rows) >= count:
                    break
                if line.strip():
                    rows.append(_row(line, f"{path}:{number}"))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror}") from error
    if not rows:
        raise ConfigError(f"the trace {path} has no requests")
    return _spread(rows)


def _row(line: str, where: str) -> TraceRow:
    try:
        row: dict[str, Any] = json.loads(line)
        found = TraceRow(
            float(row["timestamp"]) / 1000,
            int(row["input_length"]),
            int(row["output_length"]),
            tuple(int(one) for one in row["hash_ids"]),
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{where}: expected an object with timestamp, input_length, output_length and hash_ids ({error!r})"
        ) from error
    if found.input_tokens < 1 or found.output_tokens < 0 or not found.hash_ids:
        raise ConfigError(f"{where}: input_length must be positive, output_length not negative, hash_ids not empty")
    return found


def _spread(rows: Sequence[TraceRow]) -> list[TraceRow]:
    rows = sorted(rows, key=lambda row: row.at_s)
    instants = sorted({row.at_s for row in rows})
    until = dict(zip(instants, [*instants[1:], instants[-1]], strict=True))
    counts = {instant: sum(row.at_s == instant for row in rows) for instant in instants}
    found, seen = [], dict.fromkeys(instants, 0)
    for row in rows:
        at_s = row.at_s - instants[0] + (until[row.at_s] - row.at_s) * seen[row.at_s] / counts[row.at_s]
        seen[row.at_s] += 1
        found.append(TraceRow(at_s, row.input_tokens, row.output_tokens, row.hash_ids))
    return found


def trace_messages(row: TraceRow, settings: Settings, ruler: Ruler, run: str) -> Messages:
    """Its prompt: a text per block, the last one cut. Another `run` has other texts: it finds none of them cached."""
    block = settings.scaled(TRACE_BLOCK)
    texts = [ruler.text(f"{run} block {hash_id}", block) for hash_id in row.hash_ids]
    chars = round(settings.scaled(row.input_tokens) * ruler.chars_per_token)
    return [{"role": "user", "content": "".join(texts)[:chars]}]


def trace_ideal(row: TraceRow, settings: Settings, ideal: Ideal) -> int:
    """Tokens of its prompt that an infinite cache would have; its blocks are there from now on."""
    found = 0
    for hash_id in row.hash_ids:
        if hash_id not in ideal.seen_blocks:
            break
        found += 1
    ideal.seen_blocks.update(row.hash_ids)
    return min(found * settings.scaled(TRACE_BLOCK), settings.scaled(row.input_tokens))
