"""The decode service's side of a handover: makes room, claims, pulls KV as it is sealed, validates, adopts, goes on.

Per sequence one task: room in the engine first (a full pool keeps the request waiting, and nothing is claimed
meanwhile), then the claim, then pulls that overlap with the source's prefill; at the end the generations are read
again (law 4), the ledger is told of the adoption, and only then the engine decodes. Whatever goes wrong ends in the
same way: stop reading, wait until nothing is written here any more (law 2), then give the room back and decline.
Event loop only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import TypeVar

import grpc

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import (
    DeadlineExceeded,
    HandshakeRefused,
    InvalidRequest,
    LedgerRejected,
    TokenRelayError,
    TransferFailed,
    Unavailable,
)
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Actor, Code, Handle, HandleChanged, Ledger, Rejection, Snapshot, State
from tokenrelay.proto import peer_pb2, peer_pb2_grpc, worker_pb2
from tokenrelay.runtime.engine import Engine
from tokenrelay.runtime.handover import Handover, Room
from tokenrelay.runtime.requests import EngineOutput, EngineRequest
from tokenrelay.services.chassis.channel import decode_error, encode_error
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.chassis.wire import sequence_output
from tokenrelay.transfer.runs import Span
from tokenrelay.transfer.transport import Connection, Transport

log = get_logger("decode")
Result = TypeVar("Result")

PROGRESS_SHARE = 3  # renewals of a claim within its deadline
LAST_WORD_S = 0.2  # for the source to say why it took a handle back
ANSWER_S = 5.0  # to tell the ledger how it ended; its deadlines act if that fails


@dataclass
class Import:
    """One sequence on its way here."""

    sequence_id: int
    offer: peer_pb2.KvOffer
    deadline: Deadline
    room: asyncio.Future[Room]
    task: asyncio.Task[None] | None = None
    claiming: bool = False  # asked, and not answered: given up meanwhile, it may be claimed all the same
    claimed: bool = False
    accepted: bool = False  # by the engine: it answers
    over: bool = False  # its source has ended the request itself, or a client gave up
    remote: list[int] = field(default_factory=list)  # blocks of the source, in the order of the tokens
    generations: list[int] = field(default_factory=list)
    pulled: int = 0  # of `remote`, those here from the start included

    @property
    def handle(self) -> Handle:
        """Its name in the ledger."""
        return Handle(self.offer.number, self.offer.generation, self.offer.term)


@dataclass
class Times:
    """What handovers took, for /metrics and the benchmark."""

    imported: int = 0
    failed: int = 0
    bytes_pulled: int = 0
    after_last_s: float = 0.0  # from the source's last word to the adoption, in all


class Destination:
    """Every sequence that one engine takes over from others."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        actor: Actor,
        transports: list[Transport],
        deliver: Callable[[worker_pb2.SequenceOutput], None],
        *,
        security: Security,
        claim_deadline_s: float,
        transfer_deadline_s: float,
    ) -> None:
        self._engine = engine
        self._ledger = ledger
        self._actor = actor
        self._transports = {transport.kind: transport for transport in transports}
        self._deliver = deliver
        self._security = security
        self._claim_deadline_s = claim_deadline_s
        self._transfer_deadline_s = transfer_deadline_s
        self._imports: dict[int, Import] = {}
        self._by_handle: dict[Handle, Import] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._connections: dict[tuple[str, str], asyncio.Task[Connection]] = {}  # by kind and incarnation
        self.times = Times()

    @property
    def claims_open(self) -> int:
        """Sequences whose KV is not here yet."""
        return len(self._imports)

    # -- requests -----------------------------------------------------------------------------------------------------
    def submit(self, request: EngineRequest, offer: bytes) -> worker_pb2.SequenceOutput | None:
        """Begin; the refusal, or None."""
        try:
            named = peer_pb2.KvOffer.FromString(offer)
            if not named.address or not named.incarnation:
                raise InvalidRequest("the offer of a source is missing or cannot be read")
            request = replace(request, handover=Handover.DESTINATION)
            if named.tokens != request.token_ids.size + request.parent_tokens:
                raise InvalidRequest(
                    f"the source offers KV of {named.tokens} tokens, the request has "
                    f"{request.token_ids.size + request.parent_tokens}"
                )
            self._engine.submit(request)
        except TokenRelayError as error:
            return worker_pb2.SequenceOutput(
                id=request.sequence_id,
                finish=worker_pb2.FINISH_REJECTED,
                reject_reason=worker_pb2.REJECT_INVALID
                if isinstance(error, InvalidRequest)
                else worker_pb2.REJECT_QUEUE_FULL,
                error=encode_error(error),
            )
        except Exception as error:  # protobuf raises DecodeError, which has no common base with ours
            return worker_pb2.SequenceOutput(
                id=request.sequence_id,
                finish=worker_pb2.FINISH_REJECTED,
                reject_reason=worker_pb2.REJECT_INVALID,
                error=encode_error(InvalidRequest(f"the offer cannot be read: {error}")),
            )
        entry = Import(
            request.sequence_id, named, request.deadline, asyncio.get_running_loop().create_future(), accepted=True
        )
        self._imports[request.sequence_id] = self._by_handle[entry.handle] = entry
        entry.task = asyncio.create_task(self._run(entry), name=f"import {request.sequence_id}")
        return None

    def abort(self, sequence_id: int) -> None:
        """The client gave up."""
        self._engine.abort(sequence_id)
        self._stop(sequence_id)

    def room(self, notice: Room) -> None:
        """The engine made room."""
        entry = self._imports.get(notice.sequence_id)
        if entry is None or entry.room.done():  # it was given up just before: nobody will write there
            self._engine.handover.stopped(notice.sequence_id)
        else:
            entry.room.set_result(notice)

    def emit(self, output: EngineOutput) -> worker_pb2.SequenceOutput:
        """An output for the wire."""
        if output.finish:
            self._stop(output.sequence_id)
        return sequence_output(output)

    def _stop(self, sequence_id: int) -> None:
        entry = self._imports.get(sequence_id)
        if entry is not None and entry.task is not None and not entry.over:
            entry.over = True
            entry.task.cancel()

    # -- one import ---------------------------------------------------------------------------------------------------
    async def _run(self, entry: Import) -> None:
        """To its end, however it ends: afterwards nothing writes into its blocks."""
        first_token: int | None = None
        error: TokenRelayError | None = None
        try:
            room = await self._wait(entry, entry.room, "room in the pool")
            entry.claiming = True
            refusal = await self._ledger.claim(entry.handle, self._actor, deadline_s=self._claim_deadline_s)
            entry.claiming = False
            if refusal is not None:
                raise _refused("claimed", refusal)
            entry.claimed = True
            connection = await self._connect(entry)
            try:
                first_token = await self._pull_all(entry, room, connection)
            except TokenRelayError as failure:
                self._answer_client(entry, failure)  # it need not wait for what still writes here
                raise
            finally:
                await connection.settled()
        except (asyncio.CancelledError, _OverError):
            pass  # answered already, here or by the source
        except TokenRelayError as failure:
            error = failure
        except Exception as failure:
            log.exception("an import failed in an unforeseen way", sequence=entry.sequence_id)
            error = TransferFailed(f"an import failed: {failure!r}", reason="transport")
        await self._end(entry, first_token, error)

    async def _end(self, entry: Import, first_token: int | None, error: TokenRelayError | None) -> None:
        if first_token is not None and not entry.over:
            self.times.imported += 1
            self._engine.handover.imported(entry.sequence_id, first_token)
        else:
            self.times.failed += 1
            self._answer_client(entry, error)
            if entry.room.done() and not entry.room.cancelled():
                self._engine.handover.stopped(entry.sequence_id)
        self._imports.pop(entry.sequence_id, None)
        if (entry.claimed or entry.claiming) and first_token is None:
            refusal = await self._answer(entry)
            if refusal is not None and entry.claimed:
                log.warning("a claim could not be given back", sequence=entry.sequence_id, reason=refusal.reason)
        self._by_handle.pop(entry.handle, None)

    def _answer_client(self, entry: Import, error: TokenRelayError | None) -> None:
        """Once. The engine keeps the blocks until `stopped` says that nobody writes them."""
        if not entry.over:
            entry.over = True
            self._engine.abort(entry.sequence_id, error)

    async def _answer(self, entry: Import) -> Rejection | None:
        """Nothing is read any more: decline, which a quarantined handle takes too. The ledger's deadline acts else."""
        deadline = Deadline.after(ANSWER_S)
        while True:
            refusal = await self._ledger.decline(entry.handle, self._actor)
            if refusal is None or refusal.code is not Code.UNAVAILABLE or deadline.passed:
                return refusal
            await asyncio.sleep(0.2)

    async def _pull_all(self, entry: Import, room: Room, connection: Connection) -> int:
        """The first token, when everything is here, validated and adopted."""
        block_tokens = connection.transport.memory.layout.block_tokens
        entry.pulled = room.cached_tokens // block_tokens  # what the cache has is not pulled
        skipped = entry.pulled
        deadline = self._deadline(entry)
        renewals = asyncio.create_task(self._renew(entry))
        pulls: asyncio.Task[None] | None = None
        try:
            first_token: int | None = None
            async for progress in self._follow(entry, deadline):
                kind = progress.WhichOneof("progress")
                if kind == "extents":
                    self._note(entry, progress.extents)
                    if pulls is None or pulls.done():
                        if pulls is not None:
                            await pulls
                        pulls = asyncio.create_task(self._pull(entry, room, skipped, connection, deadline))
                elif kind == "complete":
                    first_token = progress.complete.first_token
                else:
                    self._source_ended(entry, progress.gone.error)
            last_s = time.monotonic()
            if first_token is None:
                raise Unavailable("the source ended its stream before all KV could be read")
            if pulls is not None:
                await pulls
            await self._pull(entry, room, skipped, connection, deadline)
            remote, generations = entry.remote[skipped:], entry.generations[skipped:]
            if len(remote) != len(room.blocks):
                raise TransferFailed(
                    f"the source told {len(entry.remote)} blocks, expected {skipped + len(room.blocks)}",
                    reason="corrupt",
                )
            await connection.validate(remote, generations, deadline)
            refusal = await self._ledger.adopt(entry.handle, self._actor, deadline_s=self._claim_deadline_s)
            if refusal is not None:
                raise _refused("adopted", refusal)
            self.times.after_last_s += time.monotonic() - last_s
            return first_token
        finally:
            renewals.cancel()
            if pulls is not None:
                pulls.cancel()
            await asyncio.gather(renewals, *([pulls] if pulls else []), return_exceptions=True)

    def _note(self, entry: Import, extents: peer_pb2.Extents) -> None:
        if extents.first != len(entry.remote) or len(extents.blocks) != len(extents.generations):
            raise TransferFailed("the source told its blocks out of order", reason="corrupt")
        entry.remote += extents.blocks
        entry.generations += extents.generations

    async def _pull(self, entry: Import, room: Room, skipped: int, connection: Connection, deadline: Deadline) -> None:
        """What was told and is not here, until there is nothing more."""
        layers = len(connection.transport.memory.regions)
        while entry.pulled < len(entry.remote):
            first, last = entry.pulled, len(entry.remote)
            local = room.blocks[first - skipped : last - skipped]
            if len(local) < last - first:
                raise TransferFailed("the source told more blocks than the prompt has", reason="corrupt")
            await connection.pull([Span(0, layers, entry.remote[first:last], local)], deadline)
            self.times.bytes_pulled += sum(connection.transport.memory.layout.block_bytes) * (last - first)
            entry.pulled = last

    def _source_ended(self, entry: Import, text: str) -> None:
        if text:
            raise decode_error(text)
        raise _OverError

    async def _follow(self, entry: Import, deadline: Deadline) -> AsyncIterator[peer_pb2.Progress]:
        channel = self._channels.get(entry.offer.address)
        if channel is None:
            channel = self._channels[entry.offer.address] = self._security.open_channel(entry.offer.address)
        handle = entry.handle
        request = peer_pb2.FollowHandle(
            number=handle.number,
            generation=handle.generation,
            term=handle.term,
            sequence=entry.offer.sequence,
            incarnation=entry.offer.incarnation,
            claimant=self._actor.name,
            claimant_incarnation=self._actor.incarnation,
        )
        stub = peer_pb2_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]
        call = stub.Follow(request, timeout=max(0.001, deadline.left_s()), metadata=self._security.metadata)
        try:
            async for progress in call:
                yield progress
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise DeadlineExceeded("the source's KV was not there in time") from error
            raise Unavailable(f"the source {entry.offer.owner} cannot be followed: {error.details()}") from error
        finally:
            call.cancel()

    async def _renew(self, entry: Import) -> None:
        """Tell the ledger that reading goes on, well before the claim's deadline."""
        while True:
            refusal = await self._ledger.transfer(entry.handle, self._actor, deadline_s=self._claim_deadline_s)
            if refusal is not None and refusal.code is not Code.UNAVAILABLE:
                log.warning("a claim is over", sequence=entry.sequence_id, reason=refusal.reason)
                return  # the ledger's notice ends the import
            await asyncio.sleep(self._claim_deadline_s / PROGRESS_SHARE)

    async def _connect(self, entry: Import) -> Connection:
        """To the source's incarnation, by the best kind that works between the two."""
        offer, failure = entry.offer, None
        common = [kind for kind in self._transports if kind in offer.endpoints]
        for kind in sorted(common, key=lambda kind: kind != offer.preferred):
            try:
                connecting = asyncio.shield(self._connecting(kind, offer))
                return await self._wait(entry, connecting, "a connection to the source")
            except (HandshakeRefused, TransferFailed) as error:
                log.warning("no connection by this transport", kind=kind, source=offer.owner, error=error.message)
                failure = error
        raise failure or Unavailable(
            f"no common transport: {offer.owner} has {', '.join(offer.endpoints)}, "
            f"{self._actor.name} has {', '.join(self._transports)}"
        )

    def _connecting(self, kind: str, offer: peer_pb2.KvOffer) -> asyncio.Task[Connection]:
        """Shared by all imports from that life; a broken one is replaced."""
        key = (kind, offer.incarnation)
        task = self._connections.get(key)
        if task is not None and task.done() and (task.cancelled() or task.exception() or task.result().broken):
            task = None
        if task is None:
            deadline = Deadline.after(min(self._transfer_deadline_s, self._claim_deadline_s))
            task = asyncio.create_task(self._transports[kind].connect(offer.endpoints[kind], deadline))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            self._connections[key] = task
        return task

    def _deadline(self, entry: Import) -> Deadline:
        return min(entry.deadline, Deadline.after(self._transfer_deadline_s), key=lambda d: d.at_s)

    async def _wait(self, entry: Import, awaitable: Awaitable[Result], what: str) -> Result:
        deadline = self._deadline(entry)
        try:
            return await asyncio.wait_for(awaitable, deadline.left_s())
        except TimeoutError as error:
            raise DeadlineExceeded(f"{what} was not there in time") from error

    # -- from the ledger ----------------------------------------------------------------------------------------------
    async def watch(self) -> None:
        """Follow the ledger until this life is over: a claim that is quarantined stops its import."""
        async for notice in self._ledger.watch(self._actor):
            if isinstance(notice, HandleChanged):
                self._on_state(notice.view.handle, notice.view.state)
            elif isinstance(notice, Snapshot):
                for view in notice.handles:
                    self._on_state(view.handle, view.state)

    def _on_state(self, handle: Handle, state: State) -> None:
        entry = self._by_handle.get(handle)
        if entry is None or not entry.claimed or entry.over or entry.task is None:
            return
        if state in (State.QUARANTINED, State.RECLAIMED):
            # The source says why, if it lives; until this claimant answers, the blocks stay.
            asyncio.get_running_loop().call_later(LAST_WORD_S, self._give_up, entry, "its claim is over")
        elif state in (State.FENCED, State.LOST):
            self._give_up(entry, "the source is gone" if state is State.LOST else "its claim is over")

    def _give_up(self, entry: Import, reason: str) -> None:
        if not entry.over and entry.task is not None:
            self._answer_client(entry, Unavailable(f"the transfer of the request's KV ended: {reason}"))
            entry.task.cancel()

    async def close(self) -> None:
        """Stop every import, and the connections."""
        tasks = [entry.task for entry in self._imports.values() if entry.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for channel in self._channels.values():
            await channel.close()


class _OverError(Exception):
    """The first token ended the request: its source has answered it."""


def _refused(what: str, refusal: Rejection) -> TokenRelayError:
    text = f"the request's KV cannot be {what}: {refusal.reason}"
    return Unavailable(text) if refusal.code is Code.UNAVAILABLE else LedgerRejected(text)
