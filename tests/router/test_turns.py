"""Next turns are sent as (parent, appended tokens), and in full where a worker lost that; the text is the same."""

from __future__ import annotations

import random
import struct
from typing import Any, cast

import pytest
from mock_worker import Script
from router_stack import Stack, StartStack, until

from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.turns import PARENT_TOKENS_MIN, TURNS_MAX, Turn, TurnMemory

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "reads", "a", "file")


def words(count: int, seed: int = 0) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


@pytest.fixture
async def stack(start_stack: StartStack) -> Stack:
    """Its worker takes next turns."""
    stack = await start_stack(worker_runs=False)
    stack.worker.host.reply.next_turns = True
    await stack.worker.start()
    await until(lambda: bool(stack.service.pool.usable))
    return stack


def turns(stack: Stack) -> dict[str, int]:
    return dict(stack.service.state.metrics.turns)


class Conversation:
    """A client that sends everything again each time, as they do."""

    def __init__(self, stack: Stack, seed: int = 0) -> None:
        self.stack, self.seed = stack, seed
        self.messages: list[dict[str, str]] = []

    async def turn(self, count: int = 500, **body: Any) -> worker_pb2.Submit:
        """One turn; what the worker was asked."""
        self.messages.append({"role": "user", "content": words(count, self.seed + len(self.messages))})
        status, reply = await self.stack.post("/v1/chat/completions", {"messages": self.messages, **body})
        assert status == 200, reply
        self.messages.append({"role": "assistant", "content": reply["choices"][0]["message"]["content"]})
        return self.stack.worker.submits[-1]

    async def rendered(self) -> bytes:
        """The ids of the last turn's prompt, by the server itself."""
        body = {"messages": self.messages[:-1], "add_generation_prompt": True}
        _, reply = await self.stack.post("/tokenize", body)
        return struct.pack(f"<{len(reply['tokens'])}I", *reply["tokens"])


async def test_a_next_turn_sends_what_it_appends(stack: Stack) -> None:
    stack.worker.say(words(30, 99))
    conversation = Conversation(stack)
    first = await conversation.turn()
    assert not first.parent_tokens
    for _ in range(3):
        submit = await conversation.turn(40)
        assert submit.parent_tokens > 500 and len(submit.token_ids) < 4 * 300
        whole = stack.worker.host.whole(submit)
        assert whole == await conversation.rendered() and submit.output_start == len(whole) // 4
    assert turns(stack) == {"sent": 3}
    assert len(stack.service.pool.turns) == 1, "a turn replaces its parent"
    async with stack.http.get(stack.url + "/metrics") as response:
        assert 'tokenrelay_turns_total{parent="sent"} 3' in await response.text()


async def test_a_worker_that_lost_the_parent_gets_all_tokens(stack: Stack) -> None:
    conversation = Conversation(stack)
    await conversation.turn()
    stack.worker.host.texts.clear()
    submit = await conversation.turn(40, n=2)
    assert not submit.parent_tokens and stack.worker.host.whole(submit) == await conversation.rendered()
    assert turns(stack) == {"sent": 2, "unknown": 2} and stack.service.state.metrics.moves == {}
    assert (await conversation.turn(40)).parent_tokens  # the next one again


async def test_choices_of_a_turn_share_its_parent(stack: Stack) -> None:
    conversation = Conversation(stack)
    await conversation.turn(n=2)
    submit = await conversation.turn(40, n=3)
    assert submit.parent_tokens and turns(stack) == {"sent": 3}
    assert {one.parent for one in stack.worker.submits[-3:]} == {submit.parent}


async def test_another_life_of_the_worker_gets_all_tokens(stack: Stack) -> None:
    conversation = Conversation(stack)
    await conversation.turn()
    await stack.worker.stop()
    await until(lambda: not stack.service.pool.usable)
    await stack.worker.start()
    await until(lambda: bool(stack.service.pool.usable))
    assert not (await conversation.turn(40)).parent_tokens
    assert turns(stack) == {}
    assert (await conversation.turn(40)).parent_tokens


async def test_another_tenant_does_not_inherit(stack: Stack) -> None:
    conversation = Conversation(stack)
    await conversation.turn(cache_salt="one")
    assert not (await conversation.turn(40, cache_salt="two")).parent_tokens


async def test_a_changed_history_inherits_up_to_the_change(stack: Stack) -> None:
    stack.worker.say(words(30, 99))
    conversation = Conversation(stack)
    first = await conversation.turn()
    conversation.messages[1]["content"] = "something else was said"  # the client rewrote the answer
    submit = await conversation.turn(40)
    assert stack.worker.host.whole(submit) == await conversation.rendered()
    assert first.output_start <= submit.parent_tokens < first.output_start + 20
    conversation.messages[0]["content"] = "and even the question"
    assert not (await conversation.turn(40)).parent_tokens


async def test_a_stop_string_ends_a_turn_that_is_continued(stack: Stack) -> None:
    stack.worker.host.answer = lambda submit: Script([*stack.worker.ids("one two STOP three"), stack.worker.eos])
    conversation = Conversation(stack)
    await conversation.turn(stop="STOP")
    submit = await conversation.turn(40)
    assert submit.parent_tokens and stack.worker.host.whole(submit) == await conversation.rendered()


async def test_a_worker_that_takes_no_next_turns_gets_all_tokens(start_stack: StartStack) -> None:
    conversation = Conversation(await start_stack())
    await conversation.turn()
    submit = await conversation.turn(40)
    assert not submit.parent_tokens and len(conversation.stack.service.pool.turns) == 0


# -- the memory


def turn_of(ids: list[int], output: int = 0, salt: bytes = b"") -> Turn:
    text = struct.pack(f"<{len(ids)}I", *ids)
    return Turn(cast(WorkerClient, None), 1, ids[0], text, len(text) - 4 * output, salt)


def test_the_longest_prompt_is_found_among_those_of_one_length() -> None:
    memory, size = TurnMemory(1 << 22), PARENT_TOKENS_MIN + 100
    system = list(range(size))
    for session in range(5):  # the same end, and the same beginning
        memory.remember(turn_of([*system, 1_000 + session, *system[:70]], output=10))
    longer = [*system, 1_003, *system[:70], 7, 8, 9]
    memory.remember(turn_of(longer))
    packed = turn_of([*longer, 1, 2]).text
    found = memory.find(packed, b"")
    assert found is not None and found.tokens == len(longer) and found.turn.text == turn_of(longer).text
    found = memory.find(turn_of([*system, 1_002, *system[:65], 5]).text, b"")
    assert found is not None and found.turn.text[4 * size : 4 * size + 4] == struct.pack("<I", 1_002)
    assert found.tokens == size + 1 + 65  # into the output, as far as it is the same
    assert memory.find(packed, b"other") is None
    assert memory.find(turn_of(system[::-1]).text, b"") is None


def test_one_token_is_left_to_be_appended() -> None:
    memory, ids = TurnMemory(1 << 22), list(range(PARENT_TOKENS_MIN + 10))
    memory.remember(turn_of(ids, output=5))
    found = memory.find(turn_of(ids).text, b"")
    assert found is not None and found.tokens == len(ids) - 1


def test_the_memory_is_bounded() -> None:
    memory = TurnMemory(40 * 4 * (PARENT_TOKENS_MIN + 110))
    for n in range(100):
        memory.remember(turn_of([n, *range(PARENT_TOKENS_MIN)]))
        assert memory.bytes <= 40 * 4 * (PARENT_TOKENS_MIN + 110)
    assert 30 < len(memory) < 50
    assert memory.find(turn_of([0, *range(PARENT_TOKENS_MIN + 1)]).text, b"") is None
    assert memory.find(turn_of([99, *range(PARENT_TOKENS_MIN + 1)]).text, b"") is not None
    memory.remember(turn_of(list(range(100))))  # too short to be worth it
    many = TurnMemory(1 << 30)
    for n in range(TURNS_MAX + 20):
        many.remember(turn_of([n, *range(PARENT_TOKENS_MIN)]))
    assert len(many) == TURNS_MAX
    off = TurnMemory(0)
    off.remember(turn_of(list(range(PARENT_TOKENS_MIN + 1))))
    assert len(off) == 0 and off.bytes == 0
