"""Scenarios as transcripts: a command a line, and indented below it what the scheduler answers.

    submit 1 A40 max=2
      accepted
    plan
      step 1: 1 prefills [0, 40) and samples, admitted to slot 0 with 0 cached

A prompt is written in pieces: `A40+B10` is 40 tokens of text A, then 10 of text B (from the beginning of each text).
`commit 7 8` gives one token for each sampled row of the oldest launched step. After every command all invariants are
checked.
"""

from __future__ import annotations

import re
import textwrap
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenrelay.libscheduler import Config, Finish, Outcome, Plan, Scheduler

KEY = bytes(range(16))
FINISH = {Finish.NONE: "", Finish.STOP: " (stop)", Finish.LENGTH: " (length)"}


def make_config(**fields: int) -> Config:
    """A small configuration: 16 tokens a block, 4 slots, 32 blocks."""
    values: dict[str, Any] = {"block_tokens": 16, "blocks": 32, "slots": 4, "context_tokens": 256, **fields}
    return Config(hash_key=KEY, model_identity=bytes(16), **values)


def prompt(spec: str) -> NDArray[np.uint32]:
    """The tokens of `A40+B10`: distinct for every letter and place."""
    pieces = [np.arange(int(n), dtype=np.uint32) + 10_000 * ord(text) for text, n in re.findall(r"([A-Z])(\d+)", spec)]
    return np.concatenate(pieces)


class Transcript:
    """A scheduler driven by commands."""

    def __init__(self, config: Config) -> None:
        self.scheduler = Scheduler(config)
        self.launched: deque[Plan] = deque()
        self.now_us = 0

    def play(self, text: str) -> str:
        """Run the commands of a transcript (its indented lines are ignored) and return it with the real answers."""
        out = []
        for line in textwrap.dedent(text).strip().splitlines():
            if line.startswith(" ") or not line:
                continue
            command, *words = line.split()
            answers = getattr(self, f"do_{command}")(*words)
            self.scheduler.check()
            out += [line, *("  " + answer for answer in answers)]
        return "\n".join(out) + "\n"

    def do_submit(self, sequence_id: str, spec: str, *options: str) -> list[str]:
        tokens = prompt(spec)
        known = dict(option.split("=") for option in options)
        reason = self.scheduler.submit(
            int(sequence_id),
            tokens,
            output_start=int(known.get("output_start", len(tokens))),
            tokens_max=int(known.get("max", 1)),
            stop_token_ids=[int(token) for token in known["stop"].split(",")] if "stop" in known else (),
            priority=int(known.get("priority", 0)),
            salt=known.get("salt", "").encode(),
            now_us=self.now_us,
        )
        return ["accepted" if reason is None else f"rejected: {reason.name}"]

    def do_abort(self, sequence_id: str) -> list[str]:
        return [self.scheduler.abort(int(sequence_id), self.now_us).name]

    def do_plan(self) -> list[str]:
        self.now_us += 1
        plan = self.scheduler.plan(self.now_us)
        if plan is None:
            return ["nothing"]
        self.launched.append(plan)
        taken = zip(plan.admitted_slots, plan.admitted_cached, strict=True)
        admitted = {
            int(i): f", admitted to slot {slot} with {cached} cached"
            for i, (slot, cached) in zip(plan.admitted_ids, taken, strict=True)
        }
        return [
            f"step {plan.step}: {self._row(plan, i)}{admitted.pop(int(sequence_id), '')}"
            for i, sequence_id in enumerate(plan.sequence_ids)
        ]

    @staticmethod
    def _row(plan: Plan, i: int) -> str:
        start, length = plan.starts[i], plan.lengths[i]
        if i < plan.decodes:
            return f"{plan.sequence_ids[i]} decodes {start}" + (" from feedback" if plan.feedback[i] else "")
        samples = " and samples" if plan.samples[i] else ""
        return f"{plan.sequence_ids[i]} prefills [{start}, {start + length}){samples}"

    def do_commit(self, *tokens: str) -> list[str]:
        plan = self.launched.popleft()
        self.now_us += 1
        outcome = self.scheduler.commit(plan.step, np.array([int(t) for t in tokens], np.uint32), self.now_us)
        return [self._outcome(outcome, i) for i in range(len(outcome.sequence_ids))] or ["no tokens"]

    @staticmethod
    def _outcome(outcome: Outcome, i: int) -> str:
        first = f" first, {outcome.cached_tokens[i]} cached" if outcome.first[i] else ""
        return f"{outcome.sequence_ids[i]} gives {outcome.token_ids[i]}{FINISH[Finish(outcome.finish[i])]}{first}"

    def do_counts(self) -> list[str]:
        c = self.scheduler.counts()
        return [
            f"blocks {c.blocks_free} free {c.blocks_cached} cached {c.blocks_active} active; "
            f"sequences {c.sequences_waiting} waiting {c.sequences_running} running; preemptions {c.preemptions}"
        ]

    def do_usage(self) -> list[str]:
        c = self.scheduler.counts()
        return [f"prompt {c.prompt_tokens} cached {c.cached_tokens} output {c.output_tokens}"]

    def do_explain(self, sequence_id: str) -> list[str]:
        return [self.scheduler.explain(int(sequence_id))]

    def do_table(self, slot: str, blocks: str) -> list[str]:
        return [" ".join(str(b) for b in self.scheduler.block_table[int(slot), : int(blocks)])]


def check_transcript(config: Config, text: str) -> Transcript:
    """Play the transcript and compare it with what it says."""
    transcript = Transcript(config)
    wanted = textwrap.dedent(text).strip() + "\n"
    assert transcript.play(text) == wanted
    return transcript
