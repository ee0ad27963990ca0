"""Which worker a sequence goes to, and why; sessions, breakers, the budget of retries."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any, get_args

import pytest
from mock_worker import Script
from router_stack import Stack, StartStack, until

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.breakers import PAUSE_MAX_S, Breakers, RetryBudget
from tokenrelay.services.router.policies import Chooser, Policy, Wish
from tokenrelay.services.router.sessions import Sessions, session_key

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "Hi"}]}


@dataclass(eq=False)
class Worker:
    target: str
    open_count: int = 0


def workers(*loads: int) -> list[Worker]:
    return [Worker(f"w{number}", load) for number, load in enumerate(loads)]


# -- policies --------------------------------------------------------------------------------------------------------
def test_round_robin_takes_turns_whatever_the_load() -> None:
    fleet, chooser = workers(9, 0, 5), Chooser[Worker]("round-robin")
    assert [chooser.choose(fleet, Wish()).worker.target for _ in range(6)] == ["w0", "w1", "w2"] * 2
    left = fleet[1:]
    assert [chooser.choose(left, Wish()).worker.target for _ in range(4)] == ["w1", "w2"] * 2


def test_least_load() -> None:
    fleet, chooser = workers(3, 1, 1), Chooser[Worker]("least-load")
    assert [chooser.choose(fleet, Wish(fleet[0], "has it")).worker.target for _ in range(4)] == ["w1", "w2", "w1", "w2"]


def test_power_of_two_avoids_the_busiest_and_spreads() -> None:
    fleet, chooser = workers(0, 0, 0, 100), Chooser[Worker]("power-of-two", seed=1)
    went = Counter(chooser.choose(fleet, Wish()).worker.target for _ in range(600))
    assert went["w3"] == 0
    assert all(150 < went[target] < 250 for target in ("w0", "w1", "w2"))


def test_consistent_hash_moves_a_share_and_no_more() -> None:
    fleet, chooser = workers(*[0] * 10), Chooser[Worker]("consistent-hash")
    keys = [number.to_bytes(4, "big") for number in range(2000)]
    before = {key: chooser.choose(fleet, Wish(key=key)).worker.target for key in keys}
    assert all(120 < count < 300 for count in Counter(before.values()).values())
    gone = [worker for worker in fleet if worker.target != "w4"]
    after = {key: chooser.choose(gone, Wish(key=key)).worker.target for key in keys}
    assert all(after[key] == before[key] for key in keys if before[key] != "w4")
    back = {key: chooser.choose(list(reversed(fleet)), Wish(key=key)).worker.target for key in keys}
    assert back == before, "whatever their order"


@pytest.mark.parametrize("policy", get_args(Policy))
def test_every_policy_says_why(policy: Policy) -> None:
    fleet = workers(2, 3)
    pick = Chooser[Worker](policy).choose(fleet, Wish(fleet[1], "has it", b"key"))
    assert pick.worker in fleet
    assert str(pick).startswith(f"{policy}: {pick.worker.target} of 2: ")
    assert str(pick).endswith(f"it had {pick.worker.open_count} open sequences, the least busy one 2")
    assert "the only one" in str(Chooser[Worker](policy).choose(fleet[:1], Wish()))


# -- through the router ----------------------------------------------------------------------------------------------
async def fleet_of(start_stack: StartStack, count: int, **settings: Any) -> tuple[Stack, list[Stack]]:
    """A router in front of several mock workers: those of `count` stacks."""
    others = [await start_stack() for _ in range(count)]
    addresses = tuple(one.worker.address for one in others)
    stack = await start_stack(worker_runs=False, worker=addresses, **settings)
    await until(lambda: len(stack.service.pool.usable) == count)
    return stack, others


async def ask(stack: Stack, text: str, **headers: str) -> tuple[Any, str]:
    """(status, X-Decision)"""
    body = {"messages": [{"role": "user", "content": text}], "stream": "stream" in text}
    async with stack.http.post(stack.url + CHAT, json=body, headers=headers) as response:
        await response.read()
        return response.status, response.headers.get("X-Decision", "")


def went(others: list[Stack]) -> list[int]:
    return [len(one.worker.submits) for one in others]


async def test_a_session_stays_where_it_was(start_stack: StartStack) -> None:
    """Though its prompts have nothing in common: its header names it, or `prompt_cache_key` does."""
    stack, others = await fleet_of(start_stack, 3)
    for number in range(6):
        assert (await ask(stack, f"{number} is new", **{"X-Session-Id": "s1"}))[0] == 200
    assert sorted(went(others)) == [0, 0, 6]
    for number in range(4):
        body = {"messages": [{"role": "user", "content": f"{number} again"}], "prompt_cache_key": "s2"}
        assert (await stack.post(CHAT, body))[0] == 200
        assert (await stack.post("/v1/responses", {"input": f"{number}", "prompt_cache_key": "s2"}))[0] == 200
    assert sorted(went(others)) == [0, 6, 8]
    status, decision = await ask(stack, "x", **{"X-Session-Id": "s1", "X-Explain": "1"})
    assert status == 200 and "had its session's last request" in decision


async def test_consistent_hash_by_session_and_by_beginning(start_stack: StartStack) -> None:
    stack, others = await fleet_of(start_stack, 3, policy="consistent-hash")
    for number in range(4):
        await ask(stack, f"{number}", **{"X-Session-Id": "s1"})
    assert sorted(went(others)) == [0, 0, 4]
    before = went(others)
    beginning = "the same system prompt " * 80
    for number in range(4):
        await ask(stack, f"{beginning}{number}")
    assert sorted(now - had for now, had in zip(went(others), before, strict=True)) == [0, 0, 4]


@pytest.mark.parametrize("policy", get_args(Policy))
async def test_the_decision_is_explained_to_who_asks(start_stack: StartStack, policy: Policy) -> None:
    stack, _ = await fleet_of(start_stack, 2, policy=policy)
    assert (await ask(stack, "Hi"))[1] == ""
    for text in ("Hi", "Hi, as a stream"):
        status, decision = await ask(stack, text, **{"X-Explain": "1"})
        assert status == 200
        assert decision.startswith(f"{policy}: unix:") and " of 2: " in decision


async def test_the_decision_shows_load_and_is_kept_from_the_network(start_stack: StartStack) -> None:
    stack = await start_stack(debug_endpoints="off")
    assert await ask(stack, "Hi", **{"X-Explain": "1"}) == (200, "")


async def test_priority_by_header(stack: Stack) -> None:
    assert (await ask(stack, "Hi", **{"X-Priority": "-3"}))[0] == 200
    assert stack.worker.submits[-1].priority == -3
    for wrong in ("high", "1e3", "9999"):
        assert (await ask(stack, "Hi", **{"X-Priority": wrong}))[0] == 400


HINTS = {"X-TPS-Floor": "120", "X-Expected-Output-Tokens": "700"}
OTHERS = [
    ("/v1/completions", {"prompt": "Hi"}),
    ("/v1/messages", {"model": "mock", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}),
    ("/v1/responses", {"input": "Hi"}),
]


async def test_hints_by_header(stack: Stack) -> None:
    assert (await ask(stack, "Hi", **HINTS))[0] == 200
    assert (stack.worker.submits[-1].tps_floor, stack.worker.submits[-1].expected_tokens) == (120, 700)
    assert (await ask(stack, "Hi"))[0] == 200
    assert (stack.worker.submits[-1].tps_floor, stack.worker.submits[-1].expected_tokens) == (0, 0)
    for name in HINTS:
        for wrong in ("high", "1e3", "0", "-1", "9999999", ""):
            async with stack.http.post(stack.url + CHAT, json=HI, headers={name: wrong}) as response:
                assert (response.status, (await response.json())["error"]["param"]) == (400, name)


@pytest.mark.parametrize(("path", "body"), OTHERS)
async def test_hints_in_every_api(stack: Stack, path: str, body: dict[str, Any]) -> None:
    for fields, headers in (({"tps_floor": 120, "expected_output_tokens": 700}, {}), ({}, HINTS)):
        async with stack.http.post(stack.url + path, json={**body, **fields}, headers=headers) as response:
            assert response.status == 200
        submit = stack.worker.submits[-1]
        assert (submit.tps_floor, submit.expected_tokens) == (120, 700)
    for wrong in ({"tps_floor": 0}, {"expected_output_tokens": "many"}):
        async with stack.http.post(stack.url + path, json={**body, **wrong}) as response:
            assert response.status == 400 and next(iter(wrong)) in await response.text()


async def test_a_floor_has_the_operators_bound(start_stack: StartStack) -> None:
    stack = await start_stack(tps_floor_max=90)
    for asked, given in (("500", 90), ("80", 80)):
        assert (await ask(stack, "Hi", **{"X-TPS-Floor": asked}))[0] == 200
        assert stack.worker.submits[-1].tps_floor == given


# -- breakers --------------------------------------------------------------------------------------------------------
def test_a_breaker_over_time() -> None:
    now = [100.0]
    breakers, fleet = Breakers(lambda: now[0]), workers(0, 0)

    def fail(times: int) -> None:
        for _ in range(times):
            now[0] += 0.2
            breakers.failed("w0")

    for _ in range(200):  # a worker dies with all it had: one failure
        breakers.failed("w0")
    assert breakers.allowed(fleet) == fleet
    fail(1)
    breakers.succeeded("w0")
    fail(2)
    assert breakers.allowed(fleet) == fleet, "three in a row, with no success between"
    fail(1)
    assert breakers.open("w0") and breakers.allowed(fleet) == fleet[1:]
    assert breakers.allowed(fleet[:1]) == fleet[:1], "where everybody pauses, nobody does"
    now[0] += 1.01
    assert breakers.allowed(fleet) == fleet
    breakers.sent("w0")  # the trial
    assert breakers.allowed(fleet) == fleet[1:], "alone"
    fail(1)
    now[0] += 1.5
    assert breakers.open("w0"), "twice as long"
    now[0] += 1.0
    breakers.sent("w0")
    breakers.succeeded("w0")
    assert breakers.allowed(fleet) == fleet and breakers.opened == 2
    for _ in range(20):
        fail(3)
        now[0] += 2 * PAUSE_MAX_S
    assert not breakers.open("w0"), "its pauses have a bound"


def test_a_budget_of_retries() -> None:
    budget = RetryBudget()
    assert sum(budget.spend() for _ in range(150)) == 100 and budget.refused == 50
    for _ in range(51):
        budget.earn()
    assert sum(budget.spend() for _ in range(20)) == 10


async def test_a_worker_that_fails_requests_gets_a_pause(start_stack: StartStack) -> None:
    """It takes them, and fails each: without a pause half of all requests would fail."""
    stack, others = await fleet_of(start_stack, 2, policy="round-robin")
    broken = others[0].worker.host
    broken.answer = lambda submit: Script((), finish=worker_pb2.FINISH_ERROR, error="internal_error: a kernel failed")
    statuses = []
    for number in range(20):
        statuses.append((await ask(stack, f"{number}"))[0])
        await asyncio.sleep(0.11 if statuses[-1] != 200 else 0)
    assert statuses.count(503) == 3 and statuses[-10:] == [200] * 10
    assert stack.service.pool.breakers.opened == 1
    broken.answer = lambda submit: Script(others[0].worker.ids("fine"))
    await asyncio.sleep(1.0)
    before = len(broken.submits)
    for number in range(6):
        assert (await ask(stack, f"{number} again"))[0] == 200
    assert len(broken.submits) > before, "its pause is over, and the trial went well"
    async with stack.http.get(stack.url + "/metrics") as response:
        assert "tokenrelay_breakers_opened_total 1" in await response.text()


# -- sessions --------------------------------------------------------------------------------------------------------
def test_sessions_are_bounded_and_each_tenants_own() -> None:
    sessions = Sessions(sessions_max=3)
    keys = [session_key(b"s", salt) for salt in (b"", b"a", b"b", b"c")]
    assert len(set(keys)) == 4 and all(len(key) == 16 for key in keys)
    for number, key in enumerate(keys[:3]):
        sessions.put(key, f"w{number}")
    sessions.put(keys[0], "w9")
    sessions.put(keys[3], "w3")
    assert len(sessions) == 3
    assert [sessions.get(key) for key in keys] == ["w9", None, "w2", "w3"]
