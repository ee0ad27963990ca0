"""The stack does what deploy/README.md says, on a real engine. Tests run in this order and share one stack."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import openai
import pytest
from compose_stack import MODEL, ROLES, Stack, until

pytestmark = pytest.mark.timeout(1800, func_only=True)

TOKENS = 3000  # seconds of one stream, so that a worker can be killed in the midst of it
STREAMS = 8
CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluate an arithmetic expression.",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]},
    },
}
QUESTION = [{"role": "user", "content": "What is 123 * 45?"}]


# -- confinement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
def test_a_service_is_ready_and_confined(stack: Stack, role: str) -> None:
    (container,) = stack.containers(role)
    found = stack.inspect(container)
    assert found["State"]["Health"]["Status"] == "healthy"
    assert found["Config"]["User"] == "10001:10001"
    host = found["HostConfig"]
    assert host["ReadonlyRootfs"] is True and host["CapDrop"] == ["ALL"] and not host["Privileged"]
    assert host["Memory"] > 0 and host["NanoCpus"] > 0 and host["PidsLimit"] > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    titles, *rows = [line.split() for line in stack.docker("top", container, "-eo", "pid,uid").splitlines()]
    assert titles == ["PID", "UID"] and rows
    assert {uid for _, uid in rows} == {"10001"}, "no process of it runs as root"


@pytest.mark.parametrize("role", ["router", "prefill", "decode", "kvstore"])
def test_what_a_service_can_do_from_inside(stack: Stack, role: str) -> None:
    (container,) = stack.containers(role)
    found = json.loads(stack.python(container, "who_am_i"))
    assert set(found["uids"]) == set(found["gids"]) == {"10001"}
    assert found["capabilities"] == 0 and found["no_new_privileges"] == "1"
    assert found["writes"] == [], "the root file system is read-only"
    assert found["tmp"] is True and found["token_mode"] == "0o600"
    assert found["reaches_kvstore"] is True
    assert found["reaches_etcd"] is (role == "kvstore"), "etcd is the kvstore's alone"


def test_only_the_router_is_published_and_only_on_this_machine(stack: Stack) -> None:
    published = {role: stack.inspect(stack.containers(role)[0])["NetworkSettings"]["Ports"] or {} for role in ROLES}
    bound = {role: [b for one in ports.values() for b in one or []] for role, ports in published.items()}
    assert bound.pop("router") == [{"HostIp": "127.0.0.1", "HostPort": str(stack.port)}]
    assert not any(bound.values())


# -- requests ---------------------------------------------------------------------------------------------------------
def test_chat_whole_and_streamed(stack: Stack) -> None:
    client = stack.client()
    assert [model.id for model in client.models.list().data] == [MODEL]
    ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], "temperature": 0}
    whole = client.chat.completions.create(**ask).choices[0]
    assert whole.message.content and whole.finish_reason == "stop"
    chunks = list(client.chat.completions.create(**ask, stream=True))
    assert len(chunks) > 2
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.message.content


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_tool_is_called_and_its_result_used(stack: Stack, stream: bool) -> None:
    client = stack.client()
    ask: dict[str, Any] = {"model": MODEL, "tools": [CALCULATOR], "temperature": 0}
    if stream:
        name, arguments, call_id = "", "", ""
        for chunk in client.chat.completions.create(**ask, messages=QUESTION, stream=True):
            for part in chunk.choices[0].delta.tool_calls or []:
                call_id = part.id or call_id
                name += part.function.name or ""
                arguments += part.function.arguments or ""
    else:
        choice = client.chat.completions.create(**ask, messages=QUESTION).choices[0]
        assert choice.finish_reason == "tool_calls"
        (call,) = choice.message.tool_calls
        name, arguments, call_id = call.function.name, call.function.arguments, call.id
    assert (name, json.loads(arguments)) == ("calculator", {"expression": "123 * 45"})
    asked = {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
    dialogue = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": call_id, "content": "5535"},
    ]
    assert "5535" in client.chat.completions.create(**ask, messages=dialogue).choices[0].message.content


# -- the token --------------------------------------------------------------------------------------------------------


def test_a_wrong_token_is_refused(stack: Stack) -> None:
    (router,) = stack.containers("router")
    target = next(worker["target"] for worker in stack.workers() if worker["role"] == "decode")
    assert stack.python(router, "shake_hands", target).split() == ["decode", "UNAUTHENTICATED", "UNAUTHENTICATED"]


def test_a_worker_with_a_wrong_token_does_not_get_in(stack: Stack) -> None:
    before = stack.usable()
    (kvstore,) = stack.containers("kvstore")
    refused = stack.metrics(kvstore, 7001)["kvstore_unauthenticated_total"]
    settings = {
        "TOKENRELAY_SECURITY_TOKEN_FILE": "",
        "TOKENRELAY_SECURITY_TOKEN": "not-the-token-of-this-fleet",
        "TOKENRELAY_FLEET_JOIN_S": "3",
    }
    flags = [part for name, value in settings.items() for part in ("--env", f"{name}={value}")]
    said = stack.compose("run", "--rm", "--no-deps", "--no-TTY", *flags, "decode", check=False)
    assert "the fleet's token is missing or wrong" in said
    assert stack.usable() == before
    assert stack.metrics(kvstore, 7001)["kvstore_unauthenticated_total"] > refused, "counted"


def test_the_token_is_nobodys_elses_and_in_no_log(stack: Stack) -> None:
    (router,) = stack.containers("router")
    token = stack.docker("exec", router, "cat", "/run/tokenrelay/token").strip()
    assert len(token) == 64 and int(token, 16)
    assert token not in stack.compose("logs", "--no-color")
    assert token not in json.dumps(stack.inspect(router))


# -- KV from container to container -----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["stream", "nixl", ""], ids=["stream", "nixl", "default"])
def test_kv_passes_between_containers(stack: Stack, kind: str) -> None:
    stack.environment["TOKENRELAY_TRANSPORTS"] = kind  # that one and no other; the default comes last, and stays
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "300", timeout_s=400)
    until(lambda: stack.usable() == {"prefill": 1, "decode": 1})
    (decode,) = stack.containers("decode")
    assert stack.docker("exec", decode, "printenv", "TOKENRELAY_FLEET_TRANSPORTS").strip() == kind
    check_hand_over(stack)
    counts = stack.metrics(decode, 9100)
    assert counts['imports_total{end="imported"}'] == 1 and counts['imports_total{end="failed"}'] == 0
    assert counts["imported_bytes_total"] > 1 << 20


def test_a_long_prompt_of_a_client_takes_two_legs(stack: Stack) -> None:
    ended = 'tokenrelay_handovers_total{end="done"}'

    def handovers() -> float:
        return sum(float(line.split()[-1]) for line in stack.get("/metrics").splitlines() if line.startswith(ended))

    before = handovers()
    words = " ".join(f"word{number}" for number in range(400))
    reply = stack.client().chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": words}], max_tokens=40, temperature=0
    )
    assert reply.usage is not None and reply.usage.prompt_tokens > 400
    assert handovers() == before + 1, stack.get("/metrics")


def check_hand_over(stack: Stack) -> None:
    """A request passes from a prefill container to a decode container, with the same tokens as on one of them."""
    found = stack.hand_over()
    assert found["ends"] == ["FINISH_HANDOVER", "FINISH_LENGTH"]
    assert found["both"] == found["alone"] and len(found["both"]) == 24


# -- deaths and scaling -----------------------------------------------------------------------------------------------
async def stream(
    client: openai.AsyncOpenAI, number: int, tokens: int, on_token: Any = lambda number: None
) -> tuple[int, str]:
    """Request `number`: greedy where it is even, sampled with a seed where it is odd; every third has a long prompt,
    which a prefill worker computes. It has to end well.
    """
    sampling: dict[str, Any] = {"temperature": 0} if number % 2 == 0 else {"temperature": 1.0, "seed": number}
    text, finish, usage = "", None, None
    reply = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": f"number {number} " * (150 if number % 3 == 0 else 1 + number % 5)}],
        max_tokens=tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
        **sampling,
    )
    async for chunk in reply:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            assert finish is None, "something comes after the end"
            finish = choice.finish_reason
            on_token(number)
    assert finish == "length" and usage is not None and usage.completion_tokens == tokens
    return number, text


async def run(stack: Stack, tokens: int, begun: asyncio.Event | None = None) -> dict[int, str]:
    """All streams at once, their texts. `begun` is set when each has a token."""
    waiting = set(range(STREAMS))

    def note(number: int) -> None:
        waiting.discard(number)
        if begun is not None and not waiting:
            begun.set()

    async with stack.async_client() as client:
        return dict(await asyncio.gather(*(stream(client, number, tokens, note) for number in range(STREAMS))))


async def test_streams_go_on_when_a_decode_process_is_killed(stack: Stack) -> None:
    await asyncio.to_thread(stack.scale, decode=2)
    await asyncio.to_thread(until, lambda: stack.usable().get("decode") == 2)
    began_s = time.monotonic()
    wanted = await run(stack, TOKENS)
    print(f"{STREAMS} streams of {TOKENS} tokens undisturbed: {time.monotonic() - began_s:.1f} s")
    assert len(set(wanted.values())) == STREAMS

    begun, began_s = asyncio.Event(), time.monotonic()
    running = asyncio.ensure_future(run(stack, TOKENS, begun))
    await asyncio.wait_for(begun.wait(), 120)
    workers = await asyncio.to_thread(stack.workers)
    open_at = {worker["target"]: worker["open"] for worker in workers if worker["role"] == "decode"}
    victim = max(open_at, key=lambda target: open_at[target])
    assert open_at[victim] > 0, "it has streams to lose"
    container = victim.partition(":")[0]
    await asyncio.to_thread(stack.kill, container)
    assert not running.done(), "killed after the streams: make TOKENS larger"
    assert await asyncio.wait_for(running, 240) == wanted
    print(f"the same with {open_at[victim]} of them killed: {time.monotonic() - began_s:.1f} s")
    page = await asyncio.to_thread(stack.get, "/metrics")
    moves = [line for line in page.splitlines() if line.startswith("tokenrelay_moves_total")]
    assert any('cause="lost"' in line for line in moves), (moves, stack.inspect(container)["RestartCount"])

    def back() -> bool:
        found = stack.inspect(container)
        return found["RestartCount"] >= 1 and found["State"]["Health"]["Status"] == "healthy"

    await asyncio.to_thread(until, back, 120)
    await asyncio.to_thread(until, lambda: stack.usable().get("decode") == 2)


async def test_scaling_under_load_loses_no_request(stack: Stack) -> None:
    wanted = await run(stack, 60)
    over, outcomes = asyncio.Event(), []

    async def work(first: int) -> None:
        async with stack.async_client() as client:
            number = first
            while not over.is_set():
                outcomes.append(await stream(client, number % STREAMS, 60))
                number += 1

    clients = [asyncio.ensure_future(work(number)) for number in range(4)]
    try:
        for counts in ({"prefill": 2, "decode": 3}, {"prefill": 1, "decode": 1}, {"prefill": 1, "decode": 2}):
            began_s = time.monotonic()
            await asyncio.to_thread(stack.scale, **counts)
            await asyncio.to_thread(until, lambda: stack.usable() == counts, 60)  # noqa: B023 - waited for here
            print(f"{counts}: {time.monotonic() - began_s:.1f} s, {len(outcomes)} answers so far")
            before = len(outcomes)
            await asyncio.to_thread(until, lambda: len(outcomes) >= before + 8, 60)  # noqa: B023
    finally:
        over.set()
        await asyncio.wait_for(asyncio.gather(*clients), 240)
    wrong = [number for number, text in outcomes if text != wanted[number]]
    assert not wrong, f"{len(wrong)} of {len(outcomes)} have another text"


async def test_a_standby_takes_over_from_a_killed_kvstore(stack: Stack) -> None:
    await asyncio.to_thread(stack.scale, prefill=1, decode=2, kvstore=2)
    (active,), (standby,) = stack.kvstore("active"), stack.kvstore("standby")
    wanted = await run(stack, TOKENS)
    begun = asyncio.Event()
    running = asyncio.ensure_future(run(stack, TOKENS, begun))
    await asyncio.wait_for(begun.wait(), 120)
    await asyncio.to_thread(stack.kill, active)
    assert await asyncio.wait_for(running, 240) == wanted
    await asyncio.to_thread(until, lambda: len(stack.kvstore("active")) == 1, 60)
    # Docker starts the killed one again. It may be there before its lease at etcd is over, and be the one that rules.
    both = sorted([active, standby])
    await asyncio.to_thread(until, lambda: sorted(stack.kvstore("active") + stack.kvstore("standby")) == both, 120)
    await asyncio.to_thread(until, lambda: stack.usable() == {"prefill": 1, "decode": 2}, 60)
    await asyncio.to_thread(check_hand_over, stack)


async def test_requests_go_on_while_etcd_is_away(stack: Stack) -> None:
    await asyncio.to_thread(stack.scale, prefill=1, decode=2, kvstore=1)
    wanted = await run(stack, TOKENS)
    await asyncio.to_thread(stack.compose, "stop", "etcd")
    assert await run(stack, TOKENS) == wanted
    await asyncio.to_thread(until, lambda: stack.kvstore("suspended"), 60)  # its lease at etcd is over
    assert await run(stack, TOKENS) == wanted
    await asyncio.to_thread(stack.compose, "start", "etcd")
    await asyncio.to_thread(until, lambda: stack.kvstore("active"), 60)
    await asyncio.to_thread(until, lambda: stack.usable() == {"prefill": 1, "decode": 2}, 60)
    await asyncio.to_thread(check_hand_over, stack)


async def test_blocks_outlive_every_process_on_the_kvstores_disk(stack: Stack) -> None:
    stack.environment["TOKENRELAY_BLOCK_TIER"] = "true"  # the workers are made anew for it
    await asyncio.to_thread(stack.compose, "up", "--detach", "--wait", "--wait-timeout", "300", timeout_s=400)
    await asyncio.to_thread(until, lambda: stack.usable() == {"prefill": 1, "decode": 1})
    text = " ".join(f"line {number}: nothing is written here" for number in range(200))
    ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0}
    wanted = stack.client().chat.completions.create(**ask, max_tokens=40).choices[0].message.content

    def on_disk() -> float:
        return stack.metrics(stack.containers("kvstore")[0], 7001).get('kvstore_tier_blocks{where="disk"}', 0)

    def loaded() -> float:
        pages = [stack.metrics(stack.containers(role)[0], 9100) for role in ("prefill", "decode")]
        return sum(page.get("tier_tokens_loaded_total", 0) for page in pages)

    await asyncio.to_thread(until, lambda: on_disk() > 10)
    before = on_disk()
    await asyncio.to_thread(stack.compose, "restart", "kvstore", "prefill", "decode", timeout_s=300)
    await asyncio.to_thread(until, lambda: stack.usable() == {"prefill": 1, "decode": 1}, 120)
    assert on_disk() >= before and loaded() == 0
    assert stack.client().chat.completions.create(**ask, max_tokens=40).choices[0].message.content == wanted
    await asyncio.to_thread(until, lambda: loaded() > 256)


def test_down_keeps_the_volumes_and_up_goes_on_with_them(stack: Stack) -> None:
    token = stack.docker("exec", stack.containers("router")[0], "cat", "/run/tokenrelay/token")
    stack.compose("down", timeout_s=200)
    left = stack.left()
    assert not left["containers"] and not left["networks"]
    assert len(left["volumes"]) == 4, "token, etcd, models, tier: kept until asked"
    stack.compose("up", "--detach", "--wait", "--wait-timeout", "300", timeout_s=400)
    assert stack.docker("exec", stack.containers("router")[0], "cat", "/run/tokenrelay/token") == token
    until(lambda: stack.usable() == {"prefill": 1, "decode": 1})
    check_hand_over(stack)


def test_down_with_volumes_leaves_nothing(stack: Stack) -> None:
    assert all(stack.left().values())
    stack.compose("down", "--volumes", timeout_s=200)
    assert not any(stack.left().values())
