"""What users ask, for bench/replay.py: a Mooncake trace, or generated sessions of coding agents. Needs numpy.

A trace is open: requests come when they came, at `load` times that rate. Sessions are closed: `load` users, each of
whom sends the next turn some time after the answer to the last one, and begins another session after the last turn.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.uint32]
TRACE_BLOCK = 512  # tokens of one hash id of a Mooncake trace
VOCABULARY = 32_000
OUTPUT_TOKEN = 7  # what every sequence says


@dataclass(slots=True, eq=False)
class Request:
    """One turn, and what became of it. Times in seconds of the simulation."""

    number: int
    prompt: TokenIds
    output: int
    arrives_s: float
    user: int = 0
    turn: int = 0
    first_s: float = math.nan
    last_s: float = math.nan
    emitted: int = 0
    cached: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second from the first one on; infinite for less than two."""
        return (self.emitted - 1) / (self.last_s - self.first_s) if self.emitted > 1 else math.inf


class Workload(Protocol):
    """Where requests come from. Numbers are unique."""

    def begin(self) -> Iterable[Request]:
        """Those that do not depend on others, in any order."""

    def after(self, request: Request) -> Request | None:
        """What its user asks next, after it has ended."""

    @property
    def window_s(self) -> tuple[float, float]:
        """When measurements count: after the beginning, before it runs empty."""


class Trace:
    """The first `count` requests of a Mooncake trace (FAST'25), as fast as `load` says."""

    def __init__(self, path: Path, count: int, load: float) -> None:
        with path.open(encoding="utf-8") as lines:
            self._rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
        if not self._rows:
            raise ValueError(f"{path} has no requests")
        self._load = load
        self._at_ms = spread([row["timestamp"] for row in self._rows])

    def begin(self) -> Iterable[Request]:
        """Prompts are made of their hash ids: equal ids are equal tokens."""
        for number, (row, at_ms) in enumerate(zip(self._rows, self._at_ms, strict=True), 1):
            prompt = trace_prompt(row["hash_ids"], row["input_length"])
            yield Request(number, prompt, max(1, row["output_length"]), at_ms / 1000 / self._load, user=number)

    def after(self, request: Request) -> Request | None:
        """Open: what comes next is in the trace."""
        return None

    @property
    def window_s(self) -> tuple[float, float]:
        """From a fifth of the way to the last arrival."""
        span_s = self._at_ms[-1] / 1000 / self._load
        return 0.2 * span_s, span_s


def spread(timestamps_ms: list[int]) -> list[float]:
    """From the first one on. Those of one instant are spread evenly up to the next: the conversation trace has instants
    of 3 s, and at a fraction of its rate they would come as bursts that nobody saw.
    """
    instants = sorted(set(timestamps_ms))
    until = dict(zip(instants, [*instants[1:], instants[-1]], strict=True))
    found: list[float] = []
    for instant in instants:
        count = timestamps_ms.count(instant)
        found += [instant - instants[0] + (until[instant] - instant) * n / count for n in range(count)]
    return found


def trace_prompt(hash_ids: list[int], length: int) -> TokenIds:
    """The tokens of a prompt of the trace: those of a block are its id's alone, so prefixes repeat where ids do."""
    ids = np.array(hash_ids, np.int64)
    tokens = (ids[:, None] * 7_919 + np.arange(TRACE_BLOCK)[None, :] * 104_729) % VOCABULARY
    tokens[:, 0], tokens[:, 1] = ids % VOCABULARY, ids // VOCABULARY
    return tokens.reshape(-1)[:length].astype(np.uint32)


@dataclass(frozen=True)
class AgentShape:
    """Sessions of coding agents. Medians of log-normal distributions, with the sigma of their logarithm."""

    system_tokens: int = 9_000  # tools and rules, the same for all users of an agent
    agents: int = 4
    task_tokens: tuple[float, float] = (3_000, 0.8)
    appended_tokens: tuple[float, float] = (700, 1.1)  # a tool's result
    output_tokens: tuple[float, float] = (140, 0.8)
    pause_s: tuple[float, float] = (2.5, 1.0)  # the tool runs, or the user reads
    turns: tuple[float, float] = (14, 0.6)
    context_max: int = 100_000


class Agents:
    """`load` users at work for `seconds`."""

    def __init__(self, load: int, seconds: float, seed: int = 1, shape: AgentShape | None = None) -> None:
        self._users = load
        self._seconds = seconds
        self._shape = shape or AgentShape()
        self._random = [random.Random(f"{seed} {user}") for user in range(load)]
        self._texts = [np.zeros(0, np.uint32) for _ in range(load)]
        self._turns_left = [0] * load
        self._sessions = 0
        self._numbers = 0
        self._systems = [self._fresh(random.Random(f"system {n}"), self._shape.system_tokens) for n in range(4)]

    def begin(self) -> Iterable[Request]:
        """Users come one by one over the first seconds."""
        return [
            self._turn(user, self._random[user].uniform(0, min(30.0, self._seconds / 4))) for user in range(self._users)
        ]

    def after(self, request: Request) -> Request | None:
        """The answer becomes part of the text; its user goes on until time is over."""
        user = request.user
        pause_s = self._draw(user, self._shape.pause_s)
        arrives_s = request.last_s + pause_s
        if arrives_s > self._seconds:
            return None
        answer = np.full(request.emitted, OUTPUT_TOKEN, np.uint32)
        self._texts[user] = np.concatenate([self._texts[user], answer])
        return self._turn(user, arrives_s)

    @property
    def window_s(self) -> tuple[float, float]:
        """After two fifths, when sessions are at all ages."""
        return 0.4 * self._seconds, self._seconds

    def _turn(self, user: int, arrives_s: float) -> Request:
        shape, source = self._shape, self._random[user]
        if self._turns_left[user] == 0 or len(self._texts[user]) > shape.context_max:
            self._turns_left[user] = max(1, round(self._draw(user, shape.turns)))
            task = self._fresh(source, int(self._draw(user, shape.task_tokens)) + 1)
            self._texts[user] = np.concatenate([self._systems[source.randrange(shape.agents)], task])
        else:
            appended = self._fresh(source, int(min(20_000, self._draw(user, shape.appended_tokens))) + 1)
            self._texts[user] = np.concatenate([self._texts[user], appended])
        self._turns_left[user] -= 1
        self._numbers += 1
        output = int(min(4_000, self._draw(user, shape.output_tokens))) + 1
        return Request(self._numbers, self._texts[user], output, arrives_s, user)

    def _draw(self, user: int, law: tuple[float, float]) -> float:
        return self._random[user].lognormvariate(math.log(law[0]), law[1])

    @staticmethod
    def _fresh(source: random.Random, count: int) -> TokenIds:
        return np.random.default_rng(source.getrandbits(64)).integers(8, VOCABULARY, count).astype(np.uint32)


def make(spec: dict[str, Any], load: float) -> Workload:
    """From the description that bench/replay.py sends."""
    if spec["kind"] == "trace":
        return Trace(Path(spec["path"]), spec["count"], load)
    return Agents(round(load), spec["seconds"])
