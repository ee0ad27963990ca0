"""The TPS floor on a device whose times are known: it holds, prompts get what is left, and nobody waits for ever."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelled import Device, Served
from transcripts import KEY

from tokenrelay.libscheduler import Config, Plan, Why, words_of

SLACK_TOKENS = 16  # as in floor.hpp: how far a user may run ahead, and what a prompt may then take at once


def make_config(**fields: float) -> Config:
    """Room for everybody, so that only the floor holds anyone back."""
    values = {"blocks": 8192, "slots": 64, "context_tokens": 16384, "tps_floor": 70.0, **fields}
    return Config(hash_key=KEY, model_identity=KEY, **values)  # type: ignore[arg-type]


def crowd(served: Served, users: int, every_us: int, seed: int = 1) -> None:
    """Users that come at random, with prompts and answers of all lengths; the first one comes alone."""
    rng = random.Random(seed)
    served.arrive(0, prompt=100, output=30)
    at_us = 1_000_000.0
    for _ in range(users):
        at_us += rng.expovariate(1 / every_us)
        served.arrive(int(at_us), prompt=rng.randint(20, 2000), output=rng.randint(20, 150))


def late_users(served: Served, floor: float, tokens: int = 32) -> list[int]:
    """Users who got some `tokens` tokens in a row slower than the floor and what they may be behind allow.

    Beyond that a step as long as the floor allows. What a prompt takes at once is predicted, by a model that is still
    learning: an eighth is for that (three of 850 random devices: up to 1.011 times the bound).
    """
    allowed_us = (tokens + 9 / 8 * SLACK_TOKENS + 1) * 1e6 / floor / tokens
    return [i for i, user in served.users.items() if user.slowest_period_us(tokens) > allowed_us]


@pytest.mark.parametrize("floor", [70.0, 150.0])
@pytest.mark.parametrize("ahead", [1, 2])
def test_the_floor_holds_where_it_would_not_hold_by_itself(floor: float, ahead: int) -> None:
    without = Served(make_config(tps_floor=0.0, steps_in_flight=ahead), Device())
    crowd(without, 120, 60_000)
    without.run()
    assert late_users(without, floor)

    served = Served(make_config(tps_floor=floor, steps_in_flight=ahead), Device())
    crowd(served, 120, 60_000)
    served.run()
    assert late_users(served, floor) == []
    counts = served.scheduler.counts().floor
    assert counts.tps_in_force == floor
    assert counts.tokens > 5000 and counts.tokens_late == 0 and counts.overrides == 0


def test_prompts_that_end_with_one_step_count_for_each_other() -> None:
    """Nobody decodes, so one step takes them all; what they will read together must still fit the floor."""
    device = Device(step=2000.0, prefill_row=0.0, prefill_token=1.0, decode_row=0.0, decode_context_token=2.0)
    served = Served(make_config(step_tokens=16384, chunk_tokens=16384, floor_wait_us=60_000_000), device)
    for turn, users in enumerate((1, 2, 4, 8, 10)):  # short ones: a row by itself costs nothing, many have been seen
        for _ in range(users):
            served.arrive(1_500_000 * (turn + 1), prompt=20 + 20 * turn, output=40)
    served.arrive(9_000_000, prompt=1500, output=40)  # and what a context costs
    for _ in range(12):
        served.arrive(12_000_000, prompt=1000, output=40)
    served.run()
    assert late_users(served, 70.0, 16) == []
    assert served.scheduler.counts().floor.tokens_late == 0


def test_a_cold_first_prompt_keeps_nobody_out() -> None:
    """It takes 16 times what the next ones will; nobody else would fit beside 14 ms a token if that were believed."""

    class Cold(Device):
        def run_us(self, plan: Plan) -> int:
            return super().run_us(plan) * (16 if plan.step == 1 else 1)

    served = Served(make_config(), Cold(step=700.0, prefill_row=50.0, prefill_token=1.0, decode_row=50.0))
    served.arrive(0, prompt=11, output=2000)
    others = [served.arrive(50_000, prompt=11, output=200) for _ in range(6)]
    served.run(until_us=500_000)
    assert all(served.users[other].token_us[0] < 80_000 for other in others)


def test_a_moderate_floor_costs_little_throughput() -> None:
    ends = []
    for floor in (0.0, 70.0):
        served = Served(make_config(tps_floor=floor), Device())
        crowd(served, 120, 60_000)
        served.run()
        ends.append(served.now_us)
    assert ends[1] < 1.05 * ends[0]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 1000),
    floor=st.sampled_from([40.0, 70.0, 120.0]),
    ahead=st.integers(1, 3),
    every_us=st.sampled_from([10_000, 50_000, 200_000]),
    device=st.builds(
        Device,
        step=st.floats(200, 4000),
        prefill_row=st.floats(0, 400),
        prefill_token=st.floats(5, 200),
        prefill_pair=st.floats(0, 0.02),
        decode_row=st.floats(10, 800),
        decode_context_token=st.floats(0, 0.2),
    ),
)
def test_no_user_falls_below_the_floor_in_force(
    seed: int, floor: float, ahead: int, every_us: int, device: Device
) -> None:
    """On a device that obeys the model, with ageing off, once both phases were measured."""
    served = Served(make_config(tps_floor=floor, steps_in_flight=ahead, floor_wait_us=0, prefill_share=0.0), device)
    served.arrive(0, prompt=100, output=30)
    served.run()
    crowd(served, 40, every_us, seed)
    before = served.scheduler.counts().floor.tokens_late
    served.run()
    counts = served.scheduler.counts().floor
    assert 0 < counts.tps_in_force <= floor
    assert counts.tokens_late == before
    assert late_users(served, min(floor, 0.5 * counts.tps_batch_1)) == []


def test_a_slow_device_has_a_lower_floor() -> None:
    """Batch 1 runs at 25 tokens a second: half of it is in force, and is held."""
    served = Served(make_config(), Device(step=35_000, decode_row=5_000, prefill_token=300))
    crowd(served, 30, 1_000_000)
    served.run()
    counts = served.scheduler.counts().floor
    assert counts.tps_batch_1 == pytest.approx(25, rel=0.05)
    assert counts.tps_in_force == pytest.approx(12.5, rel=0.05)
    assert counts.tokens_late == 0


def test_a_floor_that_is_broken_is_counted() -> None:
    """The device gets five times slower per user than what was known when they were admitted."""
    served = Served(make_config(floor_wait_us=0), Device())
    for _ in range(40):
        served.arrive(0, prompt=50, output=400)
    served.run(until_us=1_500_000)
    assert served.scheduler.counts().floor.tokens_late == 0
    served.device = Device(decode_row=750.0)
    served.run(until_us=3_000_000)
    counts = served.scheduler.counts().floor
    assert counts.tokens_late > 100 and counts.users_below > 0


def test_ageing_goes_before_the_floor() -> None:
    """More users than the floor allows: those beyond it are admitted after their wait, one by one."""
    served = Served(make_config(floor_wait_us=500_000), Device(decode_row=2_000))
    for _ in range(12):
        served.arrive(0, prompt=50, output=2000)
    served.run(until_us=300_000)
    waiting = [i for i, user in served.users.items() if user.admitted_us is None]
    assert len(waiting) >= 6
    assert served.scheduler.why(waiting[0]) == Why.WAITS_FLOOR
    assert "TPS floor" in words_of(Why.WAITS_FLOOR)
    served.run(until_us=3_000_000)
    assert all(user.admitted_us is not None for user in served.users.values())
    assert served.scheduler.counts().floor.overrides >= len(waiting) - 1
    assert served.scheduler.counts().floor.tokens_late > 0


def test_without_ageing_they_wait_until_somebody_is_through() -> None:
    served = Served(make_config(floor_wait_us=0), Device(decode_row=2_000))
    for _ in range(12):
        served.arrive(0, prompt=50, output=200)
    served.run()
    counts = served.scheduler.counts().floor
    assert counts.overrides == 0 and counts.tokens_late == 0


def test_prompts_get_their_share_of_a_device_that_cannot_hold_the_floor() -> None:
    """Thirty users are admitted, then each of their steps takes longer than the floor allows: prompts still go on."""
    served = Served(make_config(), Device())
    for _ in range(30):
        served.arrive(0, prompt=50, output=3000)
    served.run(until_us=1_000_000)
    served.device = Device(decode_row=1_500.0)
    served.run(until_us=3_000_000)
    late = served.arrive(served.now_us, prompt=1500, output=5)
    served.run(until_us=served.now_us + 20_000_000)
    user = served.users[late]
    assert user.admitted_us is not None and user.token_us
    begun = [u for u in list(served.users.values())[:30] if u.token_us]
    assert len(begun) == 30


def test_who_never_decodes_is_not_held_back_for_the_floor() -> None:
    """Requests for one token (classification, a prefill role) share steps at once, before anything was learned."""
    served = Served(make_config(), Device())
    for _ in range(60):
        served.arrive(0, prompt=30, output=1)
    served.run()
    assert served.steps <= 2


def test_a_prompt_beside_a_running_user_says_what_its_chunks_are() -> None:
    """They are what the user leaves, and none while he has not run ahead far enough."""
    served = Served(make_config(tps_floor=150.0, floor_wait_us=0), Device(prefill_token=200.0))
    served.arrive(0, prompt=1000, output=400)
    served.run(until_us=600_000)
    second = served.arrive(served.now_us, prompt=1000, output=5)
    served.run(until_us=served.now_us + 120_000)
    assert served.scheduler.why(second) in (Why.CHUNK_FLOOR, Why.STAYS_FLOOR, Why.WAITS_TIME)
    served.run()
    assert served.scheduler.counts().floor.tokens_late == 0


def test_the_same_inputs_give_the_same_plans() -> None:
    runs = []
    for _ in range(2):
        served = Served(make_config(), Device())
        crowd(served, 60, 50_000)
        served.run()
        runs.append([user.token_us for user in served.users.values()])
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tps_floor", -1.0),
        ("tps_floor", float("nan")),
        ("tps_fraction", 0.0),
        ("prefill_share", 1.0),
        ("floor_wait_us", -1),
    ],
)
def test_a_setting_out_of_bounds_is_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        make_config(**{field: value})
