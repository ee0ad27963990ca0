"""A pretend transformer that runs plans, and the model that every plan and outcome is compared with.

KV of a position is a fingerprint of all tokens up to it, kept in blocks as the real one is. A plan that reads a block
of other content, or too early, gives other tokens than the sequence gives alone, which the model knows beforehand.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tokenrelay.libscheduler import (
    AbortAnswer,
    Config,
    DraftAnswer,
    Finish,
    HandleEvent,
    Handover,
    ImportAnswer,
    Plan,
    RejectReason,
    Scheduler,
)

VOCABULARY = 64
MASK = (1 << 61) - 1


def mix(last: int, token: int) -> int:
    """A fingerprint that depends on everything before."""
    return (last * 6364136223846793005 + (token + 1) * 1442695040888963407) % MASK


def sample(fingerprint: int) -> int:
    """The token that the pretend transformer gives after these tokens."""
    return (fingerprint >> 17) % VOCABULARY


@dataclass
class Sequence:
    """One sequence: what was asked, and what it gives when it runs alone."""

    sequence_id: int
    tokens: list[int]
    output_start: int
    limit: int
    stops: frozenset[int]
    salt: bytes
    handover: Handover = Handover.NONE
    kv: list[int] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    finish: Finish = Finish.NONE
    emitted: int = 0
    planned: int = 0
    in_flight: int = 0
    submitted_step: int = 0

    def __post_init__(self) -> None:
        last = hash(self.salt) % MASK
        for token in self.tokens:
            last = mix(last, token)
            self.kv.append(last)
        while self.finish == Finish.NONE:
            self.outputs.append(sample(last))
            last = mix(last, self.outputs[-1])
            self.kv.append(last)
            if self.outputs[-1] in self.stops:
                self.finish = Finish.STOP
            elif len(self.tokens) + len(self.outputs) == self.limit:
                self.finish = Finish.LENGTH
        if self.handover == Handover.SOURCE and len(self.outputs) > 1:
            del self.outputs[1:]
            self.finish = Finish.HANDOVER

    @property
    def known(self) -> int:
        """Tokens that the scheduler knows."""
        return len(self.tokens) + self.emitted


@dataclass
class Transfer:
    """What writes the blocks of a destination: KV of its prompt behind what was found in the cache."""

    blocks: list[int]
    kv: list[int]
    written: int = 0
    aborted: bool = False


@dataclass
class Exported:
    """A handle: what its peer was told, none of which may change as long as it is there."""

    kv: list[int]  # expected, of the whole prompt
    blocks: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)


@dataclass
class Launched:
    """A step that was planned and not yet committed."""

    plan: Plan
    sampled: list[int] | None = None


@dataclass
class Copy:
    """A copy between device and host memory that has not ended: until then its target holds nonsense."""

    id: int
    block: int
    slot: int
    load: bool


class World:
    """A scheduler, the pretend device and the model."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.kv = [0] * (config.blocks * config.block_tokens)
        self.sampled_last = [0] * config.slots
        self.live: dict[int, Sequence] = {}
        self.ended: set[int] = set()
        self.launched: deque[Launched] = deque()
        self.transfers: dict[int, Transfer] = {}
        self.exported: dict[int, Exported] = {}
        self.host = [0] * (config.host_blocks * config.block_tokens)
        self.copies: list[Copy] = []
        self.steps = 0
        self.history: list[object] = []  # everything that the scheduler decided
        self.waited_steps_max = 0
        self.drafts_kept = 0  # tokens of drafts that came true

    def submit(
        self,
        sequence_id: int,
        tokens: list[int],
        *,
        output_start: int | None = None,
        tokens_max: int = 1,
        stops: tuple[int, ...] = (),
        priority: int = 0,
        salt: bytes = b"",
        handover: Handover = Handover.NONE,
    ) -> RejectReason | None:
        """Submit to the scheduler, which must refuse exactly what the model refuses."""
        start = len(tokens) if output_start is None else output_start
        expected = self.expected_reason(sequence_id, len(tokens), start, tokens_max)
        if expected is None and handover == Handover.SOURCE and sequence_id in self.exported:
            expected = RejectReason.DUPLICATE_ID
        reason = self.scheduler.submit(
            sequence_id,
            np.array(tokens, np.uint32),
            output_start=start,
            tokens_max=tokens_max,
            stop_token_ids=stops,
            priority=priority,
            salt=salt,
            handover=handover,
            now_us=self.steps,
        )
        if reason == RejectReason.QUEUE_FULL and handover == Handover.SOURCE and expected is None:
            assert len(self.exported) == self.config.waiting_max + self.config.slots
            return reason
        assert reason == expected
        if reason is None:
            limit = min(start + tokens_max, self.config.context_tokens)
            sequence = Sequence(
                sequence_id, tokens, start, limit, frozenset(stops), salt, handover, submitted_step=self.steps
            )
            self.live[sequence_id] = sequence
            if handover == Handover.SOURCE:
                self.exported[sequence_id] = Exported(sequence.kv[: len(tokens)])
        self.verify()
        return reason

    def expected_reason(self, sequence_id: int, size: int, output_start: int, tokens_max: int) -> RejectReason | None:
        """What the contract says about a submission."""
        if size >= self.config.context_tokens:
            return RejectReason.PROMPT_TOO_LONG
        if not 1 <= output_start <= size or tokens_max <= size - output_start:
            return RejectReason.INVALID
        resident = {int(i) for launched in self.launched for i in launched.plan.sequence_ids}
        if sequence_id in self.live or sequence_id in resident or sequence_id in self.transfers:
            return RejectReason.DUPLICATE_ID
        if self.scheduler.counts().sequences_waiting >= self.config.waiting_max:
            return RejectReason.QUEUE_FULL
        return None

    def abort(self, sequence_id: int) -> AbortAnswer:
        """Abort; the scheduler knows which sequences live."""
        answer = self.scheduler.abort(sequence_id, self.steps)
        if sequence_id in self.transfers:
            self.transfers[sequence_id].aborted = True
        if sequence_id in self.live:
            assert answer == AbortAnswer.ABORTED
            del self.live[sequence_id]
            self.ended.add(sequence_id)
        else:
            assert answer == (AbortAnswer.ALREADY_ENDED if sequence_id in self.ended else AbortAnswer.UNKNOWN)
        self.verify()
        return answer

    def draft(self, sequence_id: int, right: int, wrong: int) -> DraftAnswer:
        """Guess `right` tokens that will come, then as many as `wrong` that will not."""
        sequence = self.live.get(sequence_id)
        outputs = sequence.outputs[sequence.emitted : sequence.emitted + right] if sequence else []
        tokens = outputs + [VOCABULARY] * wrong
        answer = DraftAnswer(self.scheduler.draft(sequence_id, np.array(tokens, np.uint32)))
        if self.config.draft_tokens == 0:
            assert answer == DraftAnswer.OFF
        elif sequence is None:
            assert answer in (DraftAnswer.UNKNOWN, DraftAnswer.NOT_DECODING)
        self.verify()
        return answer

    def plan(self, *, late: bool = False) -> bool:
        """Plan a step; a late one is computed only when it must be committed."""
        plan = self.scheduler.plan(self.steps)
        self.take_reserved()
        self.take_copies()
        if plan is not None:
            self.steps += 1
            assert len(self.launched) < self.config.steps_in_flight
            self.check_plan(plan)
            self.launched.append(Launched(plan))
            if not late:
                self.execute_all(len(self.launched))
        self.verify()
        return plan is not None

    def check_plan(self, plan: Plan) -> None:
        """Every row continues its sequence where it stands, within all bounds."""
        assert plan.step == self.steps
        assert plan.lengths.sum() == len(plan.token_ids) <= self.config.step_tokens
        assert len(set(plan.sequence_ids.tolist())) == len(plan.sequence_ids)
        for sequence_id, cached in zip(plan.admitted_ids.tolist(), plan.admitted_cached.tolist(), strict=True):
            assert self.live[sequence_id].in_flight == 0
            self.live[sequence_id].planned = cached
        for row, sequence_id in enumerate(plan.sequence_ids.tolist()):
            sequence = self.live[sequence_id]
            start, length = int(plan.starts[row]), int(plan.lengths[row])
            decodes = row < plan.decodes
            assert start == sequence.planned
            assert 1 <= length <= (1 + self.config.draft_tokens if decodes else self.config.chunk_tokens)
            drafts = decodes and length > 1
            if drafts:  # all before it is known, no other step holds it, and nothing was planned ahead
                assert (start, sequence.in_flight, len(self.launched)) == (sequence.known - 1, 0, 0)
            assert plan.feedback[row] == (start >= sequence.known)
            assert plan.samples[row] == (decodes or start + length == sequence.known)
            sequence.planned += length
            sequence.in_flight += length if drafts else int(plan.samples[row])
            assert sequence.known + sequence.in_flight <= sequence.limit
        self.history.append((plan.sequence_ids.tolist(), plan.starts.tolist(), plan.lengths.tolist()))

    def execute_all(self, count: int) -> None:
        """Run the oldest `count` launched steps, in order, as far as they have not run."""
        for launched in list(self.launched)[:count]:
            if launched.sampled is None:
                launched.sampled = self.execute(launched.plan)

    def execute(self, plan: Plan) -> list[int]:
        """Read what the plan reads, write what it writes; the sampled tokens."""
        table, width, at = self.scheduler.block_table, self.config.block_tokens, 0
        sampled = []
        for source, block, count in zip(plan.tail_sources, plan.tail_blocks, plan.tail_tokens, strict=True):
            assert 1 <= self.config.tail_tokens_min <= count <= width
            assert source != block
            self.kv[block * width : block * width + count] = self.kv[source * width : source * width + count]
        for row, sequence_id in enumerate(plan.sequence_ids.tolist()):
            slot, start = int(plan.slots[row]), int(plan.starts[row])
            sequence = self.live.get(sequence_id)
            last = hash(sequence.salt) % MASK if sequence else 0
            if start:
                cells = [int(table[slot, p // width]) * width + p % width for p in range(start)]
                last = self.kv[cells[-1]]
                if sequence:  # else it ended meanwhile and the row is discarded
                    assert [self.kv[cell] for cell in cells] == sequence.kv[:start]
            for position in range(start, start + int(plan.lengths[row])):
                token = self.sampled_last[slot] if plan.feedback[row] else int(plan.token_ids[at])
                last = mix(last, token)
                self.kv[int(table[slot, position // width]) * width + position % width] = last
                at += 1
                if row < plan.decodes and position + 1 < start + int(plan.lengths[row]):
                    sampled.append(sample(last))
            if plan.samples[row]:
                self.sampled_last[slot] = sample(last)
                sampled.append(sample(last))
        return sampled

    def commit(self) -> bool:
        """Commit the oldest step; what comes out is what each sequence gives alone."""
        if not self.launched:
            return False
        self.execute_all(1)
        launched = self.launched.popleft()
        assert launched.sampled is not None
        tokens = np.array(launched.sampled, np.uint32)
        expected = self.expected_drafts(launched.plan)
        outcome = self.scheduler.commit(launched.plan.step, tokens, self.steps)
        self.history.append((outcome.sequence_ids.tolist(), outcome.token_ids.tolist(), outcome.finish.tolist()))
        for i, sequence_id in enumerate(outcome.sequence_ids.tolist()):
            sequence = self.live[sequence_id]
            assert outcome.token_ids[i] == sequence.outputs[sequence.emitted] == tokens[outcome.rows[i]]
            assert outcome.first[i] == (sequence.emitted == 0)
            sequence.emitted += 1
            sequence.in_flight -= 1
            last = sequence.emitted == len(sequence.outputs)
            assert outcome.finish[i] == (sequence.finish if last else Finish.NONE)
            if last:
                self.waited_steps_max = max(self.waited_steps_max, self.steps - sequence.submitted_step)
                self.ended.add(sequence_id)
                del self.live[sequence_id]
        for sequence_id, (start, count) in expected.items():
            assert outcome.sequence_ids.tolist().count(sequence_id) == count
            self.drafts_kept += count - 1
            if sequence_id in self.live:
                self.live[sequence_id].planned, self.live[sequence_id].in_flight = start + count, 0
        self.verify()
        return True

    def expected_drafts(self, plan: Plan) -> dict[int, tuple[int, int]]:
        """Where each row with a draft begins, and how many tokens it gives: one more than came true of the draft."""
        expected, at = {}, 0
        for row, sequence_id in enumerate(plan.sequence_ids.tolist()[: plan.decodes]):
            length, sequence = int(plan.lengths[row]), self.live.get(sequence_id)
            if length > 1 and sequence is not None:
                draft = plan.token_ids[at + 1 : at + length].tolist()
                coming = sequence.outputs[sequence.emitted : -1]  # the last one ends it
                count = next((i for i, token in enumerate(draft) if coming[i : i + 1] != [token]), len(draft))
                preempted = self.scheduler.explain(sequence_id).startswith("Preempting")
                expected[sequence_id] = (int(plan.starts[row]), 1 if preempted else 1 + count)
            at += length
        return expected

    # -- KV that passes between workers ----------------------------------------------------------------------
    def take_reserved(self) -> None:
        """Transfers begin where room was made."""
        for sequence_id, cached in self.scheduler.take_reserved():
            sequence = self.live[sequence_id]
            blocks = self.scheduler.import_blocks(sequence_id).tolist()
            kv = sequence.kv[cached : len(sequence.tokens)]
            assert cached % self.config.block_tokens == 0
            assert len(blocks) == -(-len(kv) // self.config.block_tokens)
            self.transfers[sequence_id] = Transfer(blocks, kv)

    def transfer_some(self, sequence_id: int, tokens: int) -> None:
        """Write some more; into the blocks of a sequence that was aborted what must harm nobody."""
        transfer, width = self.transfers[sequence_id], self.config.block_tokens
        for at in range(transfer.written, min(transfer.written + tokens, len(transfer.kv))):
            self.kv[transfer.blocks[at // width] * width + at % width] = 0 if transfer.aborted else transfer.kv[at]
            transfer.written = 0 if transfer.aborted else at + 1

    def end_transfer(self, sequence_id: int, *, well: bool, token: bool) -> None:
        """The transfer ends: well, or in vain with the first token known or not."""
        transfer = self.transfers[sequence_id]
        if transfer.aborted:
            answer = self.scheduler.imported(sequence_id, 0) if well else self.scheduler.import_stopped(sequence_id)
            assert answer == ImportAnswer.DONE
            del self.transfers[sequence_id]
            self.verify()
            return
        sequence = self.live[sequence_id]
        first, last = sequence.outputs[0], len(sequence.outputs) == 1
        if well and not last:
            self.transfer_some(sequence_id, len(transfer.kv))
            assert self.scheduler.imported(sequence_id, first) == ImportAnswer.DONE
            sequence.emitted = 1
        else:
            known = token and not last
            assert self.scheduler.import_stopped(sequence_id, first if known else None) == ImportAnswer.DONE
            sequence.emitted = int(known)
        del self.transfers[sequence_id]
        self.verify()

    # -- host memory -----------------------------------------------------------------------------------------
    def take_copies(self) -> None:
        """Copies begin, and scribble where they write."""
        if (copies := self.scheduler.take_copies()) is not None:
            stores = zip(copies.store_ids, copies.store_blocks, copies.store_slots, strict=True)
            loads = zip(copies.load_ids, copies.load_blocks, copies.load_slots, strict=True)
            self.copies += [Copy(int(i), int(block), int(slot), load=False) for i, block, slot in stores]
            self.copies += [Copy(int(i), int(block), int(slot), load=True) for i, block, slot in loads]
        for copy in self.copies:
            self.move(copy, None)

    def move(self, copy: Copy, source: list[int] | None) -> None:
        """Write a copy's target: what it holds at its source, or nonsense."""
        width = self.config.block_tokens
        memory, at = (self.kv, copy.block) if copy.load else (self.host, copy.slot)
        memory[at * width : (at + 1) * width] = source if source is not None else [-1] * width

    def end_copy(self, which: int, *, well: bool) -> None:
        """One of the copies in flight ends."""
        copy, width = self.copies.pop(which), self.config.block_tokens
        if well:
            memory, at = (self.host, copy.slot) if copy.load else (self.kv, copy.block)
            self.move(copy, memory[at * width : (at + 1) * width])
        end, other = (
            (self.scheduler.copied, self.scheduler.copy_failed)
            if well
            else (self.scheduler.copy_failed, self.scheduler.copied)
        )
        assert end([copy.id]) == 1 and other([copy.id]) == 0
        self.verify()

    def handle_event(self, sequence_id: int, event: HandleEvent) -> None:
        """Something happens to a handle; what is over is forgotten."""
        before = self.scheduler.handle_state(sequence_id)
        refused = self.scheduler.handle(sequence_id, event)
        assert refused is None or self.scheduler.handle_state(sequence_id) == before
        if self.scheduler.handle_state(sequence_id) == "":
            assert before not in ("Claimed", "Transferring", "Quarantined") or event in (
                HandleEvent.FENCE,
                HandleEvent.LOSE,
            )
            del self.exported[sequence_id]
        self.verify()

    def check_exported(self) -> None:
        """What a peer was told still holds, and its generations have not moved."""
        width, generations = self.config.block_tokens, self.scheduler.generations
        assert set(self.exported) == {i for i in self.exported if self.scheduler.handle_state(i)}
        for sequence_id, exported in self.exported.items():
            blocks = self.scheduler.readable(sequence_id).tolist()
            assert blocks[: len(exported.blocks)] == exported.blocks
            exported.generations += [int(generations[block]) for block in blocks[len(exported.blocks) :]]
            exported.blocks = blocks
            assert exported.generations == [int(generations[block]) for block in blocks]
            cells = [block * width + i for block in blocks for i in range(width)][: len(exported.kv)]
            assert [self.kv[cell] for cell in cells] == exported.kv[: len(cells)]

    def step(self) -> bool:
        """Plan as far ahead as allowed, then commit one step."""
        while self.plan():
            pass
        return self.commit()

    def drain(self) -> None:
        """Run until nothing is left, and find every block free or cached."""
        while self.live or self.launched or self.transfers or self.copies:
            while self.copies:
                self.end_copy(0, well=True)
            for sequence_id in list(self.transfers):
                self.end_transfer(sequence_id, well=True, token=True)
            for sequence_id in list(self.exported):
                for event in (HandleEvent.RECLAIM, HandleEvent.RELEASE, HandleEvent.FENCE):
                    if sequence_id in self.exported:
                        self.handle_event(sequence_id, event)
            assert self.step() or self.transfers or self.copies or not self.live, "no progress:\n" + "\n".join(
                self.scheduler.explain(i) for i in self.live
            )
        for sequence_id in list(self.exported):
            self.handle_event(sequence_id, HandleEvent.LOSE)
        counts = self.scheduler.counts()
        assert (counts.handles_open, counts.sequences_importing, counts.sequences_loading) == (0, 0, 0)
        assert (counts.blocks_active, counts.sequences_running, counts.sequences_waiting) == (0, 0, 0)
        assert counts.blocks_free + counts.blocks_cached == self.config.blocks

    def verify(self) -> None:
        """All invariants, after every event."""
        self.scheduler.check()
        counts = self.scheduler.counts()
        assert counts.blocks_free + counts.blocks_cached + counts.blocks_active == self.config.blocks
        assert counts.steps_in_flight == len(self.launched)
        assert counts.sequences_importing == len(self.transfers)
        assert counts.handles_open == len(self.exported)
        assert counts.host.write_backs_in_flight + counts.host.loads_in_flight >= len(self.copies)
        self.check_exported()
