"""The hit rate that an infinite cache would have."""

from __future__ import annotations

import random
import struct

from mock_worker import Script
from router_stack import StartStack

from tokenrelay.services.router.ceiling import Ceiling


def pack(token_ids: list[int]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def test_it_is_what_a_set_of_all_prefixes_says() -> None:
    random.seed(7)
    ceiling, seen = Ceiling(), set[tuple[bytes, tuple[int, ...]]]()
    for _ in range(300):
        salt = random.choice([b"", b"a"])
        text = [0] * random.choice([0, 16, 40]) + [random.randrange(3)] * random.randrange(1, 90)
        output = [random.randrange(2)] * random.randrange(20)
        blocks = 0
        while (blocks + 1) * 16 < len(text) and (salt, tuple(text[: (blocks + 1) * 16])) in seen:
            blocks += 1
        assert ceiling.ended(len(text), pack(text + output), salt, 16) == 16 * blocks
        whole = text + output
        seen |= {(salt, tuple(whole[: 16 * end])) for end in range(1, len(whole) // 16 + 1)}
    assert ceiling.tokens > 1000


def test_a_full_table_forgets_and_goes_on() -> None:
    ceiling = Ceiling(blocks_seen=64)
    for start in range(0, 40_000, 100):
        ceiling.ended(100, pack(list(range(start, start + 100))), b"", 16)
    assert ceiling.ended(100, pack(list(range(39_900, 40_000))), b"", 16) >= 80


async def test_metrics_have_it_beside_the_measured_rate(start_stack: StartStack) -> None:
    stack = await start_stack(prefix_ceiling=True)
    stack.worker.host.answer = lambda submit: Script(stack.worker.ids("Hello world!"))
    text = "a b c d e f g h " * 60
    for _ in range(2):
        await stack.chat(text)
    await stack.chat(text, cache_salt="other")
    async with stack.http.get(stack.url + "/metrics") as response:
        page = dict(line.split() for line in (await response.text()).splitlines() if line[0] != "#" and "{" not in line)
    prompt = int(page["tokenrelay_prompt_tokens_total"]) // 3
    assert int(page["tokenrelay_prefix_ceiling_tokens_total"]) == (prompt - 1) // 64 * 64 > 0
    assert int(page["tokenrelay_cached_tokens_total"]) == 0
