"""Two workers' roles, a ledger and a wire in one process: real engines, sources, destinations; a pretend device.

async with Mesh() as mesh:
    mesh.wire.hold()
    relayed = await mesh.relay(prompt, 8)
    ...
    await mesh.settles()
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from fleet import PREFILL, Relayed
from held_transport import HeldTransport, Wire
from pretend_device import VOCABULARY, PretendDevice, text_of
from worker_process import Stream, submit_message

from tokenrelay.base.ids import incarnation
from tokenrelay.cli.colocated import EngineLink
from tokenrelay.cli.fleet import FleetHost
from tokenrelay.ledger.api import Joined, Member
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.local import LocalLedger
from tokenrelay.libscheduler import Config, Scheduler
from tokenrelay.proto import peer_pb2_grpc, worker_pb2
from tokenrelay.runtime.engine import Engine
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.chassis.server import GrpcServer
from tokenrelay.services.decode.destination import Destination
from tokenrelay.services.prefill.source import Source
from tokenrelay.transfer.memory import Layout, SharedPool
from tokenrelay.transfer.transport import Identity

BLOCK_TOKENS = 16
SOON_S = 5.0  # far more than anything takes here, far less than the deadlines that are not meant to act
DESTINATION = worker_pb2.Handover.ROLE_DESTINATION


def prompt_of(tokens: int, seed: int = 1) -> list[int]:
    """Nobody else's."""
    chosen = random.Random(seed)
    return [chosen.randrange(VOCABULARY) for _ in range(tokens)]


async def until(condition: Callable[[], Any], what: str = "", timeout_s: float | None = None) -> None:
    """What has no event of its own; soon, unless told otherwise."""
    try:
        async with asyncio.timeout(SOON_S if timeout_s is None else timeout_s):
            while not condition():  # noqa: ASYNC110
                await asyncio.sleep(0.005)
    except TimeoutError:
        raise AssertionError(f"it did not happen: {what or condition}") from None


class NodeLedger(LocalLedger):
    """A member's way to the ledger; calls by name can be held, as a network does."""

    def __init__(self, host: LedgerHost) -> None:
        super().__init__(host)
        self.held: dict[str, asyncio.Event] = {}
        self.held_answers: dict[str, asyncio.Event] = {}
        for name in ("claim", "transfer", "adopt", "decline", "offer", "seal", "reclaim", "release", "fence"):
            setattr(self, name, self._held(name, getattr(self, name)))

    def _held(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        async def held(*given: Any, **named: Any) -> Any:
            if name in self.held:
                await self.held[name].wait()
            answer = await call(*given, **named)
            if name in self.held_answers:
                await self.held_answers[name].wait()
            return answer

        return held

    def hold(self, name: str) -> asyncio.Event:
        """Calls of this transition wait until the event is set."""
        return self.held.setdefault(name, asyncio.Event())

    def hold_answer(self, name: str) -> asyncio.Event:
        """The ledger makes this transition, and whoever asked hears of it when the event is set."""
        return self.held_answers.setdefault(name, asyncio.Event())


class Node:
    """One life of a worker: both roles on one engine."""

    def __init__(self, mesh: Mesh, name: str, *, blocks: int = 64, slots: int = 4) -> None:
        self.mesh, self.name, self.life = mesh, name, incarnation()
        self.pool = SharedPool([BLOCK_TOKENS * 8], blocks)
        self.kv = np.frombuffer(self.pool.layers[0], np.int64).reshape(blocks, BLOCK_TOKENS)
        layout = Layout(
            model_identity=b"m", dtype="i8", block_tokens=BLOCK_TOKENS, layout="l", block_bytes=(BLOCK_TOKENS * 8,)
        )
        memory = self.pool.memory(layout)
        config = Config(
            block_tokens=BLOCK_TOKENS,
            blocks=blocks,
            slots=slots,
            context_tokens=blocks * BLOCK_TOKENS,
            chunk_tokens=BLOCK_TOKENS,
            hash_key=bytes(16),
            model_identity=bytes(16),
        )
        self.scheduler = Scheduler(config, generations=memory._words)
        self.device = PretendDevice(self.kv, self.scheduler.block_table)
        self.errors: list[BaseException] = []
        loop = asyncio.get_running_loop()
        self.link = EngineLink(loop, self.errors.append)
        self.engine = Engine(
            self.scheduler,
            self.device,
            vocab_size=VOCABULARY,
            on_step=self.link.on_step,
            on_fatal=self.link.on_fatal,
            on_handover=lambda notices: loop.call_soon_threadsafe(self.host.notices, notices),
        )
        self.ledger = NodeLedger(mesh.host)
        self.address = f"unix:{mesh.folder}/{name}"
        self.transport = HeldTransport(Identity(name, self.life), memory, self.kv, mesh.wire, f"held:{name}")
        self.member = Member(name=name, incarnation=self.life, role="colocated", address=self.address)
        actor, given = self.member.actor, mesh.deadlines
        self.source = Source(
            self.engine,
            self.ledger,
            actor,
            [self.transport],
            lambda output: self.host.deliver_one(output),
            address=self.address,
            handle_deadline_s=given["handle_s"],
            ledger_wait_s=5.0,
            on_life_over=lambda _: None,  # a test ends it, or begins another
        )
        self.destination = Destination(
            self.engine,
            self.ledger,
            actor,
            [self.transport],
            lambda output: self.host.deliver_one(output),
            security=Security(),
            claim_deadline_s=given["claim_s"],
            transfer_deadline_s=given["transfer_s"],
        )
        self.host = FleetHost(self.engine, worker_pb2.HandshakeReply(), self.source, self.destination)
        self.host.bind(self)  # type: ignore[arg-type]  # `deliver` is all it takes
        self.link.bind(self.host.take, lambda events: None)
        self._streams: dict[int, Stream] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._server = GrpcServer(self._register, self.address)

    def _register(self, server: Any) -> None:
        peer_pb2_grpc.add_PeerServicer_to_server(self.source, server)  # type: ignore[no-untyped-call]

    async def start(self) -> None:
        """Join and serve."""
        assert isinstance(await self.ledger.join(self.member, lease_s=60), Joined)
        await self.transport.open()
        await self._server.start()
        self.engine.start()
        self._tasks = [asyncio.create_task(role.watch()) for role in (self.source, self.destination)]
        await asyncio.sleep(0)

    def deliver(self, outputs: list[worker_pb2.SequenceOutput], stats: worker_pb2.Stats) -> None:
        """As a router hears it."""
        for output in outputs:
            self._streams[output.id](output)

    def submit(self, prompt: Sequence[int], tokens_max: int, **fields: Any) -> Stream:
        """A sequence, with or without a handover."""
        stream = Stream()
        stream.id = self.mesh.next_id()  # type: ignore[attr-defined]
        self._streams[stream.id] = stream  # type: ignore[attr-defined]
        refusal = self.host.submit(stream.id, submit_message(list(prompt), tokens_max, **fields))  # type: ignore[attr-defined]
        if refusal is not None:
            stream(refusal)
        return stream

    def abort(self, stream: Stream) -> None:
        """The client leaves."""
        self.host.abort(stream.id)  # type: ignore[attr-defined]

    async def stop_hearing(self) -> None:
        """A network that is cut: nobody reaches it, and it hears nothing of the ledger."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.stop(0)

    async def die(self) -> None:
        """As kill -9: no word to anybody; the kernel closes what it had open."""
        await self.stop_hearing()
        await self.transport.close()
        self.mesh.wire.owners.pop(self.transport.address, None)
        self.mesh.nodes.remove(self)
        self.mesh.dead.append(self)

    async def close(self) -> None:
        """Whatever state it is in."""
        self.device.go()
        await self.stop_hearing()
        await self.destination.close()
        await asyncio.to_thread(self.engine.close)

    @property
    def held(self) -> tuple[int, ...]:
        """What is not given back: all zero in a quiet node."""
        counts = self.scheduler.counts()
        return (
            self.engine.stats.blocks_active,
            counts.sequences_running + counts.sequences_waiting,
            counts.handles_open,
            counts.sequences_importing,
            self.source.handles_open,
            self.destination.claims_open,
        )


class Mesh:
    """A ledger and nodes; closes them all."""

    def __init__(
        self,
        *,
        handle_s: float = 60,
        claim_s: float = 60,
        transfer_s: float = 60,
        answer_s: float = 60,
        prefill_blocks: int = 64,
        decode_blocks: int = 64,
    ) -> None:
        """Deadlines are far away unless a test is about them."""
        self.deadlines = {"handle_s": handle_s, "claim_s": claim_s, "transfer_s": transfer_s}
        self.host = LedgerHost(answer_s=answer_s)
        self.wire = Wire()
        self.nodes: list[Node] = []
        self.dead: list[Node] = []
        self._folder = tempfile.TemporaryDirectory(prefix="trm-")
        self.folder = self._folder.name
        self._ids = 0
        self._blocks = {"prefill": prefill_blocks, "decode": decode_blocks}

    def next_id(self) -> int:
        """Of a sequence; one line of numbers for all nodes."""
        self._ids += 1
        return self._ids

    async def __aenter__(self) -> Mesh:
        self.prefill, self.decode = await self.start("prefill"), await self.start("decode")
        return self

    async def start(self, name: str) -> Node:
        """A life of that name."""
        node = Node(self, name, blocks=self._blocks[name])
        await node.start()
        self.nodes.append(node)
        return node

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.wire.open.set()
        self.wire.connect_held.set()
        for node in (*self.nodes, *self.dead):
            for held in node.ledger.held.values():
                held.set()
            await node.close()
        self.host.close()
        self._folder.cleanup()

    # -- requests -----------------------------------------------------------------------------------------------------
    def begin(self, prompt: Sequence[int], tokens_max: int, **fields: Any) -> Relayed:
        """The source's leg."""
        handover = worker_pb2.Handover(role=PREFILL)
        return Relayed(self.prefill.submit(prompt, tokens_max, handover=handover, **fields))

    async def offer_of(self, relayed: Relayed) -> bytes:
        """When it is there."""
        await until(lambda: any(output.offer for output in relayed.source.outputs), "an offer")
        return next(output.offer for output in relayed.source.outputs if output.offer)

    async def relay(self, prompt: Sequence[int], tokens_max: int, **fields: Any) -> Relayed:
        """Both legs, as a router submits them."""
        relayed = self.begin(prompt, tokens_max, **fields)
        offer = await self.offer_of(relayed)
        relayed.destination = self.join(offer, prompt, tokens_max, **fields)
        return relayed

    def join(self, offer: bytes, prompt: Sequence[int], tokens_max: int, **fields: Any) -> Stream:
        """The destination's leg."""
        handover = worker_pb2.Handover(role=DESTINATION, offer=offer)
        return self.decode.submit(prompt, tokens_max, handover=handover, **fields)

    # -- checks -------------------------------------------------------------------------------------------------------
    async def ends(self, relayed: Relayed, within_s: float | None = None) -> None:
        """Both legs have their one terminal reply."""
        streams = [stream for stream in (relayed.source, relayed.destination) if stream is not None]
        await until(lambda: all(stream.terminals for stream in streams), "both legs end", within_s)

    async def right_or_error(self, relayed: Relayed, prompt: Sequence[int], tokens_max: int) -> bool:
        """The whole right text, or a clean error whose tokens so far are right: whether it was the text."""
        await self.ends(relayed)
        text = text_of(prompt, tokens_max)
        assert relayed.token_ids == text[: len(relayed.token_ids)], "a wrong token left"
        if relayed.finish == worker_pb2.FINISH_LENGTH:
            assert len(relayed.token_ids) == tokens_max
            return True
        assert relayed.finish in (worker_pb2.FINISH_ERROR, worker_pb2.FINISH_ABORT, worker_pb2.FINISH_REJECTED)
        return False

    async def settles(self, *nodes: Node, within_s: float | None = None) -> None:
        """No handle is open, no block held (in `nodes`, or all that live), and the books balance."""
        await until(lambda: not self.host.books.views(), f"handles end: {self.host.books.views()}", within_s)
        for node in nodes or self.nodes:
            await until(lambda node=node: not any(node.held), f"{node.name} holds nothing", within_s)
            assert not node.errors, node.errors
            node.scheduler.check()
        self.host.books.check()
