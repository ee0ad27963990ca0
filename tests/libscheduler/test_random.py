"""Random events, found and shrunk by hypothesis, against the pretend transformer and the model."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from pretend import VOCABULARY, World
from transcripts import KEY

from tokenrelay.libscheduler import Config, HandleEvent, Handover

TEXT = [(i * i * 31 + i * 7) % VOCABULARY for i in range(400)]  # prompts share beginnings of this


def configs() -> st.SearchStrategy[Config]:
    """Small pools, in which every bound is met."""

    def build(
        slots: int,
        context: int,
        spare: int,
        budget: int,
        chunk: int,
        waiting: int,
        ahead: int,
        host: int,
        late: int,
        drafts: int,
        parts: int,
        tails: int,
    ) -> Config:
        parts = 1 if host else parts
        return Config(
            block_tokens=16,
            blocks=((context + 15) // 16 + spare) * parts,
            parts=parts,
            slots=slots,
            context_tokens=context,
            step_tokens=slots + budget,
            chunk_tokens=chunk,
            waiting_max=waiting,
            steps_in_flight=ahead,
            overtakes_max=1,
            class_overtakes_max=2,
            host_blocks=host,
            write_backs_max=4,
            copy_deadline_us=late,
            draft_tokens=drafts,
            tail_tokens_min=tails if parts == 1 else 0,
            hash_key=KEY,
            model_identity=KEY,
        )

    return st.builds(
        build,
        st.integers(1, 5),
        st.integers(20, 120),
        st.integers(0, 10),
        st.integers(0, 60),
        st.integers(1, 60),
        st.integers(1, 8),
        st.integers(1, 3),
        st.sampled_from([0, 2, 40]),
        st.sampled_from([3, 1_000_000]),
        st.sampled_from([0, 1, 4, 15]),
        st.sampled_from([1, 1, 2, 3]),
        st.sampled_from([0, 1, 6]),
    )


class Random(RuleBasedStateMachine):
    """Any order of submissions, aborts, plans and commits."""

    @initialize(config=configs())
    def start(self, config: Config) -> None:
        self.world = World(config)

    @rule(
        sequence_id=st.integers(1, 12),
        shared=st.integers(0, 100),
        own=st.lists(st.integers(0, VOCABULARY - 1), max_size=20),
        output=st.integers(0, 3),
        tokens_max=st.integers(0, 40),
        stops=st.lists(st.integers(0, VOCABULARY - 1), max_size=2).map(tuple),
        priority=st.sampled_from([0, 0, 0, -1, 1]),
        salt=st.sampled_from([b"", b"", b"x"]),
        handover=st.sampled_from([Handover.NONE, Handover.NONE, Handover.SOURCE, Handover.DESTINATION]),
    )
    def submit(
        self,
        sequence_id: int,
        shared: int,
        own: list[int],
        output: int,
        tokens_max: int,
        stops: tuple[int, ...],
        priority: int,
        salt: bytes,
        handover: Handover,
    ) -> None:
        tokens = TEXT[:shared] + own
        self.world.submit(
            sequence_id,
            tokens,
            output_start=len(tokens) - output,
            tokens_max=tokens_max,
            stops=stops,
            priority=priority,
            salt=salt,
            handover=handover,
        )

    @precondition(lambda self: self.world.transfers)
    @rule(which=st.integers(0, 100), tokens=st.integers(1, 60))
    def transfer_some(self, which: int, tokens: int) -> None:
        self.world.transfer_some(sorted(self.world.transfers)[which % len(self.world.transfers)], tokens)

    @precondition(lambda self: self.world.transfers)
    @rule(which=st.integers(0, 100), well=st.booleans(), token=st.booleans())
    def end_transfer(self, which: int, well: bool, token: bool) -> None:
        sequence_id = sorted(self.world.transfers)[which % len(self.world.transfers)]
        self.world.end_transfer(sequence_id, well=well, token=token)

    @precondition(lambda self: self.world.exported)
    @rule(which=st.integers(0, 100), event=st.sampled_from(list(HandleEvent)))
    def handle_event(self, which: int, event: HandleEvent) -> None:
        self.world.handle_event(sorted(self.world.exported)[which % len(self.world.exported)], event)

    @precondition(lambda self: self.world.copies)
    @rule(which=st.integers(0, 100), well=st.booleans())
    def end_copy(self, which: int, well: bool) -> None:
        self.world.end_copy(which % len(self.world.copies), well=well)

    @rule(sequence_id=st.integers(1, 12), right=st.integers(0, 20), wrong=st.integers(0, 4))
    def draft(self, sequence_id: int, right: int, wrong: int) -> None:
        self.world.draft(sequence_id, right, wrong)

    @precondition(lambda self: self.world.live)
    @rule(which=st.integers(0, 100), right=st.integers(0, 20), wrong=st.integers(0, 4), steps=st.integers(1, 4))
    def draft_live(self, which: int, right: int, wrong: int, steps: int) -> None:
        for _ in range(steps):
            if self.world.live:
                self.world.draft(sorted(self.world.live)[which % len(self.world.live)], right, wrong)
            self.world.step()

    @rule(late=st.booleans())
    def plan(self, late: bool) -> None:
        self.world.plan(late=late)

    @rule()
    def commit(self) -> None:
        self.world.commit()

    @rule(steps=st.integers(1, 8))
    def steps(self, steps: int) -> None:
        for _ in range(steps):
            self.world.step()

    @rule(sequence_id=st.integers(1, 12))
    def abort(self, sequence_id: int) -> None:
        self.world.abort(sequence_id)

    @precondition(lambda self: self.world.live)
    @rule(which=st.integers(0, 100))
    def abort_live(self, which: int) -> None:
        self.world.abort(sorted(self.world.live)[which % len(self.world.live)])

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.drain()


Random.TestCase.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_random_events = Random.TestCase
