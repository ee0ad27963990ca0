"""Plays the commands of a transcript on a scheduler, and says what it answered. The words are in transcript.py."""

from __future__ import annotations

from collections import deque

import numpy as np
from numpy.typing import NDArray

from tokenrelay.libscheduler._native import (
    AbortAnswer,
    Config,
    DraftAnswer,
    Finish,
    Outcome,
    Plan,
    Scheduler,
    block_hashes,
    words_of,
)
from tokenrelay.libscheduler.transcript import KEY, Command, prompt_tokens, time_us

_FINISH = {Finish.NONE: "", Finish.STOP: " (stop)", Finish.LENGTH: " (length)"}
RUN_MAX = 1000  # steps of one command


class Player:
    """A scheduler that commands drive. After each one all invariants are checked."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.launched: deque[Plan] = deque()
        self.now_us = 0
        self.known: dict[int, NDArray[np.uint32]] = {}  # tokens of each sequence, ended ones too
        self.salts: dict[int, bytes] = {}
        self.copies: list[int] = []  # their ids; a transcript counts them from 1 on

    def answer(self, command: Command) -> list[str]:
        """Run one command. Raises TranscriptError for what it cannot mean, AssertionError when the books break."""
        answers: list[str] = getattr(self, f"_{command.name}")(command)
        self.scheduler.check()
        return answers

    def finish(self) -> None:
        """At the end of a transcript: whatever is open is aborted, and then nothing is held any more."""
        for sequence_id in self.known:
            self.scheduler.abort(sequence_id, self.now_us)
        while self.launched:
            plan = self.launched.popleft()
            self.scheduler.commit(plan.step, np.zeros(plan.sampled, np.uint32), self.now_us)
        self.scheduler.copy_failed(self.copies)
        self.scheduler.check()
        counts = self.scheduler.counts()
        left = (counts.blocks_active, counts.sequences_running, counts.sequences_waiting, counts.steps_in_flight)
        assert left == (0, 0, 0, 0), f"left at the end: {left} (blocks, running, waiting, steps)"

    # -- events -------------------------------------------------------------------------------------------------------
    def _submit(self, command: Command) -> list[str]:
        sequence_id = command.number(command.words[0], "ID")
        tokens = prompt_tokens(command, command.words[1], self.known)
        stops = command.options["stop"].split(",") if "stop" in command.options else ()
        salt = command.options.get("salt", "").encode()
        parent = command.option("parent", 0) if "parent" in command.options else None
        before = self.known.get(parent, tokens[:0]) if parent is not None else tokens[:0]
        whole = np.concatenate([before[: command.option("parent_tokens", len(before))], tokens])
        reason = self.scheduler.submit(
            sequence_id,
            tokens,
            output_start=command.option("output_start", len(whole)),
            tokens_max=command.option("max", 1),
            stop_token_ids=[command.number(token, "stop") for token in stops],
            priority=command.option("priority", 0),
            salt=salt,
            tenant=command.options.get("tenant", "").encode(),
            parent=parent,
            parent_tokens=command.option("parent_tokens", 0) if "parent_tokens" in command.options else None,
            expected_tokens=command.option("expected", 0),
            tps_floor=command.option("floor", 0),
            now_us=self.now_us,
        )
        if reason is not None:
            return [f"rejected: {reason.name}"]
        self.known[sequence_id], self.salts[sequence_id] = whole, salt
        return ["accepted"]

    def _abort(self, command: Command) -> list[str]:
        return [AbortAnswer(self.scheduler.abort(command.number(command.words[0], "ID"), self.now_us)).name]

    def _draft(self, command: Command) -> list[str]:
        tokens = np.array([command.number(token, "TOKEN") for token in command.words[1:]], np.uint32)
        return [DraftAnswer(self.scheduler.draft(command.number(command.words[0], "ID"), tokens)).name]

    def _plan(self, _: Command) -> list[str]:
        self.now_us += 1
        plan = self.scheduler.plan(self.now_us)
        if plan is None:
            return ["nothing", *self._issued()]
        self.launched.append(plan)
        taken = zip(plan.admitted_slots, plan.admitted_cached, strict=True)
        admitted = {
            int(i): f", admitted to slot {slot} with {cached} cached"
            for i, (slot, cached) in zip(plan.admitted_ids, taken, strict=True)
        }
        tails = zip(plan.tail_tokens, plan.tail_sources, plan.tail_blocks, strict=True)
        return [
            *(
                f"step {plan.step} copies {tokens} tokens of block {source} into block {to}"
                for tokens, source, to in tails
            ),
            *(
                f"step {plan.step}: {_row(plan, i)}{admitted.pop(int(sequence_id), '')}"
                for i, sequence_id in enumerate(plan.sequence_ids)
            ),
            *self._issued(),
        ]

    def _commit(self, command: Command) -> list[str]:
        tokens = np.array([command.number(token, "TOKEN") for token in command.words], np.uint32)
        oldest = self.launched[0].step if self.launched else 0
        step = command.option("step", oldest)
        run_us = time_us(command, command.options["run"]) if "run" in command.options else None
        try:
            outcome = self.scheduler.commit(step, tokens, self.now_us + 1, run_us)
        except ValueError as error:  # a host's mistake; it changed nothing
            return [f"refused: {error}"]
        self.now_us += 1
        self.launched.popleft()
        for sequence_id, token in zip(outcome.sequence_ids.tolist(), outcome.token_ids, strict=True):
            self.known[sequence_id] = np.append(self.known[sequence_id], token)
        return [_output(outcome, i) for i in range(len(outcome.sequence_ids))] or ["no tokens"]

    def _issued(self) -> list[str]:
        """What is to be copied from now on, and what is late."""
        lines = []
        if (copies := self.scheduler.take_copies()) is not None:
            for copy_id, block, slot in zip(copies.store_ids, copies.store_blocks, copies.store_slots, strict=True):
                self.copies.append(int(copy_id))
                lines.append(f"copy {len(self.copies)}: block {block} to host slot {slot}")
            for copy_id, slot, block in zip(copies.load_ids, copies.load_slots, copies.load_blocks, strict=True):
                self.copies.append(int(copy_id))
                lines.append(f"copy {len(self.copies)}: host slot {slot} to block {block}")
        for late in self.scheduler.take_late_copies():
            lines.append(f"copy {self.copies.index(late.id) + 1} is late")
        return lines

    def _copies_of(self, command: Command) -> list[int]:
        numbers = [command.number(word, "COPY") for word in command.words]
        for number in numbers:
            if not 1 <= number <= len(self.copies):
                raise command.error(f"COPY is {number}, expected 1 to {len(self.copies)}")
        return [self.copies[number - 1] for number in numbers]

    def _copied(self, command: Command) -> list[str]:
        ids = self._copies_of(command)
        return [f"{self.scheduler.copied(ids)} of {len(ids)} were in flight"]

    def _copy_failed(self, command: Command) -> list[str]:
        ids = self._copies_of(command)
        return [f"{self.scheduler.copy_failed(ids)} of {len(ids)} were in flight"]

    def _host(self, _: Command) -> list[str]:
        h = self.scheduler.counts().host
        return [
            f"slots {h.blocks_used} of {h.blocks} used; in flight {h.write_backs_in_flight} write-backs "
            f"{h.loads_in_flight} loads, {h.copies_late} late; stored {h.blocks_stored} loaded {h.blocks_loaded} "
            f"failed {h.copies_failed} expired {h.copies_expired}"
        ]

    def _run(self, command: Command) -> list[str]:
        steps, token = command.number(command.words[0], "STEPS"), command.words[1]
        if not 1 <= steps <= RUN_MAX:
            raise command.error(f"STEPS is {steps}, expected 1 to {RUN_MAX}")
        if command.options.get("show", "all") not in ("all", "last"):
            raise command.error(f"show is {command.options['show']!r}, expected all or last")
        answers: list[str] = []
        for _ in range(steps):
            if command.options.get("show") == "last":
                answers.clear()
            if len(self.launched) < self.config.steps_in_flight:
                answers += self._plan(command)
            if not self.launched:
                break
            self.now_us += time_us(command, command.options.get("each", "0us"))
            answers += self._commit(Command(command.where, "commit", (token,) * self.launched[0].sampled, {}))
        return answers

    def _wait(self, command: Command) -> list[str]:
        self.now_us += time_us(command, command.words[0])
        return []

    # -- views --------------------------------------------------------------------------------------------------------
    def _counts(self, _: Command) -> list[str]:
        c = self.scheduler.counts()
        return [
            f"blocks {c.blocks_free} free {c.blocks_cached} cached {c.blocks_active} active; "
            f"sequences {c.sequences_waiting} waiting {c.sequences_running} running; preemptions {c.preemptions}"
        ]

    def _usage(self, _: Command) -> list[str]:
        c = self.scheduler.counts()
        return [f"prompt {c.prompt_tokens} cached {c.cached_tokens} output {c.output_tokens} aborts {c.aborts}"]

    def _floor(self, _: Command) -> list[str]:
        c = self.scheduler.counts().floor
        return [
            f"in force {c.tps_in_force:.1f}, batch 1 {c.tps_batch_1:.1f} tokens/s; tokens {c.tokens}, late "
            f"{c.tokens_late}; users below {c.users_below}; overrides {c.overrides}"
        ]

    def _drafts(self, _: Command) -> list[str]:
        c = self.scheduler.counts().drafts
        return [f"{c.sequences} sequences have one; {c.drafts} computed, of {c.tokens} tokens {c.accepted} accepted"]

    def _events(self, _: Command) -> list[str]:
        events = self.scheduler.take_cache_events()
        return [f"{kind} {self._name_of(block_hash)}" for kind, block_hash in events] or ["none"]

    def _name_of(self, block_hash: bytes) -> str:
        """Whose tokens a block holds: those of the first sequence that has them."""
        width = self.config.block_tokens
        for sequence_id, tokens in self.known.items():
            hashes = block_hashes(
                tokens, block_tokens=width, hash_key=KEY, model_identity=bytes(16), salt=self.salts[sequence_id]
            )
            if block_hash in hashes:
                start = hashes.index(block_hash) * width
                return f"{sequence_id} [{start}, {start + width})"
        return "what nobody asked for"

    def _tokens(self, command: Command) -> list[str]:
        tokens = self.scheduler.token_ids(command.number(command.words[0], "ID"))
        if tokens is None:
            return ["unknown"]
        pieces = [chr(token // 10_000) + str(token % 10_000) if token >= 650_000 else str(token) for token in tokens]
        shown = pieces if len(pieces) <= 8 else [*pieces[:3], "…", *pieces[-4:]]
        return [f"{len(pieces)}: {' '.join(shown)}"]

    def _explain(self, command: Command) -> list[str]:
        return self.scheduler.explain(command.number(command.words[0], "ID")).splitlines()

    def _why(self, command: Command) -> list[str]:
        why = self.scheduler.why(command.number(command.words[0], "ID"))
        return ["unknown" if why is None else f"{why.name}: {words_of(why)}"]

    def _table(self, command: Command) -> list[str]:
        slot, blocks = command.number(command.words[0], "SLOT"), command.number(command.words[1], "BLOCKS")
        if slot >= self.config.slots:
            raise command.error(f"SLOT is {slot}, expected 0 to {self.config.slots - 1}")
        return [" ".join(str(block) for block in self.scheduler.block_table[slot, :blocks])]


def _row(plan: Plan, i: int) -> str:
    start, length = plan.starts[i], plan.lengths[i]
    if i < plan.decodes and length > 1:
        at = int(plan.lengths[:i].sum()) + 1
        drafted = " ".join(str(token) for token in plan.token_ids[at : at + length - 1])
        return f"{plan.sequence_ids[i]} decodes {start} with a draft of {drafted}"
    if i < plan.decodes:
        return f"{plan.sequence_ids[i]} decodes {start}" + (" from feedback" if plan.feedback[i] else "")
    samples = " and samples" if plan.samples[i] else ""
    return f"{plan.sequence_ids[i]} prefills [{start}, {start + length}){samples}"


def _output(outcome: Outcome, i: int) -> str:
    first = f" first, {outcome.cached_tokens[i]} cached" if outcome.first[i] else ""
    return f"{outcome.sequence_ids[i]} gives {outcome.token_ids[i]}{_FINISH[Finish(outcome.finish[i])]}{first}"
