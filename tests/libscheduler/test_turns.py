"""Next turns that name their parent, and what things cost: with what the change is, never with what merely is there."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from transcripts import KEY

from tokenrelay.libscheduler import Config, RejectReason, Scheduler

PROMPT = 5_000


def make(blocks: int = 400, slots: int = 64, waiting_max: int = 1024) -> Scheduler:
    return Scheduler(
        Config(
            blocks=blocks,
            slots=slots,
            context_tokens=blocks * 64,
            step_tokens=16_384,
            chunk_tokens=16_384,
            waiting_max=waiting_max,
            hash_key=KEY,
            model_identity=KEY,
            steps_in_flight=1,
        )
    )


def ids(seed: int, count: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 30_000, count).astype(np.uint32)


def run(scheduler: Scheduler) -> list[int]:
    """Until nothing can run; the sampled tokens are 7. What each admission found in the cache."""
    cached: list[int] = []
    while (plan := scheduler.plan(0)) is not None:
        cached += plan.admitted_cached.tolist()
        scheduler.commit(plan.step, np.full(int(plan.samples.sum()), 7, np.uint32), 0)
    return cached


def submit(scheduler: Scheduler, sequence_id: int, token_ids: np.ndarray, **fields: object) -> RejectReason | None:
    values = {"output_start": len(token_ids), "tokens_max": 20, "now_us": 0, **fields}
    return scheduler.submit(sequence_id, token_ids, **values)  # type: ignore[arg-type]


@pytest.fixture
def ended() -> Scheduler:
    """A session of 5,000 tokens and 20 of output: sequence 1."""
    scheduler = make()
    assert submit(scheduler, 1, ids(1, PROMPT)) is None
    run(scheduler)
    return scheduler


# The parent


def test_a_turn_with_a_parent_is_the_whole_text(ended: Scheduler) -> None:
    assert submit(ended, 2, ids(2, 300), parent=1, output_start=PROMPT + 320) is None
    held = ended.token_ids(2)
    assert held is not None
    np.testing.assert_array_equal(held, np.concatenate([ids(1, PROMPT), np.full(20, 7), ids(2, 300)]))
    assert run(ended) == [(PROMPT + 19) // 64 * 64]  # the last sampled token was never computed
    ended.check()


def test_a_turn_hashes_only_what_it_appended(ended: Scheduler) -> None:
    before = ended.counts().hashed_blocks
    submit(ended, 2, ids(2, 300), parent=1, output_start=PROMPT + 320)
    assert ended.counts().hashed_blocks - before == (PROMPT + 320) // 64 - (PROMPT + 19) // 64


def test_part_of_a_parent_where_the_template_drops_the_rest(ended: Scheduler) -> None:
    assert submit(ended, 2, ids(2, 10), parent=1, parent_tokens=PROMPT, output_start=PROMPT + 10) is None
    np.testing.assert_array_equal(ended.token_ids(2), np.concatenate([ids(1, PROMPT), ids(2, 10)]))
    # What the child dropped is gone for others too; what it kept serves them all, while it runs and when it ended.
    assert submit(ended, 3, ids(3, 5), parent=1, output_start=PROMPT + 5) is None
    np.testing.assert_array_equal(ended.token_ids(3), np.concatenate([ids(1, PROMPT), ids(3, 5)]))
    reason = submit(ended, 4, ids(3, 5), parent=1, parent_tokens=PROMPT + 1, output_start=PROMPT + 6)
    assert reason == RejectReason.PARENT_UNKNOWN
    run(ended)
    assert submit(ended, 5, ids(3, 5), parent=1, parent_tokens=100, output_start=105) is None
    np.testing.assert_array_equal(ended.token_ids(5), np.concatenate([ids(1, 100), ids(3, 5)]))
    run(ended)
    ended.check()


def test_a_parent_may_still_run(ended: Scheduler) -> None:
    submit(ended, 2, ids(2, 100), tokens_max=50)
    for _ in range(3):
        plan = ended.plan(0)
        assert plan is not None
        ended.commit(plan.step, np.full(int(plan.samples.sum()), 7, np.uint32), 0)
    assert submit(ended, 3, ids(3, 9), parent=2, output_start=112) is None
    np.testing.assert_array_equal(ended.token_ids(3), np.concatenate([ids(2, 100), [7, 7, 7], ids(3, 9)]))
    run(ended)


def test_twenty_turns_follow_each_other() -> None:
    scheduler, text = make(), np.zeros(0, np.uint32)
    for turn in range(1, 21):
        appended = ids(turn, 150)
        text = np.concatenate([text, appended])
        parent = turn - 1 if turn > 1 else None
        assert submit(scheduler, turn, appended, parent=parent, output_start=len(text)) is None
        np.testing.assert_array_equal(scheduler.token_ids(turn), text)
        cached = run(scheduler)
        assert cached == [max(0, len(text) - 150 - 1) // 64 * 64]
        text = np.concatenate([text, np.full(20, 7)]).astype(np.uint32)
    assert scheduler.counts().hashed_blocks == (len(text) - 1) // 64
    assert submit(scheduler, 99, ids(5, 3), parent=1, parent_tokens=170, output_start=173) is None  # 19 heirs later
    np.testing.assert_array_equal(scheduler.token_ids(99), np.concatenate([text[:170], ids(5, 3)]))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"parent": 5}, RejectReason.PARENT_UNKNOWN),
        ({"parent": 1, "salt": b"another tenant"}, RejectReason.PARENT_UNKNOWN),
        ({"parent": 1, "parent_tokens": PROMPT + 21}, RejectReason.PARENT_UNKNOWN),
        ({"parent": 1, "parent_tokens": 0}, RejectReason.PARENT_UNKNOWN),
        ({"parent": 1, "parent_tokens": -1}, RejectReason.PARENT_UNKNOWN),
        ({"parent": 1, "parent_tokens": -(2**62)}, RejectReason.PARENT_UNKNOWN),
        ({"parent": 1, "output_start": PROMPT + 31}, RejectReason.INVALID),
        ({"parent": 1, "output_start": PROMPT, "tokens_max": 30}, RejectReason.INVALID),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    ended: Scheduler, fields: dict[str, object], reason: RejectReason
) -> None:
    assert submit(ended, 2, ids(2, 10), **{"output_start": PROMPT + 30, **fields}) == reason
    ended.check()
    assert submit(ended, 2, ids(2, 10), parent=1, output_start=PROMPT + 30) is None


def test_texts_are_kept_within_a_bound() -> None:
    """At least as many tokens as the pool holds, four times that at most."""
    scheduler, turns = make(blocks=100, slots=1), 60
    for turn in range(1, turns + 1):
        submit(scheduler, turn, ids(turn, 1_000), tokens_max=1)
        run(scheduler)

    def known(turn: int) -> bool:
        return submit(scheduler, 1_000 + turn, ids(0, 1), parent=turn, output_start=1_002) is None

    kept = [turn for turn in range(1, turns + 1) if known(turn)]
    assert kept == list(range(kept[0], turns + 1)), "the oldest go first"
    assert 100 * 64 <= len(kept) * 1_000 <= 4 * 100 * 64


# Costs


def test_each_block_is_hashed_once_whatever_waits_and_whatever_is_cached() -> None:
    scheduler = make(blocks=100, slots=2)
    for n in range(30):
        submit(scheduler, n, ids(n, 5_000), tokens_max=1)
    hashed = scheduler.counts().hashed_blocks
    assert hashed == 30 * (5_000 // 64)
    for _ in range(50):
        if (plan := scheduler.plan(0)) is not None:
            scheduler.commit(plan.step, np.full(int(plan.samples.sum()), 7, np.uint32), 0)
    assert scheduler.counts().hashed_blocks == hashed


def cpu_us(work: Callable[[], object], times: int = 60) -> float:
    """The least CPU time of this thread that it took: what it costs when nothing is in the way."""
    found = []
    for _ in range(times):
        began = time.thread_time_ns()
        work()
        found.append(time.thread_time_ns() - began)
    return min(found) / 1_000


def decoding(blocks: int, context: int, waiting: int = 0, cached: int = 0) -> Scheduler:
    """8 sequences that decode; `waiting` prompts that do not fit; `cached` tokens of what others left."""
    scheduler = make(blocks=blocks, slots=64, waiting_max=1024)
    for n in range(cached // 8_000):
        submit(scheduler, 10_000 + n, ids(n, 8_000), tokens_max=1)
        run(scheduler)
    for n in range(8):
        submit(scheduler, n + 1, ids(n, context), tokens_max=500)
    while (plan := scheduler.plan(0)) is not None:
        scheduler.commit(plan.step, np.full(int(plan.samples.sum()), 7, np.uint32), 0)
        if plan.decodes == 8:
            break
    room = scheduler.counts().blocks_free + scheduler.counts().blocks_cached
    for n in range(waiting):
        assert submit(scheduler, 20_000 + n, ids(500 + n, (room + 1) * 64), tokens_max=2) is None
    return scheduler


def step(scheduler: Scheduler, rows: int) -> None:
    plan = scheduler.plan(0)
    assert plan is not None and int(plan.samples.sum()) == rows
    scheduler.commit(plan.step, np.full(rows, 7, np.uint32), 0)


@pytest.mark.parametrize(
    ("blocks", "context", "waiting", "cached"),
    [(20_000, 1_000, 0, 0), (3_000, 1_000, 0, 160_000), (20_000, 10_000, 0, 0), (200, 1_000, 100, 0)],
    ids=["pool", "cache", "context", "waiting"],
)
def test_a_step_costs_its_rows_alone(blocks: int, context: int, waiting: int, cached: int) -> None:
    """100 times the pool, a full cache, 10 times the context, 100 that wait: a step costs what it costs without."""
    small, large = decoding(200, 1_000), decoding(blocks, context, waiting, cached)
    ratios = []
    for _ in range(5):  # in turn, so that a busy machine hurts both
        ratios.append(cpu_us(lambda: step(large, 8), 20) / cpu_us(lambda: step(small, 8), 20))
    assert sorted(ratios)[2] < 1.8, ratios
