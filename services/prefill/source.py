"""The prefill service's side of a handover: takes prompts in, offers their KV, and keeps it until nobody reads it.

Per sequence: reserve in the ledger, submit to the engine, offer (claimable from then on, long before the KV stands),
tell whoever follows which blocks are sealed, seal in the ledger at the first token, release after the adoption. What
the ledger says of a handle moves the same handle in the scheduler, whose pins go only where that table lets them. The
ledger decides: a handle is taken back here after the ledger agreed. Event loop only, but for the engine's callbacks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any

import grpc

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, InvalidRequest, Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import (
    Actor,
    Code,
    Duty,
    DutyDue,
    Handle,
    HandleChanged,
    HandleView,
    Ledger,
    MemberEnded,
    Notice,
    Rejection,
    Snapshot,
    State,
)
from tokenrelay.ledger.states import TERMINAL
from tokenrelay.proto import peer_pb2, worker_pb2
from tokenrelay.runtime.engine import Engine
from tokenrelay.runtime.handover import HandleEvent, Handover, Sealed
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, Finish
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.chassis.wire import sequence_output
from tokenrelay.transfer.transport import Transport

log = get_logger("prefill")

FENCE_S = 5.0  # one attempt to cut a claimant off; the ledger asks again
RETRY_S = 0.5  # between two attempts to tell a ledger that cannot be reached
FOLLOWERS_MAX = 4  # of one handle: the claimant, and what is left of connections that broke

# What the scheduler's copy of a handle goes through to get where the ledger has it; what it has behind it is refused.
_PATHS: dict[State, tuple[HandleEvent, ...]] = {
    State.OFFERED: (HandleEvent.OFFER,),
    State.CLAIMED: (HandleEvent.OFFER, HandleEvent.CLAIM),
    State.TRANSFERRING: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.TRANSFER),
    State.ADOPTED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.ADOPT),
    State.QUARANTINED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.EXPIRE),
    State.RETURNED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.DECLINE, HandleEvent.ACKNOWLEDGE),
    State.RELEASED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.ADOPT, HandleEvent.RELEASE),
    State.RECLAIMED: (HandleEvent.OFFER, HandleEvent.DECLINE, HandleEvent.RECLAIM),
    State.FENCED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.FENCE),
    State.LOST: (HandleEvent.LOSE,),
}


@dataclass
class Export:
    """One handle of this service, from its reservation to its end."""

    sequence_id: int
    handle: Handle
    blocks: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    first_token: int | None = None  # with it all blocks are there and sealed in the ledger
    gone: str | None = None  # why there will be nothing to adopt
    ended: bool = False  # the engine has answered: nothing of it is computed any more
    claimant: Actor | None = None
    offered: bool = False  # the router has the offer; what came before that waits in `held`
    held: list[worker_pb2.SequenceOutput] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    followers: int = 0

    def tell(self) -> None:
        """Wake whoever follows."""
        self.changed.set()
        self.changed = asyncio.Event()


class Source:
    """Every handle that one engine offers."""

    def __init__(
        self,
        engine: Engine,
        ledger: Ledger,
        actor: Actor,
        transports: list[Transport],
        deliver: Callable[[worker_pb2.SequenceOutput], None],
        *,
        address: str,
        handle_deadline_s: float,
    ) -> None:
        """`transports`: the preferred one first. `deliver` takes outputs that no step brought, under the host's ids."""
        self._engine = engine
        self._ledger = ledger
        self._actor = actor
        self._transports = transports
        self._deliver = deliver
        self._address = address
        self._handle_deadline_s = handle_deadline_s
        self._exports: dict[int, Export] = {}  # by sequence; until the ledger says that the handle is over
        self._by_handle: dict[Handle, Export] = {}
        self._aborted: set[int] = set()  # before they had a handle
        self._starting: set[int] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._quiet = asyncio.Event()
        self._quiet.set()
        self.counts = {"offered": 0, "adopted": 0, "taken_back": 0, "fenced": 0}

    @property
    def handles_open(self) -> int:
        """Handles that somebody may still read, or that wait to be told to the ledger."""
        return len(self._exports) + len(self._starting)

    # -- requests -----------------------------------------------------------------------------------------------------
    def submit(self, request: EngineRequest) -> None:
        """Begin; what fails is delivered as the sequence's terminal output."""
        self._starting.add(request.sequence_id)
        self._quiet.clear()
        self._spawn(self._begin(request))

    def abort(self, sequence_id: int) -> None:
        """The client gave up. The engine answers, if it has the sequence."""
        if sequence_id in self._starting:
            self._aborted.add(sequence_id)
        else:
            self._engine.abort(sequence_id)

    async def drain(self, deadline: Deadline) -> bool:
        """Wait until all offered KV was read or taken back."""
        try:
            await asyncio.wait_for(self._quiet.wait(), None if deadline.at_s == float("inf") else deadline.left_s())
        except TimeoutError:
            return False
        return True

    async def _begin(self, request: EngineRequest) -> None:
        sequence_id = request.sequence_id
        handle: Handle | Rejection
        try:
            handle = await self._ledger.reserve(self._actor, extents=1, deadline_s=self._handle_deadline_s)
        finally:
            self._starting.discard(sequence_id)
        error: TokenRelayError | None = None
        reason = worker_pb2.REJECT_QUEUE_FULL
        if isinstance(handle, Rejection):
            full = handle.code is Code.FULL
            error = (Overloaded if full else Unavailable)(f"no handle: {handle.reason}")
        elif sequence_id in self._aborted:
            self._spawn(self._told(handle))
            self._deliver(worker_pb2.SequenceOutput(id=sequence_id, finish=worker_pb2.FINISH_ABORT))
        else:
            export = Export(sequence_id, handle)
            self._exports[sequence_id] = self._by_handle[handle] = export
            try:
                self._engine.submit(request)
            except TokenRelayError as failure:
                error = failure
                reason = (
                    worker_pb2.REJECT_INVALID if isinstance(error, InvalidRequest) else worker_pb2.REJECT_QUEUE_FULL
                )
                self._spawn(self._take_back(export, encode_error(failure)))
            else:
                await self._offer(export, request)
        self._aborted.discard(sequence_id)
        if error is not None:
            self._deliver(
                worker_pb2.SequenceOutput(
                    id=sequence_id,
                    finish=worker_pb2.FINISH_REJECTED,
                    reject_reason=reason,
                    error=encode_error(error),
                )
            )
        self._forget_if_quiet()

    async def _told(self, handle: Handle) -> None:
        await self._ledger.reclaim(handle, self._actor)

    async def _offer(self, export: Export, request: EngineRequest) -> None:
        handle = export.handle
        refusal = await self._ledger.offer(handle, self._actor)
        if refusal is not None:
            self._tell_router(export)
            self._engine.abort(export.sequence_id, Unavailable(f"the handle cannot be offered: {refusal.reason}"))
            return
        self._mirror(export, State.OFFERED)
        self.counts["offered"] += 1
        offer = peer_pb2.KvOffer(
            number=handle.number,
            generation=handle.generation,
            term=handle.term,
            sequence=export.sequence_id,
            owner=self._actor.name,
            incarnation=self._actor.incarnation,
            address=self._address,
            endpoints={transport.kind: transport.endpoint() for transport in self._transports},
            preferred=self._transports[0].kind,
            tokens=request.token_ids.size + request.parent_tokens,
        )
        self._tell_router(export, worker_pb2.SequenceOutput(id=export.sequence_id, offer=offer.SerializeToString()))

    def _tell_router(self, export: Export, *first: worker_pb2.SequenceOutput) -> None:
        """The offer, then what the engine was faster with."""
        export.offered = True
        for output in (*first, *export.held):
            self._deliver(output)
        export.held.clear()

    # -- from the engine ----------------------------------------------------------------------------------------------
    def sealed(self, notice: Sealed) -> None:
        """Some more blocks can be read."""
        export = self._exports.get(notice.sequence_id)
        if export is None or notice.first != len(export.blocks):
            return  # it is over
        export.blocks += notice.blocks
        export.generations += notice.generations
        export.tell()

    def emit(self, output: EngineOutput) -> worker_pb2.SequenceOutput | None:
        """An output for the wire, or None while the offer is not out; the last one decides on the handle."""
        export = self._exports.get(output.sequence_id)
        if export is not None and output.finish:
            export.ended = True
            if output.finish == Finish.HANDOVER:
                self._spawn(self._complete(export, output.token_ids[-1]))
            else:
                over = output.finish in (Finish.STOP, Finish.LENGTH)
                error = output.error or Unavailable("the source's request was aborted")
                self._spawn(self._take_back(export, "" if over else encode_error(error)))
        message = sequence_output(output)
        if export is None or export.offered:
            return message
        export.held.append(message)
        return None

    async def _complete(self, export: Export, first_token: int) -> None:
        """All extents are sealed in the ledger first: only then can they be adopted."""
        refusal = await self._insist(lambda: self._ledger.seal(export.handle, self._actor, extents=1))
        if refusal is not None:
            await self._take_back(export, encode_error(Unavailable(f"the handle cannot be sealed: {refusal.reason}")))
            return
        export.first_token = first_token
        export.tell()

    async def _take_back(self, export: Export, reason: str) -> None:
        """Nothing will be adopted: reclaim, or where somebody may be reading ask the ledger to tell him to stop."""
        export.gone = reason
        export.tell()
        self.counts["taken_back"] += 1
        refusal = await self._insist(lambda: self._ledger.reclaim(export.handle, self._actor))
        if refusal is None:
            self._over(export, State.RECLAIMED)
        else:  # it was claimed: the claimant acknowledges, or the ledger asks for a fence
            await self._insist(lambda: self._ledger.quarantine(export.handle, self._actor))

    # -- from the ledger ----------------------------------------------------------------------------------------------
    async def watch(self) -> None:
        """Follow the ledger until this life is over."""
        async for notice in self._ledger.watch(self._actor):
            self._on_notice(notice)

    def _on_notice(self, notice: Notice) -> None:
        match notice:
            case HandleChanged(view):
                self._on_view(view)
            case Snapshot(_, members, handles):
                known = {view.handle for view in handles}
                alive = {member.actor for member in members}
                for view in handles:
                    self._on_view(view)
                for handle, export in list(self._by_handle.items()):
                    if handle not in known:
                        self._spawn(self._cut_off(export, alive))
            case DutyDue(handle, duty):
                late = self._by_handle.get(handle)
                self._spawn(self._end_unknown(handle, duty) if late is None else self._act(late, duty))
            case MemberEnded(actor, reason):
                log.info("a member ended", member=actor.name, reason=reason)
            case _:
                pass

    def _on_view(self, view: HandleView) -> None:
        export = self._by_handle.get(view.handle)
        if export is None or (view.owner is not None and view.owner != self._actor):
            return
        export.claimant = view.claimant or export.claimant
        self._mirror(export, view.state)
        if view.state is State.ADOPTED:
            self._spawn(self._release(export))
        elif view.state is State.RETURNED:
            self._spawn(self._give_up(export))
        elif view.state is State.FENCED:
            self._spawn(self._fence(export))
        elif view.state in (State.RELEASED, State.RECLAIMED, State.LOST):
            self._over(export, view.state)

    async def _release(self, export: Export) -> None:
        if await self._insist(lambda: self._ledger.release(export.handle, self._actor)) is None:
            self.counts["adopted"] += 1
            self._over(export, State.RELEASED)

    async def _give_up(self, export: Export) -> None:
        """The claimant reads no more and adopted nothing."""
        if not export.ended:
            self._engine.abort(export.sequence_id, Unavailable("the destination declined the request's KV"))
        if await self._insist(lambda: self._ledger.reclaim(export.handle, self._actor)) is None:
            self._over(export, State.RECLAIMED)

    async def _act(self, export: Export, duty: Duty) -> None:
        """A handle is past its deadline, and it is this owner's turn (law 3)."""
        log.warning("a handle is past its deadline", sequence=export.sequence_id, duty=duty.value)
        if not export.ended and duty is not Duty.RELEASE:
            self._engine.abort(export.sequence_id, DeadlineExceeded("its KV was not taken in time"))
        if duty is Duty.FENCE:
            await self._fence(export)
        elif duty is Duty.RELEASE:
            await self._release(export)
        elif duty is Duty.RECLAIM:
            await self._take_back(export, encode_error(DeadlineExceeded("nobody took the KV in time")))

    async def _fence(self, export: Export) -> None:
        """Cut the claimant off from the pool; only when that is proven do the blocks go back (law 2)."""
        if export.claimant is None:
            return
        if not await self._cut(export.claimant):
            return  # the ledger asks again
        self.counts["fenced"] += 1
        refusal = await self._ledger.fence(export.handle, self._actor)
        gone = refusal is None or refusal.code in (Code.UNKNOWN_HANDLE, Code.STALE_GENERATION)
        if not gone and refusal is not None and refusal.code is Code.WRONG_STATE:
            view = await self._ledger.view(export.handle)  # the claimant may have answered meanwhile: that goes on
            gone = isinstance(view, HandleView) and view.state in TERMINAL
        if gone:
            self._over(export, State.FENCED)

    async def _end_unknown(self, handle: Handle, duty: Duty) -> None:
        """The ledger asks for a handle of this life that is not known here (any more): no block hangs on it."""
        log.warning("an unknown handle is past its deadline", handle=handle, duty=duty.value)
        if duty is Duty.RECLAIM:
            await self._ledger.reclaim(handle, self._actor)
        elif duty is Duty.RELEASE:
            await self._ledger.release(handle, self._actor)
        else:
            view = await self._ledger.view(handle)
            if isinstance(view, HandleView) and view.claimant is not None and await self._cut(view.claimant):
                await self._ledger.fence(handle, self._actor)

    async def _cut(self, claimant: Actor) -> bool:
        try:
            for transport in self._transports:
                proof = await transport.fence(claimant.incarnation, Deadline.after(FENCE_S), kill=True)
                log.warning("a claimant was cut off", claimant=claimant.name, kind=transport.kind, proof=proof.value)
        except TokenRelayError as error:
            log.error("a claimant could not be cut off", claimant=claimant.name, error=str(error))
            return False
        return True

    async def _cut_off(self, export: Export, alive: set[Actor]) -> None:
        """A ledger that does not know the handle says nothing of who may read it."""
        if export.sequence_id not in self._exports:
            return
        if export.claimant is not None and not await self._cut(export.claimant):
            return
        if not export.ended:
            self._engine.abort(export.sequence_id, Unavailable("the ledger lost the request's handle"))
        self._over(export, State.FENCED if export.claimant is not None else State.RECLAIMED)

    def _mirror(self, export: Export, state: State) -> None:
        if (path := _PATHS.get(state)) is not None:
            self._engine.handover.move(export.sequence_id, *path)

    def _over(self, export: Export, state: State) -> None:
        """The handle is at its end, in the ledger; the scheduler gives its pins back."""
        if self._exports.pop(export.sequence_id, None) is None:
            return
        del self._by_handle[export.handle]
        self._mirror(export, state)
        if export.gone is None and export.first_token is None:
            export.gone = encode_error(Unavailable("the handle is over"))
        export.tell()
        self._forget_if_quiet()

    def _forget_if_quiet(self) -> None:
        if not self._exports and not self._starting:
            self._quiet.set()

    async def _insist(self, call: Callable[[], Coroutine[Any, Any, Rejection | None]]) -> Rejection | None:
        """Until somebody decided, within the handle's deadline."""
        deadline = Deadline.after(self._handle_deadline_s)
        for pause_s in itertools.chain((0.05, 0.1, 0.2), itertools.repeat(RETRY_S)):
            refusal = await call()
            if refusal is None or refusal.code is not Code.UNAVAILABLE or deadline.passed:
                return refusal
            await asyncio.sleep(pause_s)
        raise AssertionError("unreachable: the pauses do not end")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the source's work failed", error=repr(error))

    # -- Peer ---------------------------------------------------------------------------------------------------------
    async def Follow(
        self, request: peer_pb2.FollowHandle, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[peer_pb2.Progress]:
        """See peer.proto. An unknown handle, or one of another life, is NOT_FOUND."""
        export = self._by_handle.get(Handle(request.number, request.generation, request.term))
        if (
            export is None
            or request.incarnation != self._actor.incarnation
            or export.sequence_id != request.sequence
            or export.followers >= FOLLOWERS_MAX
        ):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such handle is offered here")
        assert export is not None
        export.followers += 1
        try:
            async for progress in self._progress(export):
                yield progress
        finally:
            export.followers -= 1

    async def _progress(self, export: Export) -> AsyncIterator[peer_pb2.Progress]:
        told = 0
        while True:
            changed = export.changed
            if told < len(export.blocks):
                extents = peer_pb2.Extents(
                    first=told, blocks=export.blocks[told:], generations=export.generations[told:]
                )
                told = len(export.blocks)
                yield peer_pb2.Progress(extents=extents)
            elif export.gone is not None:
                yield peer_pb2.Progress(gone=peer_pb2.Gone(error=export.gone))
                return
            elif export.first_token is not None:
                yield peer_pb2.Progress(complete=peer_pb2.Complete(first_token=export.first_token))
                return
            else:
                await changed.wait()


def as_source(request: EngineRequest) -> EngineRequest:
    """The same request, to be handed over."""
    return replace(request, handover=Handover.SOURCE)
