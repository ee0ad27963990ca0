"""The Session stream of WorkerClient and WorkerServicer over a real Unix socket; the host behind it is scripted."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import HandshakeRefused, Unavailable
from tokenrelay.proto import worker_pb2, worker_pb2_grpc
from tokenrelay.services.chassis.channel import channel_options, decode_error
from tokenrelay.services.chassis.client import ClientOptions, WorkerClient
from tokenrelay.services.chassis.handshake import Expectation
from tokenrelay.services.chassis.server import WorkerServer
from tokenrelay.services.chassis.session import WorkerServicer

FAST = ClientOptions(backoff_min_s=0.01, backoff_max_s=0.05, refused_retry_s=0.05)


def packed(*token_ids: int) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def unpacked(token_ids: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(token_ids) // 4}I", token_ids))


class ScriptedHost:
    """A host whose outputs the test sends by hand."""

    def __init__(self, incarnation: str = "life-1") -> None:
        self.incarnation = incarnation
        self.submitted: dict[int, worker_pb2.Submit] = {}
        self.aborted: list[int] = []
        self.refuse: worker_pb2.SequenceOutput | None = None

    def handshake(self) -> worker_pb2.HandshakeReply:
        return worker_pb2.HandshakeReply(incarnation=self.incarnation, model_name="m", block_tokens=64)

    def submit(self, sequence_id: int, submit: worker_pb2.Submit) -> worker_pb2.SequenceOutput | None:
        self.submitted[sequence_id] = submit
        return self.refuse

    def abort(self, sequence_id: int) -> None:
        self.aborted.append(sequence_id)

    def stats(self) -> worker_pb2.Stats:
        return worker_pb2.Stats(steps=7)


@dataclass
class Seen:
    """Everything one sequence's callback got."""

    token_ids: list[int] = field(default_factory=list)
    finishes: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    messages: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __call__(self, output: worker_pb2.SequenceOutput) -> None:
        self.messages += 1
        self.token_ids += unpacked(output.token_ids)
        if output.finish:
            self.finishes.append(output.finish)
            self.errors.append(output.error)
        self.changed.set()

    async def until_finished(self) -> None:
        while not self.finishes:
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


async def until(condition: object, what: str) -> None:
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never: {what}")


@dataclass
class Stage:
    """One worker and one client."""

    host: ScriptedHost
    servicer: WorkerServicer
    server: WorkerServer
    client: WorkerClient

    def step(self, *outputs: tuple[int, tuple[int, ...], int], step: int = 1) -> None:
        messages = [
            worker_pb2.SequenceOutput(id=host_id, token_ids=packed(*token_ids), finish=finish)
            for host_id, token_ids, finish in outputs
        ]
        self.servicer.deliver(messages, worker_pb2.Stats(steps=step))


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    host = ScriptedHost()
    servicer = WorkerServicer(host)
    server = WorkerServer(servicer, f"unix:{tmp_path}/w.sock")
    await server.start()
    client = WorkerClient(server.address, options=FAST)
    await client.start()
    await client.wait_ready(10)
    yield Stage(host, servicer, server, client)
    await client.close()
    await server.stop(0)


async def test_many_sequences_share_one_stream(stage: Stage) -> None:
    seen = [Seen() for _ in range(3)]
    ids = [stage.client.submit(worker_pb2.Submit(token_ids=packed(i)), s) for i, s in enumerate(seen)]
    assert len(set(ids)) == 3
    await until(lambda: len(stage.host.submitted) == 3, "submits arrive")
    host_ids = list(stage.host.submitted)
    stage.step(*[(h, (10 + i,), 0) for i, h in enumerate(host_ids)])
    stage.step((host_ids[0], (20,), worker_pb2.FINISH_STOP), (host_ids[2], (22,), worker_pb2.FINISH_LENGTH), step=2)
    await seen[0].until_finished()
    await seen[2].until_finished()
    assert [s.token_ids for s in seen] == [[10, 20], [11], [12, 22]]
    assert [s.finishes for s in seen] == [[worker_pb2.FINISH_STOP], [], [worker_pb2.FINISH_LENGTH]]
    assert stage.client.open_count == stage.servicer.open_count == 1
    assert stage.client.stats.steps == 2
    assert (await stage.client.get_stats()).steps == 7


async def test_abort_reaches_the_host_and_the_terminal_output_comes_once(stage: Stage) -> None:
    seen = Seen()
    sequence = stage.client.submit(worker_pb2.Submit(), seen)
    stage.client.abort(sequence)
    await until(lambda: stage.host.aborted, "the abort arrives")
    assert stage.host.aborted == list(stage.host.submitted)
    stage.step((stage.host.aborted[0], (), worker_pb2.FINISH_ABORT))
    stage.step((stage.host.aborted[0], (5,), worker_pb2.FINISH_STOP))  # the host must not, but if it does
    await seen.until_finished()
    stage.client.abort(sequence)  # no effect any more
    await asyncio.sleep(0.05)
    assert seen.finishes == [worker_pb2.FINISH_ABORT] and not seen.token_ids


async def test_a_refusal_is_the_terminal_output(stage: Stage) -> None:
    stage.host.refuse = worker_pb2.SequenceOutput(
        finish=worker_pb2.FINISH_REJECTED, reject_reason=worker_pb2.REJECT_QUEUE_FULL
    )
    seen = Seen()
    stage.client.submit(worker_pb2.Submit(), seen)
    await seen.until_finished()
    assert seen.finishes == [worker_pb2.FINISH_REJECTED] and stage.servicer.open_count == 0


async def test_a_parent_is_named_by_the_routers_id_and_belongs_to_the_session(stage: Stage) -> None:
    parent, child, stranger = Seen(), Seen(), Seen()
    first = stage.client.submit(worker_pb2.Submit(token_ids=packed(1)), parent)
    await until(lambda: len(stage.host.submitted) == 1, "the parent")
    stage.step((1, (5,), worker_pb2.FINISH_STOP))
    await parent.until_finished()
    stage.client.submit(worker_pb2.Submit(token_ids=packed(2), parent=first, parent_tokens=2), child)
    await until(lambda: len(stage.host.submitted) == 2, "the child")
    assert stage.host.submitted[2].parent == 1 and stage.host.submitted[2].parent_tokens == 2
    stage.client.submit(worker_pb2.Submit(token_ids=packed(2), parent=first), Seen())
    await until(lambda: len(stage.host.submitted) == 3, "one without parent_tokens")
    assert not stage.host.submitted[3].parent
    other = WorkerClient(stage.server.address, options=FAST)  # it has no such sequence, whatever the host has
    await other.start()
    await other.wait_ready(10)
    other.submit(worker_pb2.Submit(token_ids=packed(2), parent=first, parent_tokens=2), stranger)
    await stranger.until_finished()
    assert stranger.finishes == [worker_pb2.FINISH_REJECTED] and len(stage.host.submitted) == 3
    await other.close()


async def test_a_raising_callback_harms_nobody_else(stage: Stage) -> None:
    def broken(_: worker_pb2.SequenceOutput) -> None:
        raise RuntimeError("a bug of the caller")

    seen = Seen()
    stage.client.submit(worker_pb2.Submit(), broken)
    stage.client.submit(worker_pb2.Submit(), seen)
    await until(lambda: len(stage.host.submitted) == 2, "submits arrive")
    stage.step(*[(h, (1,), worker_pb2.FINISH_STOP) for h in stage.host.submitted])
    await seen.until_finished()
    assert seen.token_ids == [1] and stage.client.ready


async def test_closing_the_client_aborts_what_it_had_open_and_nothing_else(stage: Stage) -> None:
    other, kept, lost = WorkerClient(stage.server.address, options=FAST), Seen(), Seen()
    await other.start()
    await other.wait_ready(10)
    stage.client.submit(worker_pb2.Submit(request_id="kept"), kept)
    other.submit(worker_pb2.Submit(request_id="lost"), lost)  # both have id 1: ids belong to the session
    await until(lambda: len(stage.host.submitted) == 2, "submits arrive")
    await other.close()
    assert lost.finishes == [worker_pb2.FINISH_ERROR]
    await until(lambda: stage.host.aborted, "the abort")
    assert [stage.host.submitted[i].request_id for i in stage.host.aborted] == ["lost"]
    assert stage.servicer.open_count == 1 and not kept.finishes


async def test_a_worker_that_dies_fails_every_request_once_and_the_client_finds_the_next_life(stage: Stage) -> None:
    seen = [Seen() for _ in range(5)]
    for s in seen:
        stage.client.submit(worker_pb2.Submit(), s)
    await until(lambda: len(stage.host.submitted) == 5, "submits arrive")
    stage.step((next(iter(stage.host.submitted)), (1,), worker_pb2.FINISH_STOP))
    await seen[0].until_finished()
    await stage.server.stop(0)
    for s in seen[1:]:
        await s.until_finished()
    await until(lambda: not stage.client.ready, "not ready")
    with pytest.raises(Unavailable):
        stage.client.submit(worker_pb2.Submit(), Seen())
    assert [s.finishes for s in seen] == [[worker_pb2.FINISH_STOP]] + [[worker_pb2.FINISH_ERROR]] * 4
    assert all(isinstance(decode_error(s.errors[0]), Unavailable) for s in seen[1:])

    reborn = WorkerServer(WorkerServicer(ScriptedHost("life-2")), stage.server.address)
    await reborn.start()
    await stage.client.wait_ready(10)
    assert stage.client.handshake is not None and stage.client.handshake.incarnation == "life-2"
    assert stage.client.connections == 2
    await reborn.stop(0)


async def test_drain_lets_the_open_ones_end_and_refuses_new_ones(stage: Stage) -> None:
    running, late = Seen(), Seen()
    stage.client.submit(worker_pb2.Submit(), running)
    await until(lambda: stage.host.submitted, "submit arrives")
    drain = asyncio.create_task(stage.servicer.drain(Deadline.after(10)))
    await asyncio.sleep(0)
    stage.client.submit(worker_pb2.Submit(), late)
    await late.until_finished()
    assert late.finishes == [worker_pb2.FINISH_REJECTED] and not drain.done()
    stage.step((next(iter(stage.host.submitted)), (3,), worker_pb2.FINISH_STOP))
    await asyncio.wait_for(drain, 5)
    await running.until_finished()
    assert running.token_ids == [3] and running.finishes == [worker_pb2.FINISH_STOP]
    await until(lambda: not stage.client.ready, "the session ends")


async def test_drain_past_its_deadline_answers_with_an_error(stage: Stage) -> None:
    running = Seen()
    stage.client.submit(worker_pb2.Submit(), running)
    await until(lambda: stage.host.submitted, "submit arrives")
    await stage.servicer.drain(Deadline.after(0.05))
    await running.until_finished()
    assert running.finishes == [worker_pb2.FINISH_ERROR] and "drain" in running.errors[0]
    assert stage.host.aborted == list(stage.host.submitted)


async def test_a_handshake_that_does_not_fit_is_refused_naming_both(stage: Stage) -> None:
    client = WorkerClient(stage.server.address, options=FAST, expect=Expectation(block_tokens=32, model_name="m"))
    await client.start()
    with pytest.raises(HandshakeRefused, match=r"block_tokens: router has 32, worker has 64"):
        await client.wait_ready(0.5)
    assert client.connections == 0
    await client.close()


async def test_a_worker_restarted_between_handshake_and_session_is_noticed(tmp_path: Path) -> None:
    class Restarted(ScriptedHost):
        lives = 0

        def handshake(self) -> worker_pb2.HandshakeReply:
            self.lives += 1
            return worker_pb2.HandshakeReply(incarnation=f"life-{self.lives}" if self.lives < 4 else "life-4")

    server = WorkerServer(WorkerServicer(Restarted()), f"unix:{tmp_path}/w.sock")
    await server.start()
    client = WorkerClient(server.address, options=FAST)
    await client.start()
    await client.wait_ready(10)
    assert client.connections == 1 and client.handshake is not None
    assert client.handshake.incarnation == "life-4", "lives 1 to 3 were refused"
    await client.close()
    await server.stop(0)


async def slow_reader(address: str) -> tuple[grpc.aio.Channel, grpc.aio.StreamStreamCall]:
    """A router that opens a session, submits once, and then does not read."""
    channel = grpc.aio.insecure_channel(address, options=channel_options())
    call = worker_pb2_grpc.WorkerStub(channel).Session()
    await call.initial_metadata()
    await call.write(worker_pb2.Command(submit=worker_pb2.Submit(id=1)))
    return channel, call


async def test_a_slow_reader_coalesces_and_loses_nothing(stage: Stage) -> None:
    channel, call = await slow_reader(stage.server.address)
    await until(lambda: stage.host.submitted, "submit arrives")
    host_id = next(iter(stage.host.submitted))
    steps, width = 400, 500
    for step in range(steps):  # 800 kB: far more than the transport buffers, less than the bound
        finish = worker_pb2.FINISH_STOP if step == steps - 1 else 0
        stage.step((host_id, tuple(range(step * width, (step + 1) * width)), finish), step=step + 1)
        await asyncio.sleep(0)
    token_ids: list[int] = []
    messages, finish = 0, 0
    while not finish:
        message = await asyncio.wait_for(call.read(), 10)
        messages += 1
        token_ids += unpacked(message.outputs[0].token_ids)
        finish = message.outputs[0].finish
    assert token_ids == list(range(steps * width))
    assert messages < steps, "several steps travelled in one message"
    await channel.close()


async def test_a_flood_of_refused_submits_that_nobody_reads_is_cut(tmp_path: Path) -> None:
    host = ScriptedHost()
    servicer = WorkerServicer(host, outbox_tokens_max=5_000)
    server = WorkerServer(servicer, f"unix:{tmp_path}/w.sock")
    await server.start()
    host.refuse = worker_pb2.SequenceOutput(finish=worker_pb2.FINISH_REJECTED, error="invalid_request: " + "x" * 8000)
    channel, call = await slow_reader(server.address)
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        for n in range(2, 2000):  # written into the void from some point on
            await call.write(worker_pb2.Command(submit=worker_pb2.Submit(id=n)))
        while True:  # what was sent before is read first
            await asyncio.wait_for(call.read(), 10)
    assert len(host.submitted) < 1999
    # INTERNAL is what grpc makes of it where the stream ends under a write of ours
    assert ended.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INTERNAL)
    assert servicer.open_count == 0
    await channel.close()
    await server.stop(0)


async def test_a_reader_behind_the_bound_is_cut_and_the_others_go_on(tmp_path: Path) -> None:
    host = ScriptedHost()
    servicer = WorkerServicer(host, outbox_tokens_max=10_000)
    server = WorkerServer(servicer, f"unix:{tmp_path}/w.sock")
    await server.start()
    client, seen = WorkerClient(server.address, options=FAST), Seen()
    await client.start()
    await client.wait_ready(10)
    client.submit(worker_pb2.Submit(request_id="fast"), seen)
    await until(lambda: len(host.submitted) == 1, "first submit")
    channel, call = await slow_reader(server.address)
    await until(lambda: len(host.submitted) == 2, "second submit")
    fast, slow = host.submitted
    for _ in range(5000):
        stage_outputs = [worker_pb2.SequenceOutput(id=slow, token_ids=packed(*range(1000)))]
        servicer.deliver(stage_outputs, worker_pb2.Stats())
        await asyncio.sleep(0)
        if host.aborted:
            break
    assert host.aborted == [slow], "the slow one is cut, and only that"
    servicer.deliver(
        [worker_pb2.SequenceOutput(id=fast, token_ids=packed(1), finish=worker_pb2.FINISH_STOP)], worker_pb2.Stats()
    )
    await seen.until_finished()
    assert seen.token_ids == [1]
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        while True:
            await asyncio.wait_for(call.read(), 10)
    assert ended.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    await channel.close()
    await client.close()
    await server.stop(0)


async def test_a_broken_book_is_the_last_word_and_the_router_counts_it(stage: Stage) -> None:
    """The worker's own counter ends with it; the client's stands, whatever the next life says."""
    stage.servicer.deliver([], worker_pb2.Stats(steps=5, integrity_failures=1))
    stage.servicer.end_sessions()
    await stage.server.stop(2)
    await until(lambda: not stage.client.ready, "the worker is gone")
    assert stage.client.integrity_failures == 1 and stage.client.stats.steps == 5
    reborn = WorkerServer(WorkerServicer(ScriptedHost("life-2")), stage.server.address)
    await reborn.start()
    await stage.client.wait_ready(10)
    assert (await stage.client.get_stats()).integrity_failures == 0
    assert stage.client.integrity_failures == 1
    await reborn.stop(0)
