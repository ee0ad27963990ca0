"""Between tenants, between classes, and under pressure: equal shares, no starvation, the cheapest gives way."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modelled import Device, Served
from pretend import World
from transcripts import KEY

from tokenrelay.libscheduler import Config


def big_config(**fields: float) -> Config:
    """Few slots and many blocks: tenants compete for the slots."""
    values = {"blocks": 4096, "slots": 4, "context_tokens": 8192, "waiting_max": 1 << 14, **fields}
    return Config(hash_key=KEY, model_identity=KEY, **values)  # type: ignore[arg-type]


def tokens_by_tenant(served: Served) -> Counter[bytes]:
    """What each tenant was served, as the scheduler weighs it: a decoded token counts twice."""
    tokens: Counter[bytes] = Counter()
    for user in served.users.values():
        if user.admitted_us is not None:
            tokens[user.tenant] += user.prompt + 2 * len(user.token_us)
    return tokens


def test_a_tenant_with_a_hundred_requests_does_not_keep_another_waiting() -> None:
    served = Served(big_config(), Device())
    for _ in range(100):
        served.arrive(0, prompt=800, output=50, tenant=b"many")
    few = [served.arrive(100_000, prompt=800, output=50, tenant=b"few") for _ in range(3)]
    served.run()
    ends = sorted(user.token_us[-1] for user in served.users.values())
    assert max(served.users[i].token_us[-1] for i in few) < ends[25]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 100),
    sizes=st.lists(st.tuples(st.integers(20, 2000), st.integers(5, 100)), min_size=2, max_size=4),
    slots=st.integers(1, 6),
)
def test_shares_of_tenants_converge(seed: int, sizes: list[tuple[int, int]], slots: int) -> None:
    """Each tenant always has requests waiting, of sizes of its own: what they are served differs by a few requests."""
    rng = random.Random(seed)
    served = Served(big_config(slots=slots), Device())
    largest = max(prompt + 2 * output for prompt, output in sizes)
    for tenant, (prompt, output) in enumerate(sizes):
        for _ in range(40 * largest // (prompt + 2 * output) + 5):
            served.arrive(rng.randint(0, 1000), prompt=prompt, output=output, tenant=bytes([tenant]))
    while min(tokens_by_tenant(served)[bytes([tenant])] for tenant in range(len(sizes))) < 15 * largest:
        served.run(until_us=served.now_us + 200_000)
    tokens = tokens_by_tenant(served)
    assert len(tokens) == len(sizes)
    assert max(tokens.values()) - min(tokens.values()) < (slots + 2) * 2 * largest


def test_tenants_that_come_newly_all_the_time_starve_nobody() -> None:
    served = Served(big_config(slots=2, class_overtakes_max=100), Device())
    served.arrive(0, prompt=4000, output=200, tenant=b"old")
    waits = served.arrive(1_000, prompt=4000, output=20, tenant=b"old")
    for i in range(400):
        served.arrive(i * 25_000, prompt=200, output=20, tenant=b"new%d" % i)
    served.run()
    ends = [user.token_us[-1] for user in served.users.values()]
    assert served.users[waits].token_us[-1] < sorted(ends)[200]


def test_classes_are_not_mixed_by_fairness_and_none_starves() -> None:
    """The better class goes first whatever its tenants had; the lower one gets its turns."""
    served = Served(big_config(slots=1, class_overtakes_max=10), Device())
    low = [served.arrive(0, prompt=50, output=5, priority=5, tenant=b"quiet") for _ in range(3)]
    for _ in range(60):
        served.arrive(0, prompt=50, output=5, priority=0, tenant=b"loud")
    served.run()
    order = sorted(served.users, key=lambda i: served.users[i].token_us[-1])
    places = [order.index(i) for i in low]
    assert places[0] >= 1 and places[-1] <= 35


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10_000), preemptions_max=st.integers(1, 3), ahead=st.integers(1, 2))
def test_pressure_of_a_better_class_has_an_end(seed: int, preemptions_max: int, ahead: int) -> None:
    """Requests of a better class come without end into a pool that is too small; the lower one still gets through."""
    rng = random.Random(seed)
    world = World(
        Config(
            block_tokens=16,
            blocks=12,
            slots=4,
            context_tokens=128,
            waiting_max=8,
            steps_in_flight=ahead,
            class_overtakes_max=4,
            preemptions_max=preemptions_max,
            hash_key=KEY,
            model_identity=KEY,
        )
    )
    assert world.submit(1, [rng.randrange(64) for _ in range(40)], tokens_max=60, priority=3) is None
    next_id = 2
    while 1 in world.live:
        assert world.steps < 3000, world.scheduler.explain(1)
        while world.scheduler.counts().sequences_waiting < 4:
            tokens = [rng.randrange(64) for _ in range(rng.randint(10, 60))]
            assert world.submit(next_id, tokens, tokens_max=rng.randint(10, 60), priority=0) is None
            next_id += 1
        assert world.step()
    world.drain()
