"""What every transport promises, between two processes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest
from pools import Pool, layout
from processes import PeerError
from transfer_stage import Stage

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, HandshakeRefused, StaleGeneration, TransferFailed
from tokenrelay.transfer.runs import Span

SOON = 10.0


def soon() -> Deadline:
    """Long enough for a loaded machine."""
    return Deadline.after(SOON)


async def until(happened: Callable[[], object]) -> None:
    """Poll what has no event of its own."""
    deadline = soon()
    while not happened():
        assert not deadline.passed
        await asyncio.sleep(0.01)


async def test_pulls_exactly_what_was_asked(stage: Stage, pool: Pool) -> None:
    peer, transport = await stage.peer(), await stage.transport(pool)
    await peer.ask("fill", blocks=list(range(64)))
    connection = await transport.connect(await peer.endpoint(), soon())
    await connection.pull([Span(0, 3, [5, 6, 7, 40], [1, 2, 3, 30])], soon())
    await connection.validate([5, 6, 7, 40], [0, 0, 0, 0], soon())
    for layer in range(3):
        for remote, local in ((5, 1), (6, 2), (7, 3), (40, 30)):
            assert pool.holds(layer, local, remote, 0)
        assert all(pool.untouched(layer, block) for block in range(48) if block not in {1, 2, 3, 30})


async def test_random_layouts_and_partial_spans(stage: Stage) -> None:
    """Sizes that are no powers of two, layers of different width, any blocks to any blocks, several spans at once."""
    chosen = random.Random(7)
    for _ in range(2):
        sizes = [chosen.choice([1, 640, 1536, 4096, 73_728, 100_003]) for _ in range(chosen.randint(1, 6))]
        blocks = chosen.randint(8, 80)
        peer = await stage.peer(blocks=blocks, layout={"block_bytes": sizes})
        ours = Pool(layout(sizes), chosen.randint(8, 80))
        transport = await stage.transport(ours)
        await peer.ask("fill", blocks=list(range(blocks)))
        connection = await transport.connect(await peer.endpoint(), soon())
        free, expected = chosen.sample(range(ours.blocks), ours.blocks), {}
        spans = []
        for _ in range(chosen.randint(1, 3)):
            start = chosen.randint(0, len(sizes) - 1)
            end = chosen.randint(start, len(sizes))
            count = min(chosen.randint(0, 12), len(free))
            local = [free.pop() for _ in range(count)]
            first = chosen.randint(0, blocks - 1)
            remote = [(first + n) % blocks for n in range(count)]
            spans.append(Span(start, end, remote, local))
            expected |= {(n, here): there for n in range(start, end) for here, there in zip(local, remote, strict=True)}
        await connection.pull(spans, soon())
        for layer in range(len(sizes)):
            for block in range(ours.blocks):
                if (layer, block) in expected:
                    assert ours.holds(layer, block, expected[layer, block], 0)
                else:
                    assert ours.untouched(layer, block)
        await connection.close()


async def test_extents_are_pulled_while_the_owner_still_seals(stage: Stage, pool: Pool) -> None:
    peer, transport = await stage.peer(), await stage.transport(pool)
    connection = await transport.connect(await peer.endpoint(), soon())
    pulls = []
    for layer in range(3):
        for first in range(0, 48, 8):
            blocks = list(range(first, first + 8))
            await peer.ask("fill", blocks=blocks, layers=[layer])
            pulls.append(asyncio.create_task(connection.pull([Span(layer, layer + 1, blocks, blocks)], soon())))
    await asyncio.gather(*pulls)
    await connection.validate(range(48), [0] * 48, soon())
    assert all(pool.holds(layer, block, block, 0) for layer in range(3) for block in range(48))


async def test_a_block_that_is_reused_during_a_pull_is_noticed(stage: Stage, pool: Pool) -> None:
    peer, transport = await stage.peer(), await stage.transport(pool)
    generations = await peer.ask("fill", blocks=[3, 4, 5])
    connection = await transport.connect(await peer.endpoint(), soon())
    await connection.pull([Span(0, 2, [3, 4, 5], [3, 4, 5])], soon())
    await peer.ask("reuse", blocks=[4])
    await connection.pull([Span(2, 3, [3, 4, 5], [3, 4, 5])], soon())
    with pytest.raises(StaleGeneration, match=r"1 of 3 blocks of prefill-0 .* block 4: generation 1, offered with 0"):
        await connection.validate([3, 4, 5], generations, soon())
    assert transport.metrics.value("transfer_stale_total", f'transport="{stage.kind}"') == 1


async def test_a_different_layout_is_refused_with_both_sides_named(stage: Stage) -> None:
    peer = await stage.peer(blocks=4)
    transport = await stage.transport(Pool(layout(block_tokens=32, parallel_width=2), 4))
    with pytest.raises(HandshakeRefused, match="prefill-0 and decode-0 do not fit") as refused:
        await transport.connect(await peer.endpoint(), soon())
    assert "block_tokens: prefill-0 has 64, decode-0 has 32" in refused.value.message
    assert "parallel_width: prefill-0 has 1, decode-0 has 2" in refused.value.message
    refusals = (await peer.ask("metrics"))["transfer_refused_total"]
    assert refusals == {f'transport="{stage.kind}",reason="handshake_refused"': 1}
    assert await peer.ask("peers") == []


async def test_another_life_at_the_same_address_is_refused(stage: Stage, pool: Pool) -> None:
    transport, listen = await stage.transport(pool), stage.listen()
    first = await stage.peer(listen=listen)
    old = await first.endpoint()
    connection = await transport.connect(old, soon())
    await first.kill()
    second = await stage.peer(listen=listen)
    with pytest.raises(HandshakeRefused, match=r"prefill-0 was .* when it gave its address; .* answers there"):
        await transport.connect(old, soon())
    with pytest.raises(TransferFailed) as failed:
        await connection.pull([Span(0, 3, [1], [1])], soon())
    assert failed.value.reason == "peer_gone"
    again = await transport.connect(await second.endpoint(), soon())
    assert again.peer.incarnation == await second.incarnation()


async def test_a_fenced_peer_reads_no_more_and_is_not_let_in_again(stage: Stage, pool: Pool) -> None:
    peer, transport = await stage.peer(), await stage.transport(pool)
    connection = await transport.connect(await peer.endpoint(), soon())
    life = transport.identity.incarnation
    assert await peer.ask("fence", incarnation=life, within_s=5) in {"acknowledged", "revoked", "gone"}
    with pytest.raises(TransferFailed) as failed:
        await connection.pull([Span(0, 3, [1], [1])], soon())
    assert failed.value.reason == "fenced"
    with pytest.raises(HandshakeRefused, match="was fenced by prefill-0"):
        await transport.connect(await peer.endpoint(), soon())
    assert pool.untouched(0, 1)
    await peer.ask("readmit", incarnation=life)
    again = await transport.connect(await peer.endpoint(), soon())
    await again.pull([Span(0, 3, [1], [1])], soon())


async def test_who_was_never_there_is_fenced_at_once(stage: Stage) -> None:
    peer = await stage.peer()
    assert await peer.ask("fence", incarnation="nobody", within_s=1) == "absent"


async def test_a_deadline_is_told_from_a_failure(stage: Stage, pool: Pool) -> None:
    peer, transport = await stage.peer(), await stage.transport(pool)
    connection = await transport.connect(await peer.endpoint(), soon())
    with pytest.raises(DeadlineExceeded):
        await connection.pull([Span(0, 3, [1], [1])], Deadline.after(0))
    await peer.kill()
    await until(lambda: connection.broken)
    with pytest.raises(TransferFailed):
        await connection.pull([Span(0, 3, [1], [1])], soon())
    for outcome in ("expired", "failed_peer_gone"):
        labels = f'transport="{stage.kind}",outcome="{outcome}"'
        assert transport.metrics.value("transfer_pulls_total", labels) == 1


async def test_extents_that_are_not_there_are_a_programmers_error(stage: Stage, pool: Pool) -> None:
    peer, transport = await stage.peer(), await stage.transport(pool)
    connection = await transport.connect(await peer.endpoint(), soon())
    for span, told in (
        (Span(0, 4, [1], [1]), "layers"),
        (Span(0, 3, [64], [1]), "remote_blocks"),
        (Span(0, 3, [1], [48]), "local_blocks"),
        (Span(0, 3, [1, 2], [1, 1]), "twice"),
        (Span(0, 3, [1, 2], [1]), "2 remote_blocks and 1 local_blocks"),
    ):
        with pytest.raises(ValueError, match=told):
            await connection.pull([span], soon())
    await connection.pull([Span(0, 3, [63], [47]), Span(1, 1, [1], [1]), Span(0, 3, [], [])], soon())


async def test_many_readers_at_once(stage: Stage) -> None:
    peer = await stage.peer()
    await peer.ask("fill", blocks=list(range(64)))
    endpoint = await peer.endpoint()

    async def read(number: int) -> None:
        pool = Pool(layout(), 64)
        transport = await stage.transport(pool, f"decode-{number}")
        connection = await transport.connect(endpoint, soon())
        for first in range(0, 64, 16):
            blocks = list(range(first, first + 16))
            await connection.pull([Span(0, 3, blocks, blocks[::-1])], soon())
            assert all(pool.holds(2, blocks[15 - n], block, 0) for n, block in enumerate(blocks))

    await asyncio.gather(*(read(number) for number in range(4)))
    assert len(await peer.ask("peers")) == 4


async def test_the_fence_of_one_reader_leaves_the_others_alone(stage: Stage, pool: Pool) -> None:
    peer, reader, other = await stage.peer(), await stage.peer(name="decode-1"), await stage.transport(pool)
    endpoint = await peer.endpoint()
    await reader.ask("connect", endpoint=endpoint.hex())
    connection = await other.connect(endpoint, soon())
    await peer.ask("fence", incarnation=await reader.incarnation(), within_s=5)
    await connection.pull([Span(0, 3, [1], [1])], soon())
    with pytest.raises(PeerError, match="fenced"):
        await reader.ask("pull", blocks=[1])
