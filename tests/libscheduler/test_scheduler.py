"""What no transcript shows: bounds, views, fairness, determinism, conversations, cache events."""

from __future__ import annotations

import gc
import re

import numpy as np
import pytest
from pretend import VOCABULARY, World
from siphash_model import block_hashes as model_hashes
from siphash_model import siphash128
from transcripts import KEY, make_config

from tokenrelay.libscheduler import AbortAnswer, Config, Explanation, RejectReason, Scheduler, block_hashes


def text(seed: int, size: int) -> list[int]:
    """Reproducible tokens."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, VOCABULARY, size)]


# Configuration and programmers' errors


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("block_tokens", 48),
        ("blocks", 0),
        ("slots", 0),
        ("context_tokens", 1),
        ("context_tokens", 513),  # the pool holds 512
        ("step_tokens", 3),  # every slot may decode
        ("chunk_tokens", 0),
        ("waiting_max", 0),
        ("steps_in_flight", 0),
        ("steps_in_flight", 17),
        ("overtakes_max", -1),
        ("class_overtakes_max", 0),
    ],
)
def test_a_bound_names_its_field(field: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is {value}, "):
        make_config(**{field: value})


@pytest.mark.parametrize("field", ["hash_key", "model_identity"])
def test_keys_have_16_bytes(field: str) -> None:
    values = {"hash_key": KEY, "model_identity": KEY, field: b"short"}
    with pytest.raises(ValueError, match=rf"{field} has 5 bytes, expected 16"):
        Config(blocks=8, slots=1, context_tokens=64, **values)


def test_a_wrong_commit_is_a_programmers_error_and_changes_nothing() -> None:
    scheduler = Scheduler(make_config())
    with pytest.raises(ValueError, match="no step is launched"):
        scheduler.commit(1, np.zeros(0, np.uint32), 0)
    scheduler.submit(1, np.arange(5, dtype=np.uint32), output_start=5, tokens_max=2, now_us=0)
    plan = scheduler.plan(0)
    assert plan is not None
    with pytest.raises(ValueError, match="step 2 was committed, expected 1"):
        scheduler.commit(2, np.zeros(1, np.uint32), 0)
    with pytest.raises(ValueError, match="step 1 sampled 1 tokens, got 2"):
        scheduler.commit(1, np.zeros(2, np.uint32), 0)
    scheduler.check()
    assert scheduler.commit(1, np.zeros(1, np.uint32), 0).token_ids.tolist() == [0]


def test_token_ids_may_come_as_any_buffer_of_uint32() -> None:
    tokens = np.arange(40, dtype=np.uint32)
    wire = tokens.tobytes()
    unaligned = memoryview(b"x" + wire)[1:]
    for sequence_id, buffer in enumerate([tokens, wire, bytearray(wire), memoryview(tokens), unaligned]):
        scheduler = Scheduler(make_config())
        assert scheduler.submit(sequence_id, buffer, output_start=40, tokens_max=1, now_us=0) is None
        stored = scheduler.token_ids(sequence_id)
        assert stored is not None and stored.tolist() == tokens.tolist()
    scheduler = Scheduler(make_config())
    for wrong in (np.zeros(4, np.int64), np.zeros(4, np.float32), np.zeros(8, np.uint32)[::2], b"123"):
        with pytest.raises((TypeError, BufferError, ValueError)):
            scheduler.submit(1, wrong, output_start=1, tokens_max=9, now_us=0)
    assert scheduler.submit(1, b"", output_start=0, tokens_max=9, now_us=0) == RejectReason.INVALID


def test_outsiders_numbers_never_raise() -> None:
    scheduler = Scheduler(make_config())
    tokens = np.arange(10, dtype=np.uint32)
    huge = 2**62
    assert scheduler.submit(1, tokens, output_start=huge, tokens_max=1, now_us=0) == RejectReason.INVALID
    assert scheduler.submit(1, tokens, output_start=10, tokens_max=-huge, now_us=0) == RejectReason.INVALID
    stops = list(range(5000))
    invalid = scheduler.submit(1, tokens, output_start=10, tokens_max=1, stop_token_ids=stops, now_us=0)
    assert invalid == RejectReason.INVALID
    assert scheduler.submit(1, tokens, output_start=10, tokens_max=huge, priority=-huge, now_us=0) is None
    assert scheduler.submit(2, tokens, output_start=10, tokens_max=huge, priority=huge, now_us=0) is None
    assert scheduler.abort(2**64 - 1, 0) == AbortAnswer.UNKNOWN


# Views


def test_views_are_read_only_without_copy_and_outlive_what_made_them() -> None:
    scheduler = Scheduler(make_config())
    table = scheduler.block_table
    assert table.shape == (4, 16) and table.dtype == np.int32 and not table.flags.writeable
    scheduler.submit(1, np.arange(40, dtype=np.uint32), output_start=40, tokens_max=9, now_us=0)
    plan = scheduler.plan(0)
    assert plan is not None
    row = table[plan.slots[0]]
    assert len(set(row[:3].tolist())) == 3  # the same memory: the plan's blocks are seen
    tokens, ids = plan.token_ids, plan.sequence_ids
    assert not tokens.flags.writeable and tokens.base is plan
    step = plan.step
    del plan
    for _ in range(9):  # were the plan recycled while its views live, these steps would overwrite them
        scheduler.commit(step, np.ones(1, np.uint32), 0)
        later = scheduler.plan(0)
        step = later.step if later is not None else 0
    assert tokens.tolist() == list(range(40)) and ids.tolist() == [1]
    assert scheduler.counts().sequences_running == 0
    del scheduler
    gc.collect()
    assert table[0, :3].tolist() == row[:3].tolist()  # the table keeps its memory alive


def test_a_scheduler_may_be_dropped_in_the_middle_of_everything() -> None:
    for steps in range(4):
        scheduler = Scheduler(make_config(steps_in_flight=3, chunk_tokens=16))
        for sequence_id in range(1, 9):
            tokens = np.arange(40 + sequence_id % 2, dtype=np.uint32)
            scheduler.submit(sequence_id, tokens, output_start=len(tokens), tokens_max=9, now_us=0)
        for _ in range(steps):
            scheduler.plan(0)
        scheduler.abort(1, 0)
        del scheduler  # linear handles abort the process if one is dropped


# Hashes


def test_hashes_are_siphash_2_4_128_chained() -> None:
    # From the reference code's vectors_sip128: key 00..0f, messages of 0, 1 and 15 bytes.
    assert siphash128(KEY, b"").hex() == "a3817f04ba25a8e66df67214c7550293"
    assert siphash128(KEY, b"\0").hex() == "da87c1d86b99af44347659119b22fc45"
    rng = np.random.default_rng(1)
    for block_tokens in (16, 32, 64, 128):
        for salt in (b"", b"tenant", bytes(100)):
            tokens = rng.integers(0, 2**32, 300, dtype=np.uint32)
            got = block_hashes(tokens, block_tokens=block_tokens, hash_key=KEY, model_identity=bytes(16), salt=salt)
            assert got == model_hashes(tokens.tolist(), block_tokens, KEY, bytes(16), salt)
    with pytest.raises(ValueError, match="block_tokens is 20"):
        block_hashes(tokens, block_tokens=20, hash_key=KEY, model_identity=KEY)


def test_cache_events_tell_what_the_cache_holds() -> None:
    config = make_config(blocks=12, context_tokens=128, slots=3)
    world = World(config)
    held: set[bytes] = set()
    for sequence_id in range(1, 60):
        world.submit(sequence_id, text(sequence_id % 5, 20 + sequence_id % 60), tokens_max=10)
        world.drain()
        for kind, block_hash in world.scheduler.take_cache_events():
            if kind == "sealed":
                assert block_hash not in held
                held.add(block_hash)
            else:
                assert kind == "evicted"
                held.remove(block_hash)
        assert len(held) == world.scheduler.counts().blocks_cached
    known = block_hashes(np.array(text(59 % 5, 79), np.uint32), block_tokens=16, hash_key=KEY, model_identity=bytes(16))
    assert set(known) <= held  # they are the hashes that anybody with the key computes


# Conversations


def test_each_of_20_turns_prefills_only_what_it_appended() -> None:
    config = Config(
        blocks=64, slots=2, context_tokens=4096, chunk_tokens=256, hash_key=KEY, model_identity=KEY, steps_in_flight=2
    )
    world = World(config)
    conversation: list[int] = []
    for turn in range(1, 21):
        before = world.scheduler.counts()
        standing = max(len(conversation) - 1, 0) // 64 * 64  # the last token sampled was never computed
        conversation = conversation + text(turn, 60 + turn)
        assert world.submit(turn, list(conversation), tokens_max=40) is None
        conversation += world.live[turn].outputs
        world.drain()
        after = world.scheduler.counts()
        assert after.cached_tokens - before.cached_tokens == standing, f"turn {turn}"
        assert after.prompt_tokens - before.prompt_tokens == len(conversation) - 40
        hashed = after.hashed_blocks - before.hashed_blocks
        assert hashed <= (len(conversation) - standing) // 64 + 2, f"turn {turn} hashed what it did not append"
    computed = after.prompt_tokens - after.cached_tokens
    assert computed < 20 * (80 + 40 + 64 + 1)  # O(appended), not O(context): 20 turns sum up to 21,000 prompt tokens


# Fairness


def run_until_ended(world: World, sequence_id: int, next_request: list[int], size: int, bound: int, **kw: int) -> int:
    """Keep the queue full of others until the sequence ends; how many others ended before it."""
    ended_before = len(world.ended)
    for _ in range(bound):
        if sequence_id not in world.live:
            return len(world.ended) - ended_before - 1
        while world.scheduler.counts().sequences_waiting < 6:
            world.submit(next_request[0], text(next_request[0], size), tokens_max=4, **kw)
            next_request[0] += 1
        world.step()
    raise AssertionError(f"starved: {world.scheduler.explain(sequence_id)}")


@pytest.mark.parametrize("overtakes_max", [0, 3, 16])
def test_a_blocked_large_prompt_is_overtaken_within_its_bound(overtakes_max: int) -> None:
    config = make_config(blocks=12, context_tokens=192, slots=4, overtakes_max=overtakes_max)
    world = World(config)
    following = [100]
    for sequence_id in (1, 2, 3):
        world.submit(sequence_id, text(sequence_id, 40), tokens_max=30)
    world.step()
    world.submit(50, text(50, 180), tokens_max=4)  # needs the whole pool
    overtaken = run_until_ended(world, 50, following, 20, bound=300)
    assert overtaken <= overtakes_max + 4 + 3  # those that overtook, plus those that ran already


def test_a_class_is_not_starved_by_better_ones() -> None:
    config = make_config(slots=2, class_overtakes_max=5)
    world = World(config)
    following = [100]
    for _ in range(6):
        world.submit(following[0], text(following[0], 20), tokens_max=4, priority=-1)
        following[0] += 1
    world.submit(50, text(50, 30), tokens_max=2, priority=7)
    assert run_until_ended(world, 50, following, 20, bound=100, priority=-1) <= 5 + 2 * 2


def test_a_running_prompt_comes_before_admissions_of_better_classes() -> None:
    world = World(make_config(slots=4, step_tokens=16, chunk_tokens=16, context_tokens=110))
    world.submit(1, text(1, 60), tokens_max=1, priority=5)
    world.step()
    following = 2
    for _ in range(30):  # its three more chunks wait for one other prompt of 6 chunks each, at most
        while world.scheduler.counts().sequences_waiting < 3:
            world.submit(following, text(following, 96), tokens_max=1)
            following += 1
        world.step()
    assert 1 in world.ended


def test_first_come_first_served_under_steady_load() -> None:
    config = make_config(slots=3, chunk_tokens=16, step_tokens=24)
    world = World(config)
    order = []
    for sequence_id in range(1, 40):
        world.submit(sequence_id, text(sequence_id, 10 + sequence_id * 7 % 50), tokens_max=3)
        world.step()
    while world.live or world.launched:
        world.step()
    seen: set[int] = set()
    for entry in world.history:
        for sequence_id in entry[0]:  # type: ignore[index]
            if sequence_id not in seen:
                order.append(sequence_id)
                seen.add(sequence_id)
    assert order == sorted(order)


def test_nobody_waits_for_ever_under_pressure() -> None:
    config = make_config(blocks=10, context_tokens=160, slots=4, waiting_max=8)
    world = World(config)
    rng = np.random.default_rng(3)
    for sequence_id in range(1, 150):
        while world.scheduler.counts().sequences_waiting >= 8:
            world.step()
        world.submit(sequence_id, text(int(rng.integers(4)), int(rng.integers(1, 110))), tokens_max=40)
    world.drain()
    assert world.scheduler.counts().preemptions > 10  # the pool was too small
    assert world.waited_steps_max < 1500


# Determinism


def test_the_same_inputs_give_the_same_plans() -> None:
    def run() -> list[object]:
        world = World(make_config(blocks=14, context_tokens=160, steps_in_flight=2, chunk_tokens=24))
        rng = np.random.default_rng(7)
        for sequence_id in range(1, 120):
            world.submit(
                sequence_id,
                text(int(rng.integers(3)), int(rng.integers(1, 100))),
                tokens_max=int(rng.integers(1, 30)),
                stops=(int(rng.integers(VOCABULARY)),),
                priority=int(rng.integers(-1, 2)),
            )
            if rng.integers(4) == 0 and world.live:
                world.abort(min(world.live))
            world.step()
        world.drain()
        return world.history

    assert run() == run()


def test_what_a_sequence_gives_does_not_depend_on_the_company_it_keeps() -> None:
    """The pretend transformer asserts it at every token; here for every size of step and chunk."""
    for step_tokens, chunk_tokens, ahead in ((4, 1, 1), (11, 7, 2), (64, 64, 3), (512, 512, 2)):
        world = World(make_config(step_tokens=step_tokens, chunk_tokens=chunk_tokens, steps_in_flight=ahead))
        for sequence_id in range(1, 30):
            world.submit(sequence_id, text(sequence_id % 4, 30 + sequence_id), tokens_max=20)
        world.drain()


# Explaining


def test_explain_says_what_a_sequence_waits_for() -> None:
    scheduler = Scheduler(make_config(slots=1))
    tokens = np.arange(40, dtype=np.uint32)
    for sequence_id in (1, 2):
        scheduler.submit(sequence_id, tokens, output_start=40, tokens_max=3, now_us=0)
    scheduler.plan(0)
    assert re.search(r"^Decoding: prompt 40 tokens, output 0 of 3; slot 0, 40 tokens", scheduler.explain(1))
    assert scheduler.explain(2).endswith("next in line; no slot is free (1 in use)")
    assert scheduler.explain(3).startswith("unknown")


def test_an_explanation_has_the_same_as_numbers() -> None:
    scheduler = Scheduler(make_config(slots=2, blocks=16))
    for sequence_id, size in ((1, 100), (2, 100), (3, 200), (4, 20)):
        tokens = np.arange(size, dtype=np.uint32) + 1000 * (0 if sequence_id < 3 else sequence_id)
        scheduler.submit(sequence_id, tokens, output_start=size, tokens_max=3, now_us=sequence_id)
    scheduler.plan(0)
    running, held, waiting = (scheduler.explanation(i) for i in (1, 2, 3))
    assert running is not None and held is not None and waiting is not None
    assert (running["state"], running["why"], running["chunk_tokens"]) == ("Decoding", "CHUNK_REST", 100)
    assert (held["state"], held["why"], held["held_by"], held["holds"]) == ("Held", "WAITS_PREFIX", 1, 1)
    assert (waiting["state"], waiting["why"], waiting["ahead"]) == ("Waiting", "WAITS_BLOCKS", 0)
    assert (waiting["blocks_wanted"], waiting["blocks_available"], waiting["blocks_reserved"]) == (13, 6, 2 // 4 + 1)
    assert all(one["text"] == scheduler.explain(one["sequence_id"]) for one in (running, held, waiting))
    assert set(running) == set(Explanation.__annotations__)
    assert scheduler.explanation(99) is None
