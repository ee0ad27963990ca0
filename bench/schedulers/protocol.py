"""What the subjects of bench/scheduler.py share: the work of each case, and how they are asked for measurements.

A subject is a script that runs in an environment of its own and speaks lines of JSON: it says `{"ready": version}`,
then answers `{"case": name, "seconds": s, "samples": n}` with the thread CPU time of up to `n` samples, in
microseconds: `{"submit": [...], "plan": [...], "apply": [...]}`. This file imports nothing but the standard library.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TextIO

BLOCK_TOKENS = 64
VOCABULARY = 32_000
SESSIONS = 16  # end before the next turn of the first one comes: 12,500 blocks, which the pool holds
SAMPLES_MIN = 3


@dataclass(frozen=True)
class Case:
    """One row of the table: what runs, what waits, and what a sample is.

    decode: a sample is one step: plan, and take the sampled tokens.
    admit: a sample is a prompt whose beginning is cached: submit, the plan that admits it, take its first token.
    turn: as admit, but the prompt is what one of SESSIONS sessions held, with `appended` tokens behind.
    """

    name: str
    kind: str  # decode, admit or turn
    blocks: int
    sequences: int = 0  # that decode
    context: int = 0  # tokens of each of them, on average: they are staggered, so that some take a block in each step
    full: bool = False  # the rest of the pool holds evictable cache
    waiting: int = 0  # prompts of `prompt` tokens that find no room
    prompt: int = 0
    cached: int = 0  # tokens of the prompt that the cache holds
    appended: int = 0
    output: int = 1_000  # tokens asked for by each decoding sequence; there are fewer samples

    @property
    def step_tokens(self) -> int:
        """Room for a whole prompt in one step, so that each subject admits at once."""
        return 65_536

    def context_of(self, n: int) -> int:
        """Tokens of the prompt of decoding sequence `n`."""
        return self.context - BLOCK_TOKENS + n % BLOCK_TOKENS


CASES = (
    Case("decode64_ctx4k_20k_room", "decode", 20_000, 64, 4_096),
    Case("decode64_ctx4k_20k_full", "decode", 20_000, 64, 4_096, full=True),
    Case("decode64_100k_full", "decode", 100_000, 64, 4_096, full=True),
    Case("decode256_100k", "decode", 100_000, 256, 4_096),
    Case("decode64_ctx32k", "decode", 36_000, 64, 32_768),
    # 64 blocks each and four to grow, and 30 beside: a waiting prompt needs 300.
    Case("waiting200_19k", "decode", 64 * 68 + 30, 64, 4_096, waiting=200, prompt=19_200, output=256),
    Case("admit_50k_48k_cached", "admit", 20_000, prompt=50_000, cached=48_000),
    Case("next_turn_800", "turn", 20_000, prompt=50_000, appended=800),
)


class Subject(Protocol):
    """A scheduler under test. Each call that is timed does what an engine around that scheduler does, and no more."""

    version: str

    def prepare(self, case: Case) -> None:
        """Forget what was before, and set the case up."""

    def sample(self) -> tuple[float, float, float]:
        """Seconds of thread CPU time to submit, to plan, and to apply what was sampled."""


BASE = random.Random(1).choices(range(VOCABULARY), k=65_536)
_made = itertools.count(1)


def tokens(count: int) -> list[int]:
    """A prompt that nobody had before: hashes are chained, so that other first tokens make every block another one."""
    number = next(_made)
    return [number % VOCABULARY, number // VOCABULARY, *BASE[: count - 2]]


def serve(make: Callable[[], Subject], commands: TextIO = sys.stdin) -> None:
    """Answer commands until the input ends. What the libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    subject = make()
    print(json.dumps({"ready": subject.version}), file=answers, flush=True)
    prepared = ""
    cases = {case.name: case for case in CASES}
    for line in commands:
        command = json.loads(line)
        if command["case"] != prepared:
            subject.prepare(cases[command["case"]])
            prepared = command["case"]
        samples: dict[str, list[float]] = {"submit": [], "plan": [], "apply": []}
        until_s = time.monotonic() + command["seconds"]
        while len(samples["plan"]) < command["samples"]:
            for values, seconds in zip(samples.values(), subject.sample(), strict=True):
                values.append(round(seconds * 1e6, 3))
            if time.monotonic() > until_s and len(samples["plan"]) >= SAMPLES_MIN:
                break
        print(json.dumps(samples), file=answers, flush=True)
