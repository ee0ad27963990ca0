"""The prefill service's side of a handover: takes prompts in, offers their KV, and keeps it until nobody reads it.

Per sequence: reserve in the ledger, submit to the engine, offer (claimable from then on, long before the KV stands),
tell whoever follows which blocks are sealed, seal in the ledger at the first token, release after the adoption. What
the ledger says of a handle moves the same handle in the scheduler, whose pins go only where that table lets them. The
ledger decides: a handle is taken back here after the ledger agreed, and after everybody who was told of its blocks has
answered or is cut off (fences.py). Event loop only, but for the engine's callbacks.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
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
    MemberJoined,
    Notice,
    Rejection,
    Snapshot,
    State,
)
from tokenrelay.proto import peer_pb2, worker_pb2
from tokenrelay.runtime.engine import Engine
from tokenrelay.runtime.handover import Handover, Sealed
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, Finish
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.chassis.wire import sequence_output
from tokenrelay.services.prefill.export import ANSWERED, ENDS, FORGOTTEN, PATHS, Export
from tokenrelay.services.prefill.fences import Fences
from tokenrelay.transfer.transport import Transport

log = get_logger("prefill")

RETRY_S = 0.5  # between two attempts to tell a ledger that cannot be reached
FOLLOWERS_MAX = 4  # of one handle: the claimant, and what is left of connections that broke


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
        ledger_wait_s: float,
        on_life_over: Callable[[str], None],
    ) -> None:
        """`transports`: the preferred one first. `deliver` takes outputs that no step brought, under the host's ids.

        `on_life_over(reason)`: the ledger has ended this life. Nothing is given back any more; the process ends.
        """
        self._engine = engine
        self._ledger = ledger
        self._actor = actor
        self._transports = transports
        self._deliver = deliver
        self._address = address
        self._handle_deadline_s = handle_deadline_s
        self._ledger_wait_s = ledger_wait_s
        self._on_life_over = on_life_over
        self._life_over = False
        self._fences = Fences(transports)
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
            if sequence_id in self._exports:
                self._exports[sequence_id].unwanted = True
            self._engine.abort(sequence_id)

    def withdraw(self, sequence_id: int) -> None:
        """Its destination ended before it had the KV: it need not wait for its deadline. No effect on what is over."""
        export = self._exports.get(sequence_id)
        if export is not None and export.ended and export.gone is None and not export.closed:
            self._spawn(self._take_back(export, encode_error(Unavailable("the request ended at its destination"))))

    async def drain(self, deadline: Deadline) -> bool:
        """Wait until all offered KV was read or taken back."""
        try:
            await asyncio.wait_for(self._quiet.wait(), None if deadline.at_s == float("inf") else deadline.left_s())
        except TimeoutError:
            return False
        return True

    async def close(self) -> None:
        """Cut nobody off any more: this process ends."""
        await self._fences.close()

    async def _begin(self, request: EngineRequest) -> None:
        sequence_id = request.sequence_id
        handle: Handle | Rejection
        try:
            handle = await self._ledger.reserve(self._actor, extents=1, deadline_s=self._handle_deadline_s)
        except Exception as failure:
            log.exception("no handle, in an unforeseen way", sequence=sequence_id)
            handle = Rejection(Code.UNAVAILABLE, f"the ledger failed: {failure!r}")
        finally:
            self._starting.discard(sequence_id)
        error: TokenRelayError | None = None
        reason = worker_pb2.REJECT_QUEUE_FULL
        if isinstance(handle, Rejection):
            full = handle.code is Code.FULL
            error = (Overloaded if full else Unavailable)(f"no handle: {handle.reason}")
        elif sequence_id in self._aborted:
            self._spawn(self._end_unknown(handle, Duty.RECLAIM))
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

    async def _offer(self, export: Export, request: EngineRequest) -> None:
        handle = export.handle
        refusal = await self._ledger.offer(handle, self._actor)
        if refusal is not None:
            self._tell_router(export)
            self._engine.abort(export.sequence_id, Unavailable(f"the handle cannot be offered: {refusal.reason}"))
            return
        if export.state is State.RESERVED:
            export.state = State.OFFERED
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
            if output.finish == Finish.HANDOVER and not export.unwanted:
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
        refusal = await self._insist(
            lambda: self._ledger.seal(export.handle, self._actor, extents=1), self._ledger_wait_s
        )  # its client waits meanwhile
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
            await self._finish(export, State.RECLAIMED)
        elif refusal.code in FORGOTTEN:
            await self._cut_off(export)
        else:  # it was claimed: the claimant acknowledges, or the ledger asks for a fence
            refusal = await self._insist(lambda: self._ledger.quarantine(export.handle, self._actor))
            if refusal is not None:
                await self._look(export, refusal)

    # -- from the ledger ----------------------------------------------------------------------------------------------
    async def watch(self) -> None:
        """Follow the ledger until this life is over."""
        async for notice in self._ledger.watch(self._actor):
            self._on_notice(notice)
        self._end_life("the ledger tells it nothing more")

    def _on_notice(self, notice: Notice) -> None:
        match notice:
            case HandleChanged(view):
                self._on_view(view)
            case Snapshot(_, members, handles):
                known = {view.handle for view in handles}
                told = {reader for export in self._exports.values() for reader in export.readers}
                self._fences.only((member.actor for member in members if member.actor != self._actor), told)
                for view in handles:
                    self._on_view(view)
                for handle, export in list(self._by_handle.items()):
                    if handle not in known:
                        self._spawn(self._cut_off(export))
            case DutyDue(handle, duty):
                late = self._by_handle.get(handle)
                self._spawn(self._act(late, duty) if late is not None else self._end_unknown(handle, duty))
            case MemberJoined(member):
                self._fences.joined(member.actor)
            case MemberEnded(actor, reason):
                if actor == self._actor:
                    self._end_life(reason)
                else:
                    log.info("a member ended", member=actor.name, reason=reason)
                    self._fences.ended(actor)
            case _:
                pass

    def _on_view(self, view: HandleView) -> None:
        export = self._by_handle.get(view.handle)
        if view.owner is not None and view.owner != self._actor:
            return
        if export is None:
            if view.owner is not None and not self._starting:  # else it may be the answer that is on its way
                self._spawn(self._end_unknown(view.handle, None))
            return
        if view.state is State.LOST:
            self._end_life("its handles are lost")
            return
        export.state = view.state
        export.claimant = view.claimant or export.claimant
        if view.claimant is not None and view.state not in (*ANSWERED, State.RELEASED):
            export.readers.add(view.claimant)
        if view.state in ENDS:
            self._spawn(self._finish(export, view.state))
            return
        self._mirror(export, view.state)
        if view.state in ANSWERED:
            self._answered(export)
            self._spawn(self._release(export) if view.state is State.ADOPTED else self._give_up(export))

    def _answered(self, export: Export) -> None:
        """The claimant reads no more (who declined is not named any more: it is the one that had claimed). Whoever else
        was told of the blocks, for whatever reason, did not say so.
        """
        export.close()
        if export.claimant is not None:
            export.readers.discard(export.claimant)

    async def _release(self, export: Export) -> None:
        refusal = await self._insist(lambda: self._ledger.release(export.handle, self._actor))
        if refusal is None:
            self.counts["adopted"] += 1
            await self._finish(export, State.RELEASED)
        else:
            await self._look(export, refusal)

    async def _give_up(self, export: Export) -> None:
        """The claimant reads no more and adopted nothing."""
        if not export.ended:
            self._engine.abort(export.sequence_id, Unavailable("the destination declined the request's KV"))
        refusal = await self._insist(lambda: self._ledger.reclaim(export.handle, self._actor))
        if refusal is None:
            await self._finish(export, State.RECLAIMED)
        else:
            await self._look(export, refusal)

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
        """Cut off whoever may read; only when that is proven does the ledger hear of it (law 2)."""
        if not export.readers:  # the notice of the claim is still on its way, or was lost
            view = await self._ledger.view(export.handle)
            if isinstance(view, HandleView) and view.claimant is not None:
                export.readers.add(view.claimant)
        export.close()
        for reader in list(export.readers):
            if not await self._fences.cut(reader):
                return  # the ledger asks again
        refusal = await self._insist(lambda: self._ledger.fence(export.handle, self._actor))
        if refusal is None:
            self.counts["fenced"] += 1
            await self._finish(export, State.FENCED)
        else:
            await self._look(export, refusal)

    async def _look(self, export: Export, refusal: Rejection) -> None:
        """The ledger has the handle elsewhere than this service thought."""
        if refusal.code in FORGOTTEN:
            await self._cut_off(export)
        elif refusal.code is Code.STALE_INCARNATION:
            self._end_life(refusal.reason)
        elif refusal.code is Code.WRONG_STATE and not export.ending:
            view = await self._ledger.view(export.handle)
            if isinstance(view, HandleView) and view.state is not export.state:
                self._on_view(view)

    async def _cut_off(self, export: Export) -> None:
        """A ledger that does not know the handle says nothing of who may read it: everybody who was told."""
        if not export.ended:
            self._engine.abort(export.sequence_id, Unavailable("the ledger lost the request's handle"))
        ends = {State.ADOPTED: State.RELEASED, State.RETURNED: State.RECLAIMED, State.RESERVED: State.RECLAIMED}
        await self._finish(export, ends.get(export.state, State.FENCED))

    async def _end_unknown(self, handle: Handle, duty: Duty | None) -> None:
        """A handle of this life that nothing here belongs to: it is ended (rule 6 of the owner)."""
        view = await self._ledger.view(handle)
        if isinstance(view, Rejection) or view.owner != self._actor or handle in self._by_handle:
            return
        log.warning("a handle that nothing here belongs to", handle=handle, state=view.state.value)
        if view.state is State.ADOPTED:
            await self._insist(lambda: self._ledger.release(handle, self._actor))
        elif view.state in (State.CLAIMED, State.TRANSFERRING):
            await self._insist(lambda: self._ledger.quarantine(handle, self._actor))
        elif view.state is not State.QUARANTINED:
            await self._insist(lambda: self._ledger.reclaim(handle, self._actor))
        elif duty is Duty.FENCE and (view.claimant is None or await self._fences.cut(view.claimant)):
            await self._insist(lambda: self._ledger.fence(handle, self._actor))

    def _mirror(self, export: Export, state: State) -> None:
        def moved(refusal: str | None) -> None:
            if refusal is not None and state in ENDS:
                log.error("the scheduler keeps a handle's pins", sequence=export.sequence_id, refusal=refusal)

        if (path := PATHS.get(state)) is not None:
            self._engine.handover.move(export.sequence_id, *path, then=moved)

    async def _finish(self, export: Export, state: State) -> None:
        """The handle is at its end in the ledger; its pins go back when nobody reads any more, and not before.

        Who answered is no reader any more. Everybody else that was told of these blocks is cut off, and a life that
        was declared over has been when this returns.
        """
        if export.ending or self._life_over:
            return
        export.ending = True
        export.close()
        for reader in list(export.readers):
            await self._fences.exclude(reader)
        if self._life_over:
            return
        self._mirror(export, state)
        del self._exports[export.sequence_id], self._by_handle[export.handle]
        self._forget_if_quiet()

    def _end_life(self, reason: str) -> None:
        """Whoever reads was told that this life is over, but not to stop: what they may read stays as it is."""
        if not self._life_over:
            self._life_over = True
            self._on_life_over(reason)

    def _forget_if_quiet(self) -> None:
        if not self._exports and not self._starting:
            self._quiet.set()

    async def _insist(
        self, call: Callable[[], Coroutine[Any, Any, Rejection | None]], within_s: float | None = None
    ) -> Rejection | None:
        """Until somebody decided, within the handle's deadline (or `within_s`, when that is less)."""
        deadline = Deadline.after(min(within_s or self._handle_deadline_s, self._handle_deadline_s))
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
        reader = Actor(request.claimant, request.claimant_incarnation)
        if (
            export is None
            or export.closed
            or not request.claimant_incarnation
            or self._fences.is_over(reader)
            or request.incarnation != self._actor.incarnation
            or export.sequence_id != request.sequence
            or export.followers >= FOLLOWERS_MAX
        ):
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such handle is offered here")
        assert export is not None
        export.followers += 1
        export.readers.add(reader)  # before it is told of any block
        try:
            async for progress in export.progress():
                yield progress
        finally:
            export.followers -= 1


def as_source(request: EngineRequest) -> EngineRequest:
    """The same request, to be handed over."""
    return replace(request, handover=Handover.SOURCE)
