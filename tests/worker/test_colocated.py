"""Both roles on one real engine: every sequence walks the handle's transitions, and every handle ends."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_process import submit_message

from tokenrelay.base.errors import DeadlineExceeded
from tokenrelay.cli.colocated import Colocated, EngineLink, mount_roles, stats_message
from tokenrelay.ledger.ledger import Actor, EmbeddedLedger
from tokenrelay.ledger.states import TERMINAL, State
from tokenrelay.libscheduler import block_hashes
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.build import EngineSizes, build_engine
from tokenrelay.runtime.requests import EngineStats, HostStats
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.services.chassis.channel import decode_error
from tokenrelay.services.chassis.mailbox import LoopMailbox
from tokenrelay.services.decode.service import DecodeRole
from tokenrelay.services.prefill.config import PrefillConfig


class Gate:
    """A model that waits when told to."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.cos_sin = model, model.config, model.cos_sin
        self.shard = model  # what of it is here
        self.parts, self.whole_pool = 1, True  # and all of its KV
        self.open = threading.Event()
        self.open.set()

    def __call__(self, *arguments: Any) -> Any:
        assert self.open.wait(30)
        return self.model(*arguments)


@dataclass
class Bench:
    """The roles, and what they answered."""

    host: Colocated
    gate: Gate
    outputs: dict[int, list[worker_pb2.SequenceOutput]] = field(default_factory=dict)

    def deliver(self, outputs: list[worker_pb2.SequenceOutput], stats: worker_pb2.Stats) -> None:
        for output in outputs:
            self.outputs.setdefault(output.id, []).append(output)

    async def end(self, *ids: int) -> list[worker_pb2.SequenceOutput]:
        """The terminal outputs of `ids`."""
        for _ in range(2000):
            if all(i in self.outputs and self.outputs[i][-1].finish for i in ids):
                return [self.outputs[i][-1] for i in ids]
            await asyncio.sleep(0.005)
        raise AssertionError(f"no end of {ids}")

    def handles(self) -> dict[State, int]:
        self.host.ledger.check()
        return {state: count for state, count in self.host.ledger.counts.items() if count}


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return load_model(checkpoint, dtype=torch.float32, block_tokens=16)


async def bench_of(model: Any, handle_deadline_s: float) -> AsyncIterator[Bench]:
    fatal: list[BaseException] = []
    link, gate = EngineLink(asyncio.get_running_loop(), fatal.append), Gate(model)
    built = build_engine(
        gate,  # type: ignore[arg-type]
        EngineSizes(slots=4, blocks=64, threads=1),
        on_step=link.on_step,
        on_fatal=link.on_fatal,
        on_cache_events=link.on_cache_events,
        hash_key=bytes(16),
    )
    reply = worker_pb2.HandshakeReply(incarnation="life-1", eos_token_ids=[2])
    config = PrefillConfig(handle_deadline_s=handle_deadline_s)
    host = mount_roles(built.engine, link, reply, layers=2, claim_deadline_s=handle_deadline_s, prefill_config=config)
    bench = Bench(host, gate)
    host.bind(bench)  # type: ignore[arg-type]
    host.start()
    yield bench
    gate.open.set()
    await asyncio.to_thread(host.close)
    await asyncio.sleep(0)
    assert not fatal


@pytest.fixture
async def bench(model: Any) -> AsyncIterator[Bench]:
    async for each in bench_of(model, 600):
        yield each


def test_the_host_tiers_counters_reach_the_wire() -> None:
    fields = {field.name: number for number, field in enumerate(dataclasses.fields(HostStats), start=1)}
    message = stats_message(EngineStats(steps=7, host=HostStats(**fields)))
    assert message.steps == 7
    assert {
        field.name: getattr(message.host_tier, field.name) for field in message.host_tier.DESCRIPTOR.fields
    } == fields


async def test_a_sequence_is_handed_over_with_its_first_token(bench: Bench) -> None:
    bench.gate.open.clear()
    assert bench.host.submit(1, submit_message([5, 6, 7], 4)) is None
    assert bench.handles() == {State.CLAIMED: 1}
    bench.gate.open.set()
    (terminal,) = await bench.end(1)
    assert terminal.finish == worker_pb2.FINISH_LENGTH
    assert b"".join(output.token_ids for output in bench.outputs[1])
    assert bench.handles() == {State.RELEASED: 1}


async def test_a_next_turn_that_names_its_parent_answers_as_the_whole_prompt_does(bench: Bench) -> None:
    bench.host.submit(1, submit_message([5, 6, 7] * 20, 10))
    await bench.end(1)
    said = b"".join(output.token_ids for output in bench.outputs[1])
    whole = submit_message([5, 6, 7] * 20, 12)
    whole.token_ids = whole.token_ids + said + b"\x09\0\0\0" * 3
    turn = submit_message([9, 9, 9], 12, parent=1, parent_tokens=70)
    whole.output_start = turn.output_start = 73
    assert bench.host.submit(2, turn) is None and bench.host.submit(3, whole) is None
    await bench.end(2, 3)
    second, third = (b"".join(output.token_ids for output in bench.outputs[i]) for i in (2, 3))
    assert second == third and len(second) == 4 * 12
    assert bench.outputs[2][0].cached_tokens == 64  # blocks of 16 tokens
    gone = submit_message([9], 4, parent=77, parent_tokens=70)
    gone.output_start = 71
    bench.host.submit(4, gone)
    (terminal,) = await bench.end(4)
    assert terminal.reject_reason == worker_pb2.REJECT_PARENT_UNKNOWN
    assert bench.handles() == {State.RELEASED: 3, State.RECLAIMED: 1}


async def test_no_handover_when_the_first_token_is_the_last_or_never_comes(bench: Bench) -> None:
    assert bench.host.submit(1, submit_message([5, 6, 7], 1)) is None
    await bench.end(1)
    assert bench.handles() == {State.RECLAIMED: 1}
    bench.gate.open.clear()
    assert bench.host.submit(2, submit_message([5, 6, 8], 9)) is None
    bench.host.abort(2)
    (terminal,) = await bench.end(2)
    assert terminal.finish == worker_pb2.FINISH_ABORT
    assert bench.handles() == {State.RECLAIMED: 2}
    bench.gate.open.set()
    assert bench.host.submit(3, submit_message([], 9)) is None  # refused by the engine, after admission
    (terminal,) = await bench.end(3)
    assert terminal.finish == worker_pb2.FINISH_REJECTED and bench.handles() == {State.RECLAIMED: 3}
    refusal = bench.host.submit(4, worker_pb2.Submit(token_ids=b"x"))  # refused before
    assert refusal is not None and refusal.reject_reason == worker_pb2.REJECT_INVALID
    assert bench.handles() == {State.RECLAIMED: 3}


async def test_many_sequences_leave_no_handle_open(bench: Bench) -> None:
    ids = range(1, 61)
    for n in ids:
        assert bench.host.submit(n, submit_message([5 + n, 6, 7], 1 + n % 4)) is None
        if n % 5 == 0:
            asyncio.get_running_loop().call_later(n / 2000, bench.host.abort, n)
    await bench.end(*ids)
    assert bench.host.ledger.open_count == 0
    assert set(bench.handles()) <= TERMINAL and sum(bench.handles().values()) == 60


async def test_a_handle_past_its_deadline_ends_its_sequence(model: Any) -> None:
    async for bench in bench_of(model, 1.0):
        bench.gate.open.clear()
        assert bench.host.submit(1, submit_message([5, 6, 7], 50)) is None
        (terminal,) = await bench.end(1)
        assert terminal.finish == worker_pb2.FINISH_ERROR
        assert isinstance(decode_error(terminal.error), DeadlineExceeded)
        assert bench.handles() == {State.RECLAIMED: 1}
        bench.gate.open.set()
        assert bench.host.submit(2, submit_message([5, 6, 7], 5)) is None
        assert (await bench.end(2))[0].finish == worker_pb2.FINISH_LENGTH


async def test_the_directory_learns_what_is_cached(bench: Bench, model: Any) -> None:
    prompt = list(range(10, 60))
    assert bench.host.submit(1, submit_message(prompt, 2)) is None
    await bench.end(1)
    hashes = block_hashes(
        torch.tensor(prompt, dtype=torch.uint32).numpy(),
        block_tokens=16,
        hash_key=bytes(16),
        model_identity=model.config.identity,
    )
    for _ in range(200):
        if bench.host.directory.match(hashes):
            break
        await asyncio.sleep(0.01)
    assert bench.host.directory.match(hashes) == {"colocated": 3}


def test_a_handover_costs_microseconds() -> None:
    """All transitions of a request, in the ledger: measured at 10 us; the bound leaves room for a busy machine."""
    ledger = EmbeddedLedger()
    prefill, decode = Actor("prefill", "1"), Actor("decode", "1")
    ledger.join(prefill)
    role = DecodeRole(ledger, decode, claim_deadline_s=600)
    best = float("inf")
    for _ in range(20):
        began = time.perf_counter()
        for n in range(100):
            handle = ledger.reserve(prefill, extents=2, deadline_s=600)
            ledger.offer(handle, prefill)  # type: ignore[arg-type]
            role.claim(n, handle)  # type: ignore[arg-type]
            ledger.seal(handle, prefill, extents=2)  # type: ignore[arg-type]
            role.adopt(n)
            ledger.release(handle, prefill)  # type: ignore[arg-type]
        best = min(best, (time.perf_counter() - began) / 100)
    assert ledger.open_count == 0
    assert best < 100e-6, f"{best * 1e6:.1f} us a request"
    print(f"{best * 1e6:.1f} us a request")


async def test_the_mailbox_hands_over_in_order_and_holds_the_engine_back(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    mailbox = LoopMailbox[list[int], None](
        asyncio.get_running_loop(), lambda posts: taken.extend(n for batch, _ in posts for n in batch), items_max=10
    )
    thread = threading.Thread(target=lambda: [mailbox.post([n, n], None) for n in range(100)])
    thread.start()
    thread.join(0.1)  # the loop does not read: the sender must wait at the bound
    assert thread.is_alive() and not taken
    await asyncio.to_thread(thread.join, 10)
    for _ in range(100):
        await asyncio.sleep(0)
    assert taken == [n for n in range(100) for _ in range(2)]
    mailbox.close()
    mailbox.post([1], None)
    await asyncio.sleep(0.01)
    assert len(taken) == 200
