"""What bench/eviction.py plays: requests as chains of blocks, from a trace or from generated agent sessions."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

BLOCK_TOKENS = 512  # what a block of a trace stands for
TURN_TOKENS = 800  # appended by a turn of an agent: its output and the tool's result


@dataclass(frozen=True)
class Request:
    """A prompt that arrives: its full blocks, each named by the prefix that ends with it."""

    at_us: int
    blocks: tuple[int, ...]
    tools: bool = False


def read_trace(path: Path, requests_max: int | None = None) -> list[Request]:
    """Requests of a trace in Mooncake's format (FAST'25): one JSON object a line, `hash_ids` being the blocks."""
    requests: list[Request] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if requests_max is not None and len(requests) == requests_max:
                break
            try:
                entry = json.loads(line)
                requests.append(Request(int(entry["timestamp"]) * 1000, tuple(entry["hash_ids"])))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}:{number}: expected an object with timestamp and hash_ids: {error}") from error
    return requests


class Agents:
    """Sessions of coding agents on three shared system prompts, with sub-agents, among one-off requests.

    A session has 10 to 40 turns and appends 800 tokens a turn; between turns a tool runs: most take seconds (median
    4 s, log-normal), one in twenty waits for a test suite or a person (median 3 min). A turn in twelve sends a
    sub-agent of 3 to 8 turns off. Six one-off requests come for each session, a third of them with a system prompt.
    """

    def __init__(self, seed: int, sessions: int, hours: float) -> None:
        self._random = random.Random(seed)
        self._next = 0
        self._requests: list[Request] = []
        self._prompts = [self._new(blocks) for blocks in (12, 10, 8)]
        span_us = hours * 3600e6
        for _ in range(sessions):
            self._session(self._random.random() * span_us, self._random.randint(10, 40), main=True)
        for _ in range(6 * sessions):
            base = self._random.choice(self._prompts) if self._random.random() < 1 / 3 else []
            blocks = base + self._new(self._random.randint(2, 40))
            self._requests.append(Request(int(self._random.random() * span_us), tuple(blocks)))

    def requests(self) -> list[Request]:
        """In the order of their arrival."""
        return sorted(self._requests, key=lambda request: request.at_us)

    def _new(self, blocks: int) -> list[int]:
        self._next += blocks
        return list(range(self._next - blocks, self._next))

    def _session(self, at_us: float, turns: int, *, main: bool) -> None:
        context = list(self._random.choice(self._prompts)) + self._new(self._random.randint(2, 12))
        owed = 0.0  # of a block
        for _ in range(turns):
            self._requests.append(Request(int(at_us), tuple(context), tools=True))
            if main and self._random.random() < 1 / 12:
                self._session(at_us + 5e6, self._random.randint(3, 8), main=False)
                at_us += 60e6
            owed += TURN_TOKENS / BLOCK_TOKENS
            context += self._new(int(owed))
            owed -= int(owed)
            rare = self._random.random() < 0.05
            at_us += 3e6 + self._random.lognormvariate(math.log(180e6 if rare else 4e6), 1.2 if rare else 1.5)
