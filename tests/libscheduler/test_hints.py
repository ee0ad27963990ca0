"""What a request may say beside its prompt: the TPS floor that its user keeps, and how long its answer will be."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelled import Device, Served
from transcripts import KEY

from tokenrelay.libscheduler import Config, Handover, Why

SLACK_TOKENS = 16  # as in floor.hpp
DEVICE = Device(step=1500.0, decode_row=150.0)  # alone a user gets 600 tokens/s


def make_config(**fields: float) -> Config:
    values = {"blocks": 8192, "slots": 64, "context_tokens": 16384, "tps_floor": 70.0, "floor_wait_us": 0, **fields}
    return Config(hash_key=KEY, model_identity=KEY, **values)  # type: ignore[arg-type]


def crowd(served: Served, users: int, seed: int = 1, **asked: Any) -> None:
    """Users that come at random; the first one came alone."""
    rng = random.Random(seed)
    served.arrive(0, prompt=100, output=30, **asked)
    for _ in range(users):
        at_us = 1_000_000 + rng.randrange(1_500_000)
        served.arrive(at_us, prompt=rng.randint(20, 1500), output=rng.randint(60, 150), **asked)


def slowest_tps(served: Served, sequence_id: int, tokens: int = 64) -> float:
    """Tokens a second of one user over his slowest `tokens` in a row."""
    period_us = served.users[sequence_id].slowest_period_us(tokens)
    assert period_us > 0
    return 1e6 / period_us


def allowed_tps(floor: float, tokens: int = 64) -> float:
    """The least that is promised over so many tokens: a user may be some of them behind."""
    return floor * tokens / (tokens + SLACK_TOKENS + 1)


@pytest.mark.parametrize("everybodys", [70.0, 0.0])
def test_a_user_who_asks_for_more_gets_it(everybodys: float) -> None:
    """Among others who ask for nothing of their own."""
    found = []
    for own in (0, 200):
        served = Served(make_config(tps_floor=everybodys), DEVICE)
        crowd(served, 80)
        demanding = served.arrive(900_000, prompt=50, output=300, tps_floor=own)
        served.run()
        found.append(slowest_tps(served, demanding))
        assert served.scheduler.counts().floor.tokens_late == 0
    assert found[0] < allowed_tps(200) <= found[1]


def test_who_asks_for_less_lets_others_in() -> None:
    admitted = []
    for own in (0, 20):
        served = Served(make_config(), Device(step=1500.0, decode_row=1000.0))
        for _ in range(40):
            served.arrive(0, prompt=50, output=400, tps_floor=own)
        served.run(until_us=1_500_000)
        admitted.append(served.scheduler.counts().sequences_running)
    assert admitted[1] > 2 * admitted[0] > 0


def test_one_who_asks_for_more_waits_until_it_can_be_had() -> None:
    """Others of everybody's floor are running, too many for his: he waits, and they are not slowed down for him."""
    served = Served(make_config(), DEVICE)
    for _ in range(40):
        served.arrive(0, prompt=50, output=400)
    served.run(until_us=1_000_000)
    late = served.arrive(served.now_us, prompt=50, output=100, tps_floor=250)
    served.run(until_us=served.now_us + 100_000)
    assert served.users[late].admitted_us is None and served.scheduler.why(late) == Why.WAITS_FLOOR
    told = served.scheduler.explanation(late)
    assert told is not None and told["tps_floor"] == 250 and "asks for 250 tokens/s" in told["text"]
    assert 200 < told["tps_in_force"] <= 250
    served.run()
    assert slowest_tps(served, late) >= allowed_tps(250)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 1000), everybodys=st.sampled_from([0.0, 40.0, 90.0]), ahead=st.integers(1, 3))
def test_every_user_keeps_his_own(seed: int, everybodys: float, ahead: int) -> None:
    rng = random.Random(seed)
    served = Served(make_config(tps_floor=everybodys, steps_in_flight=ahead, prefill_share=0.0), DEVICE)
    served.arrive(0, prompt=100, output=30, tps_floor=50)
    served.run()
    for _ in range(40):
        floor = rng.choice((0, 20, 120, 200))
        at_us = served.now_us + rng.randrange(1_500_000)
        served.arrive(at_us, prompt=rng.randint(20, 1000), output=rng.randint(80, 150), tps_floor=floor)
    before = served.scheduler.counts().floor.tokens_late
    served.run()
    assert served.scheduler.counts().floor.tokens_late == before
    for sequence_id, user in served.users.items():
        floor = user.tps_floor or everybodys
        if floor and len(user.token_us) > 64:
            assert slowest_tps(served, sequence_id) >= allowed_tps(floor)


@pytest.mark.parametrize("everybodys", [0.0, 70.0])
def test_who_decodes_elsewhere_is_not_held_back_for_his_floor(everybodys: float) -> None:
    """A worker that computes prompts for others takes them all at once, before it has learned anything."""
    served = Served(make_config(tps_floor=everybodys), DEVICE)
    for number in range(10):
        tokens = np.full(30, number, np.uint32)
        asked: dict[str, Any] = {"tps_floor": 200, "expected_tokens": 5000, "handover": Handover.SOURCE}
        answer = served.scheduler.submit(number + 1, tokens, output_start=30, tokens_max=9000, now_us=0, **asked)
        assert answer is None
    plan = served.scheduler.plan(0)
    assert plan is not None and len(plan.sequence_ids) == 10
    told = served.scheduler.explanation(1)
    assert told is not None and (told["tps_floor"], told["blocks_reserved"]) == (0, 2)


# -- how long an answer will be --------------------------------------------------------------------------------------
def tight(**fields: float) -> Config:
    """Room for 64 blocks of 16 tokens."""
    values = {"blocks": 64, "block_tokens": 16, "slots": 16, "context_tokens": 1024, "tps_floor": 0.0, **fields}
    return Config(hash_key=KEY, model_identity=KEY, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize("off_by", [1.0, 0.8])
def test_room_is_kept_for_an_answer_of_known_length(off_by: float) -> None:
    """Eight prompts of 4 blocks fit beside each other, their answers of 16 blocks do not."""
    computed, preempted = [], []
    for expected in (0, int(256 * off_by)):
        served = Served(tight(), DEVICE)
        for _ in range(8):
            served.arrive(0, prompt=64, output=256, expected=expected)
        served.run()
        served.scheduler.check()
        counts = served.scheduler.counts()
        preempted.append(counts.preemptions)
        computed.append(served.steps)
    assert preempted[0] > 0 and preempted[1] <= (0 if off_by == 1.0 else 2)


def test_what_was_kept_is_for_others_once_the_answer_has_ended() -> None:
    served = Served(tight(), DEVICE)
    first = served.arrive(0, prompt=64, output=900, expected=900)
    second = served.arrive(0, prompt=200, output=8)
    served.run(until_us=20_000)
    assert served.users[second].admitted_us is None
    told = served.scheduler.explanation(second)
    assert told is not None and told["blocks_reserved"] > 50 and told["blocks_wanted"] == 13
    served.scheduler.abort(first, served.now_us)
    served.users[first].output = len(served.users[first].token_us)
    aborted_us = served.now_us
    served.run()
    admitted_us = served.users[second].admitted_us
    assert admitted_us is not None and aborted_us <= admitted_us < aborted_us + 10_000
    served.scheduler.check()


def test_a_single_request_may_expect_all_there_is() -> None:
    served = Served(tight(), DEVICE)
    only = served.arrive(0, prompt=64, output=900, expected=1 << 40)
    served.run(until_us=10_000)
    told = served.scheduler.explanation(only)
    assert told is not None and told["expected_tokens"] == 900 and "(900 expected)" in told["text"]
    served.run()


def test_a_known_length_counts_for_the_floor() -> None:
    """A context costs, and a second user whose answer will be long does not fit beside a first one."""
    device = Device(step=1000.0, decode_row=100.0, decode_context_token=2.0)
    admitted = []
    for expected in (0, 6000):
        served = Served(make_config(), device)
        for turn in range(4):  # what a row and a context cost is known
            served.arrive(turn * 2_000_000, prompt=100 + 1000 * (turn % 2), output=100)
            served.arrive(turn * 2_000_000, prompt=100, output=100)
        served.arrive(10_000_000, prompt=100, output=3000)
        second = served.arrive(10_100_000, prompt=100, output=6000, expected=expected)
        served.run(until_us=10_300_000)
        admitted.append(served.users[second].admitted_us is not None)
    assert admitted == [True, False]


@pytest.mark.parametrize(("field", "value"), [("expected_tokens", -5), ("tps_floor", -5), ("tps_floor", 10**12)])
def test_hints_out_of_bounds_are_cut(field: str, value: int) -> None:
    served = Served(make_config(), DEVICE)
    asked: dict[str, Any] = {field: value}
    tokens = np.arange(3, dtype=np.uint32)
    answer = served.scheduler.submit(1, tokens, output_start=3, tokens_max=4, now_us=0, **asked)
    told = served.scheduler.explanation(1)
    assert answer is None and told is not None
    assert told["expected_tokens"] == 0 and told["tps_floor"] == (1000 if value > 0 else 0)
