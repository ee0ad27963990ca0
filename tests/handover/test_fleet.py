"""Token for token the same text, colocated and disaggregated, over shared memory and gRPC."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from fleet import Fleet
from predictions import make_steady_checkpoint

from tokenrelay.ledger.api import State
from tokenrelay.proto import peer_pb2, worker_pb2
from tokenrelay.transfer.select import available


def prompt_of(length: int, seed: int = 1) -> list[int]:
    return [random.Random(seed * 1000 + i).randrange(3, 380) for i in range(length)]


@pytest.mark.parametrize("kind", available())
@pytest.mark.parametrize("model", ["mla", "gqa"])
async def test_the_text_is_the_same(checkpoints: dict[str, Path], kind: str, model: str) -> None:
    fleet = Fleet(checkpoints[model], transport=kind)
    try:
        await fleet.start()
        base = prompt_of(100)
        prompts = [
            base,
            prompt_of(64, 2),
            [7],
            base[:80] + prompt_of(30, 3),
            base,
        ]  # full blocks only; one token; reuse
        for prompt in prompts:
            relayed = await fleet.relay(prompt, 12)
            texts = await fleet.finish(relayed)
            assert relayed.source.terminals[0].finish == worker_pb2.FINISH_HANDOVER, fleet.logs(relayed)
            assert relayed.finish == worker_pb2.FINISH_LENGTH, fleet.logs(relayed.destination.terminals)
            assert len(relayed.source.token_ids) == 1
            assert texts == await fleet.alone("prefill", prompt, 12)
            await fleet.settles("prefill", "decode")
        reused = relayed.source.outputs[-1].cached_tokens
        assert reused >= 80  # the last prompt repeats the first
    finally:
        await fleet.close()


async def test_many_at_once(fleet: Fleet) -> None:
    prompts = [prompt_of(20 + 17 * i, i % 3) for i in range(12)]
    relayed = await asyncio.gather(*(fleet.relay(prompt, 8) for prompt in prompts))
    texts = await asyncio.gather(*(fleet.finish(each) for each in relayed))
    for prompt, text in zip(prompts, texts, strict=True):
        assert text == await fleet.alone("decode", prompt, 8)
    await fleet.settles("prefill", "decode")


async def test_an_offer_that_nobody_takes_is_withdrawn(fleet: Fleet) -> None:
    """The router says so when the sequence goes on elsewhere: the blocks are free long before the handle's deadline."""
    relayed = fleet.begin(prompt_of(40), 8)
    await relayed.source.ended()
    assert [view.state for view in await fleet.open_handles()] == [State.OFFERED]
    fleet.clients["prefill"].withdraw(relayed.source.id)
    await asyncio.wait_for(fleet.settles("prefill"), 5)


async def test_a_refused_handover_disturbs_no_other(fleet: Fleet) -> None:
    """A destination declines what it has claimed, while others are read over the same connections."""
    prompts = [prompt_of(500, seed) for seed in range(3)]
    given_up, *others = await asyncio.gather(*(fleet.relay(prompt, 8) for prompt in prompts))
    offer = next(output.offer for output in given_up.source.outputs if output.offer)
    number = peer_pb2.KvOffer.FromString(offer).number
    while state := {view.handle.number: view.state for view in await fleet.open_handles()}.get(number):
        if state is State.TRANSFERRING:
            break
    assert state, "it was over before anybody saw it read"
    assert given_up.destination is not None
    fleet.clients["decode"].abort(given_up.destination.id)
    for prompt, each in zip(prompts[1:], others, strict=True):
        assert await fleet.finish(each) == await fleet.alone("prefill", prompt, 8), fleet.logs()
    await fleet.settles("prefill", "decode")
    assert '"peer": "decode"' not in fleet.workers["prefill"].log.read_text()


async def test_a_prediction_layers_kv_is_handed_over_with_the_rest(tmp_path: Path) -> None:
    """What the decode worker proposes it makes of KV that the prefill worker wrote; it comes true as elsewhere."""
    flags = ("--drafts", "mtp", "--dtype", "float32")
    model = make_steady_checkpoint(tmp_path / "steady")
    fleet = Fleet(model, more={"prefill": flags, "decode": flags})
    try:
        await fleet.start()
        accepted = []
        for length in (100, 64, 40):
            relayed = await fleet.relay(prompt_of(length), 40)
            texts = await fleet.finish(relayed)
            assert relayed.source.terminals[0].finish == worker_pb2.FINISH_HANDOVER, fleet.logs(relayed)
            drafts = fleet.clients["decode"].stats.drafts
            assert drafts.proposer == "mtp"
            accepted.append(drafts.accepted / drafts.tokens)
            assert texts == await fleet.alone("prefill", prompt_of(length), 40)
            await fleet.settles("prefill", "decode")
        assert accepted[0] > 0.6
    finally:
        await fleet.close()


async def test_float8_kv_is_handed_over(checkpoints: dict[str, Path]) -> None:
    flags = ("--kv-dtype", "fp8", "--dtype", "float32")
    fleet = Fleet(checkpoints["mla"], more={"prefill": flags, "decode": flags})
    try:
        await fleet.start()
        relayed = await fleet.relay(prompt_of(100), 12)
        texts = await fleet.finish(relayed)
        assert relayed.source.terminals[0].finish == worker_pb2.FINISH_HANDOVER, fleet.logs(relayed)
        assert texts == await fleet.alone("prefill", prompt_of(100), 12)
        await fleet.settles("prefill", "decode")
    finally:
        await fleet.close()


async def test_workers_with_and_without_a_prediction_layer_do_not_fit(tmp_path: Path) -> None:
    """Their blocks differ by a layer: who comes second is refused by name."""
    model = make_steady_checkpoint(tmp_path / "steady")
    fleet = Fleet(model, more={"prefill": ("--drafts", "mtp")})
    try:
        with pytest.raises(AssertionError):
            await fleet.start()
        events = [str(worker.status[-1]) for worker in fleet.workers.values()]
        assert any("failed" in event and "with a prediction layer" in event for event in events), events
    finally:
        await fleet.close()
