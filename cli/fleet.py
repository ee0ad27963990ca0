"""A worker in a fleet: one engine that can be a source and a destination of handovers, a member at the kvstore.

    tokenrelay prefill --socket /run/tokenrelay/p0.sock --kvstore unix:/run/tokenrelay/kvstore.sock

Its role (`prefill` or `decode`) is what it tells the fleet; the engine underneath knows none. A request that comes
without a handover runs here from its first to its last token, which is what a router falls back to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import InvalidRequest, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.cli.colocated import EngineLink, Posts, explain, stats_message
from tokenrelay.cli.fleet_config import FleetConfig
from tokenrelay.cli.fleet_tier import FleetTier
from tokenrelay.cli.fleet_transports import open_transports
from tokenrelay.ledger.api import PROTOCOL, Member
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.directory import CacheEvent
from tokenrelay.ledger.feed import DirectoryFeed
from tokenrelay.ledger.membership import Membership
from tokenrelay.libscheduler import Handover
from tokenrelay.proto import peer_pb2_grpc, worker_pb2, worker_pb2_grpc
from tokenrelay.runtime.handover import HandoverNotice, PoolMemory, Sealed
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.chassis.lifecycle import Lifecycle, State
from tokenrelay.services.chassis.metrics import Page
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.chassis.server import GrpcServer
from tokenrelay.services.chassis.session import WorkerServicer
from tokenrelay.services.decode.destination import Destination
from tokenrelay.services.prefill.convert import engine_request
from tokenrelay.services.prefill.source import Source, as_source
from tokenrelay.transfer.memory import Layout, Memory, SharedPool
from tokenrelay.transfer.transport import Identity, Transport

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from tokenrelay.runtime.engine import Engine
    from tokenrelay.runtime.models.decoder import Model
    from tokenrelay.runtime.requests import EngineRequest
    from tokenrelay.runtime.spmd.ranks import LeadingModel

log = get_logger("fleet")


class SharedMemory:
    """Allocates the engine's pool where peers can read it, and describes it to transports."""

    def __init__(self) -> None:
        self.pool: SharedPool | None = None

    def allocate(self, block_bytes: Sequence[int], blocks: int) -> PoolMemory:
        """For build_engine. Raises ConfigError when there is no room."""
        import ctypes

        import numpy as np

        self.pool = SharedPool(block_bytes, blocks)
        self._block_bytes = tuple(block_bytes)
        layout = Layout(model_identity=b"", dtype="", block_tokens=0, layout="", block_bytes=self._block_bytes)
        address = self.pool.memory(layout).generations
        words: npt.NDArray[np.uint64] = np.ctypeslib.as_array((ctypes.c_uint64 * blocks).from_address(address))
        return PoolMemory(self.pool.layers, words)

    def layout(self, member: Member) -> Layout:
        """What peers compare, in the member's words."""
        return Layout(
            model_identity=member.model_identity,
            dtype=member.dtype,
            block_tokens=member.block_tokens,
            layout=member.layout,
            block_bytes=self._block_bytes,
            parallel_width=member.width,
        )


class FleetHost:
    """Implements chassis.session.WorkerHost: sequences with and without a handover, on one engine."""

    def __init__(
        self, engine: Engine, handshake: worker_pb2.HandshakeReply, source: Source, destination: Destination
    ) -> None:
        self._engine = engine
        self._handshake = handshake
        self.source = source
        self.destination = destination
        self.tier: FleetTier | None = None
        self._roles: dict[int, Handover] = {}  # of open sequences that are handed over
        self._deliver: Callable[[list[worker_pb2.SequenceOutput], worker_pb2.Stats], None] | None = None

    def bind(self, servicer: WorkerServicer) -> None:
        """Where outputs go."""
        self._deliver = servicer.deliver

    def handshake(self) -> worker_pb2.HandshakeReply:
        """Who this worker is."""
        return self._handshake

    def stats(self) -> worker_pb2.Stats:
        """Counters as of the last step."""
        return stats_message(self._engine.stats)

    async def explain(self, request_id: str) -> worker_pb2.ExplainReply:
        """What the scheduler says about the open sequences of a request, or about all. Raises TokenRelayError."""
        return await explain(self._engine, request_id)

    def submit(self, sequence_id: int, submit: worker_pb2.Submit) -> worker_pb2.SequenceOutput | None:
        """Begin a sequence as what its message says it is here."""
        deadline = Deadline.after(submit.deadline_left_ms / 1000) if submit.deadline_left_ms else Deadline.never()
        role = submit.handover.role
        try:
            request = engine_request(sequence_id, submit, tuple(self._handshake.eos_token_ids), deadline)
            if role == worker_pb2.Handover.ROLE_DESTINATION:
                refusal = self.destination.submit(request, submit.handover.offer)
                if refusal is None:
                    self._roles[sequence_id] = Handover.DESTINATION
                return refusal
        except TokenRelayError as error:
            return _refusal(sequence_id, error)
        if self.tier is not None and self.tier.reader.wants(request):
            self.tier.begin(request, lambda: self._start(request, role))
            return None
        return self._start(request, role)

    def _start(self, request: EngineRequest, role: int) -> worker_pb2.SequenceOutput | None:
        """Begin one that has its prompt computed here."""
        try:
            if role == worker_pb2.Handover.ROLE_SOURCE:
                self._roles[request.sequence_id] = Handover.SOURCE
                self.source.submit(as_source(request))
            else:
                self._engine.submit(request)
        except TokenRelayError as error:
            return _refusal(request.sequence_id, error)
        return None

    def abort(self, sequence_id: int) -> None:
        """End a sequence; its terminal output follows. One that has ended takes its offer back."""
        role = self._roles.get(sequence_id)
        if self.tier is not None and self.tier.abort(sequence_id):
            return
        if role == Handover.SOURCE:
            self.source.abort(sequence_id)
        elif role == Handover.DESTINATION:
            self.destination.abort(sequence_id)
        else:
            self._engine.abort(sequence_id)
            self.source.withdraw(sequence_id)

    # -- from the engine, and from the roles --------------------------------------------------------------------------
    def take(self, posts: Posts) -> None:
        """Outputs of the steps since the last call."""
        assert self._deliver is not None
        for outputs, stats in posts:
            messages = []
            for output in outputs:
                if self.tier is not None and self.tier.reader.emit(output):
                    continue
                role = self._roles.get(output.sequence_id, Handover.NONE)
                if output.finish:
                    self._roles.pop(output.sequence_id, None)
                taker = self.destination if role == Handover.DESTINATION else self.source
                if (message := taker.emit(output)) is not None:
                    messages.append(message)
            self._deliver(messages, stats_message(stats))

    def deliver_one(self, output: worker_pb2.SequenceOutput) -> None:
        """What no step brought: an offer, a refusal."""
        assert self._deliver is not None
        if output.finish:
            self._roles.pop(output.id, None)
        self._deliver([output], self.stats())

    def notices(self, notices: list[HandoverNotice]) -> None:
        """What became readable, and where there is room."""
        for notice in notices:
            if isinstance(notice, Sealed):
                self.source.sealed(notice)
            elif self.tier is None or not self.tier.reader.room(notice):
                self.destination.room(notice)


def _refusal(sequence_id: int, error: TokenRelayError) -> worker_pb2.SequenceOutput:
    invalid = isinstance(error, InvalidRequest)
    return worker_pb2.SequenceOutput(
        id=sequence_id,
        finish=worker_pb2.FINISH_REJECTED,
        reject_reason=worker_pb2.REJECT_INVALID if invalid else worker_pb2.REJECT_QUEUE_FULL,
        error=encode_error(error),
    )


class FleetWorker:
    """A worker process's parts, put together once the model is loaded."""

    def __init__(self, config: FleetConfig, security: Security, lifecycle: Lifecycle, address: str) -> None:
        self._config = config
        self._security = security
        self._lifecycle = lifecycle
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._tasks: list[asyncio.Task[None]] = []
        self.memory = SharedMemory()
        self.transports: list[Transport] = []
        self.link = EngineLink(self._loop, lifecycle.fail)
        self.client = KvstoreClient(config.kvstore, open_channel=security.open_channel, metadata=security.metadata)

    def on_handover(self, notices: list[HandoverNotice]) -> None:
        """Engine's thread."""
        self._loop.call_soon_threadsafe(self._take_notices, notices)

    def _take_notices(self, notices: list[HandoverNotice]) -> None:
        self.host.notices(notices)

    async def join(self, model: Model | LeadingModel, handshake: worker_pb2.HandshakeReply) -> bytes:
        """Become a member; the fleet's key of block hashes. Raises HandshakeRefused, Unavailable."""
        self.member = Member(
            name=self._config.name or f"{self._config.role}@{self._address}",
            incarnation=handshake.incarnation,
            role=self._config.role,
            address=self._address,
            model_identity=model.config.identity,
            dtype=handshake.dtype,
            block_tokens=handshake.block_tokens,
            layout=model.config.kv_words,
            protocol=PROTOCOL,
        )
        self.client.start()
        self.membership = Membership(
            self.client, self.member, lease_s=self._config.lease_s, on_ended=self._life_is_over
        )
        joined = await self.membership.begin(self._config.join_s)
        return joined.hash_key

    def _life_is_over(self, reason: str) -> None:
        """Peers were told that this life is dead: it must not write on as if it was not."""
        self._lifecycle.fail(Unavailable(f"the fleet has ended this worker's life: {reason}"))

    async def mount(self, engine: Engine, handshake: worker_pb2.HandshakeReply) -> FleetHost:
        """Transports, roles, what follows the ledger."""
        identity = Identity(self.member.name, self.member.incarnation)
        assert self.memory.pool is not None
        memory = self.memory.pool.memory(self.memory.layout(self.member))
        self.transports += await open_transports(self._config, self._address, identity, memory, self._security)
        source = Source(
            engine,
            self.client,
            self.member.actor,
            self.transports,
            lambda output: self.host.deliver_one(output),
            address=self._address,
            handle_deadline_s=self._config.handle_deadline_s,
            ledger_wait_s=self._config.ledger_wait_s,
            on_life_over=self._life_is_over,
        )
        destination = Destination(
            engine,
            self.client,
            self.member.actor,
            self.transports,
            lambda output: self.host.deliver_one(output),
            security=self._security,
            claim_deadline_s=self._config.read_deadline_s,
            transfer_deadline_s=self._config.transfer_deadline_s,
        )
        self.host = FleetHost(engine, handshake, source, destination)
        self.feed = DirectoryFeed(self.client, self.member.actor)
        self.client.on_renewed.append(self.feed.renew)
        if self._config.block_tier:
            self.host.tier = self._open_tier(engine, memory)
        self.link.bind(self.host.take, self._publish)
        self.feed.start()
        for work in (source.watch(), destination.watch()):
            self._tasks.append(asyncio.create_task(work))
        return self.host

    def _open_tier(self, engine: Engine, memory: Memory) -> FleetTier:
        assert self.memory.pool is not None and self.membership.joined is not None
        tier = FleetTier(
            engine,
            self.memory.pool,
            memory,
            self.client,
            self.feed,
            self.member,
            self._security,
            hash_key=self.membership.joined.hash_key,
            tokens_min=self._config.block_tier_tokens_min,
            deliver=lambda output: self.host.deliver_one(output),
        )
        tier.writer.start()
        return tier

    def _publish(self, events: list[CacheEvent]) -> None:
        self.feed.publish(events)
        if self.host.tier is not None:
            self.host.tier.writer.publish(events)

    def server(self, servicer: WorkerServicer) -> GrpcServer:
        """Serves routers and peers at one address."""

        def register(server: object) -> None:
            worker_pb2_grpc.add_WorkerServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
            peer_pb2_grpc.add_PeerServicer_to_server(self.host.source, server)  # type: ignore[no-untyped-call]

        return GrpcServer(register, self._config.listen or self._address, security=self._security)

    async def drain(self, deadline: Deadline) -> bool:
        """After the requests: until all offered KV has been read or taken back."""
        return await self.host.source.drain(deadline)

    async def leave(self) -> None:
        """End this life in good order. The engine is still there: transfers stop before its memory goes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.host.tier is not None:
            await self.host.tier.close()
        await self.host.source.close()
        await self.host.destination.close()
        await self.membership.leave()
        for transport in self.transports:
            await transport.close()
        await self.feed.stop()
        await self.client.close()

    def ready(self) -> tuple[bool, str]:
        """For /ready."""
        if self._lifecycle.state is State.DRAINING:
            return False, "draining"
        return (False, "the lease at the kvstore may be over") if self.membership.lapsed else (True, "")

    def page(self) -> str:
        """For /metrics."""
        page, host = Page(), self.host
        stats, times = host.stats(), host.destination.times
        for name in ("blocks_free", "blocks_cached", "blocks_active", "sequences_waiting", "sequences_running"):
            page.add(f"worker_{name}", "gauge", name.replace("_", " "), {"": getattr(stats, name)})
        page.add("handles_open", "gauge", "KV handles of this worker that are not over", {"": host.source.handles_open})
        page.add("claims_open", "gauge", "sequences whose KV is on its way here", {"": host.destination.claims_open})
        counts = {f'end="{name}"': float(count) for name, count in host.source.counts.items()}
        page.add("handles_total", "counter", "KV handles, by what happened", counts)
        ends = {'end="imported"': float(times.imported), 'end="failed"': float(times.failed)}
        page.add("imports_total", "counter", "sequences taken over, by how it ended", ends)
        page.add("imported_bytes_total", "counter", "KV pulled", {"": times.bytes_pulled})
        page.add("import_exposed_seconds_total", "counter", "not overlapped with prefill", {"": times.after_last_s})
        if host.tier is not None:
            host.tier.add_metrics(page)
        return page.text()
