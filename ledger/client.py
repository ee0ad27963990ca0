"""A kvstore across the network behind the protocols of api.py: `KvstoreClient` is a Ledger and a Directory.

    client = KvstoreClient(["kvstore:7000"], open_channel=security.open_channel, metadata=security.metadata)
    client.start()
    joined = await client.join(member, lease_s=10)

It remembers what its members own and have claimed, so that they go on when the connection breaks or another kvstore
takes over: it attaches them again with what they hold. A claim or a reservation whose answer comes after its caller
gave up is undone. One event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Sequence

import grpc

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import (
    Actor,
    Applied,
    CacheEvent,
    Code,
    DirectoryNotice,
    Event,
    Handle,
    HandleChanged,
    HandleView,
    HolderEnded,
    Holding,
    Joined,
    Member,
    MemberEnded,
    Notice,
    Rejection,
    Snapshot,
    State,
    Suspended,
)
from tokenrelay.ledger.connection import Connection, ConnectionOptions, OpenChannel
from tokenrelay.ledger.directory_host import pages_of
from tokenrelay.ledger.notices import NoticeQueue
from tokenrelay.ledger.states import TABLE, TERMINAL
from tokenrelay.ledger.wire import (
    Malformed,
    pack_actor,
    pack_events,
    pack_handle,
    pack_hashes,
    pack_member,
    pack_view,
    to_ms,
    unpack_actor,
    unpack_events,
    unpack_handle,
    unpack_joined,
    unpack_member,
    unpack_notice,
    unpack_rejection,
    unpack_view,
)
from tokenrelay.proto import kvstore_pb2 as pb

log = get_logger("kvstore-client")

FOLLOW_PAUSE_S = 0.2
_NEVER_JOINED = Rejection(Code.STALE_INCARNATION, "this member did not join through this client, or its life is over")


class _Life:
    """One member in this process: what it holds, and who watches."""

    def __init__(self, member: Member, joined: Joined) -> None:
        self.member = member
        self.lease_s = joined.lease_s
        self.hash_key = joined.hash_key
        self.held: dict[Handle, HandleView] = {}  # open, as far as this process was told
        self.queues: set[NoticeQueue] = set()


class KvstoreClient:
    """Implements `Ledger` and `Directory` over one stream to the active kvstore."""

    def __init__(
        self,
        targets: Sequence[str],
        *,
        open_channel: OpenChannel = grpc.aio.insecure_channel,
        metadata: tuple[tuple[str, str], ...] = (),
        options: ConnectionOptions | None = None,
    ) -> None:
        self.connection = Connection(targets, open_channel=open_channel, metadata=metadata, options=options)
        self.connection.on_connect = self._on_connect
        self.connection.on_disconnect = self._on_disconnect
        self.connection.on_notice = self._on_notice
        self.connection.on_late = self._on_late
        self.on_renewed: list[Callable[[], None]] = []  # called when a kvstore is found that may know nothing of before
        self._metadata = metadata
        self._lives: dict[Actor, _Life] = {}
        self._connected = asyncio.Event()

    def start(self) -> None:
        """Begin to connect, in the background."""
        self.connection.start()

    async def close(self) -> None:
        """End the connection. Members' leases run out, unless they left before."""
        await self.connection.close()

    async def wait_ready(self, timeout_s: float) -> bool:
        """Whether a kvstore was found within `timeout_s` seconds."""
        try:
            await asyncio.wait_for(self._connected.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    # -- members ------------------------------------------------------------------------------------------------------
    async def join(self, member: Member, *, lease_s: float) -> Joined | Rejection:
        """See `Ledger`."""
        call = pb.KvCall(join=pb.KvJoin(member=pack_member(member), lease_ms=to_ms(lease_s)))
        reply = await self.connection.call(call)
        if reply.HasField("rejection"):
            return unpack_rejection(reply.rejection)
        joined = unpack_joined(reply.joined)
        if member.actor not in self._lives:
            self._lives[member.actor] = _Life(member, joined)
        return joined

    async def keepalive(self, actor: Actor) -> Rejection | None:
        """See `Ledger`."""
        rejection = _rejection(await self.connection.call(pb.KvCall(keepalive=pack_actor(actor))))
        if rejection is not None and rejection.code is Code.STALE_INCARNATION:
            self._end(actor, rejection.reason)
        return rejection

    async def leave(self, actor: Actor) -> Rejection | None:
        """See `Ledger`."""
        rejection = _rejection(await self.connection.call(pb.KvCall(leave=pack_actor(actor))))
        if rejection is None:
            self._end(actor, "it left")
        return rejection

    def _end(self, actor: Actor, reason: str) -> None:
        life = self._lives.pop(actor, None)
        if life is not None:
            for queue in life.queues:
                queue.end(MemberEnded(actor, reason))

    # -- transitions --------------------------------------------------------------------------------------------------
    async def reserve(self, owner: Actor, *, extents: int, deadline_s: float) -> Handle | Rejection:
        """See `Ledger`."""
        if extents < 0 or deadline_s <= 0:
            return Rejection(Code.INVALID, f"extents {extents} or deadline_s {deadline_s} is out of bounds")
        message = pb.KvReserve(owner=pack_actor(owner), extents=extents, deadline_ms=to_ms(deadline_s))
        reply = await self.connection.call(pb.KvCall(reserve=message))
        if reply.HasField("rejection"):
            return unpack_rejection(reply.rejection)
        handle = unpack_handle(reply.handle)
        life = self._lives.get(owner)
        if life is not None:
            life.held[handle] = HandleView(handle, State.RESERVED, owner, None, extents, 0, deadline_s)
        return handle

    async def offer(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.OFFER, handle, owner, deadline_s)

    async def seal(self, handle: Handle, owner: Actor, *, extents: int) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.SEAL, handle, owner, extents=extents)

    async def claim(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.CLAIM, handle, claimant, deadline_s)

    async def transfer(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.TRANSFER, handle, claimant, deadline_s)

    async def quarantine(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.QUARANTINE, handle, owner, deadline_s)

    async def decline(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.DECLINE, handle, claimant)

    async def adopt(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.ADOPT, handle, claimant, deadline_s)

    async def release(self, handle: Handle, owner: Actor) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.RELEASE, handle, owner)

    async def reclaim(self, handle: Handle, owner: Actor) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.RECLAIM, handle, owner)

    async def fence(self, handle: Handle, owner: Actor) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.FENCE, handle, owner)

    async def acknowledge(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """See `Ledger`."""
        return await self._move(Event.ACKNOWLEDGE, handle, claimant)

    async def _move(
        self, event: Event, handle: Handle, actor: Actor, deadline_s: float | None = None, extents: int = 0
    ) -> Rejection | None:
        if extents < 0 or (deadline_s is not None and deadline_s <= 0):
            return Rejection(Code.INVALID, f"extents {extents} or deadline_s {deadline_s} is out of bounds")
        reply = await self.connection.call(_move_call(event, handle, actor, deadline_s, extents))
        rejection = _rejection(reply)
        if rejection is None:
            self._note(event, handle, actor, extents)
        return rejection

    def _note(self, event: Event, handle: Handle, actor: Actor, extents: int) -> None:
        """Remember what was answered."""
        life = self._lives.get(actor)
        if life is None:
            return
        view = life.held.get(handle)
        if event is Event.CLAIM:
            if view is None:
                view = HandleView(handle, State.CLAIMED, None, actor, 0, 0, 0.0)
            life.held[handle] = dataclasses.replace(view, state=State.CLAIMED, claimant=actor)
        elif view is not None:
            after = TABLE.get((view.state, event))
            gave_up = view.owner != actor and event in (Event.DECLINE, Event.ACKNOWLEDGE, Event.ADOPT)
            if gave_up or event is Event.FENCE or (isinstance(after, State) and after in TERMINAL):
                del life.held[handle]
            elif isinstance(after, State):
                life.held[handle] = dataclasses.replace(view, state=after, sealed=max(view.sealed, extents))

    def _on_late(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        """It was done, but its caller gave up: nobody must go on holding it."""
        if reply.HasField("rejection"):
            if call.HasField("attach") and reply.rejection.code == Code.STALE_INCARNATION.value:
                self._end(unpack_actor(call.attach.member.actor), reply.rejection.reason)
            return
        if reply.HasField("handle") and call.HasField("reserve"):
            handle, owner = unpack_handle(reply.handle), unpack_actor(call.reserve.owner)
            self.connection.send(_move_call(Event.RECLAIM, handle, owner, None, 0))
        elif call.HasField("move") and call.move.event == Event.CLAIM.value:
            handle, claimant = unpack_handle(call.move.handle), unpack_actor(call.move.actor)
            self.connection.send(_move_call(Event.DECLINE, handle, claimant, None, 0))

    # -- notices ------------------------------------------------------------------------------------------------------
    async def watch(self, actor: Actor) -> AsyncIterator[Notice]:
        """See `Ledger`."""
        life = self._lives.get(actor)
        if life is None:
            return
        queue = NoticeQueue()
        queue.gap = False
        life.queues.add(queue)
        self.connection.send(pb.KvCall(watch=pack_actor(actor)))
        try:
            while True:
                for notice in queue.take():
                    yield notice
                if queue.ended:
                    return
                if queue.gap:
                    queue.gap = False
                    self.connection.send(pb.KvCall(watch=pack_actor(actor)))  # begin anew
                await queue.wait()
        finally:
            life.queues.discard(queue)
            if not life.queues:
                self.connection.send(pb.KvCall(unwatch=pack_actor(actor)))

    def _on_notice(self, message: pb.KvNotice) -> None:
        try:
            actor, notice = unpack_actor(message.to), unpack_notice(message)
        except Malformed as error:
            log.error("a notice nobody understands", error=str(error))
            return
        life = self._lives.get(actor)
        if life is None:
            return
        if isinstance(notice, MemberEnded) and notice.actor == actor:
            self._end(actor, notice.reason)
            return
        if isinstance(notice, Snapshot):
            life.held = {view.handle: view for view in notice.handles}
        elif isinstance(notice, HandleChanged):
            view = notice.view
            if view.state in TERMINAL or actor not in (view.owner, view.claimant):
                life.held.pop(view.handle, None)
            else:
                life.held[view.handle] = view
        for queue in life.queues:
            queue.put(notice)

    def _on_connect(self, resumed: bool) -> list[pb.KvCall]:
        self._connected.set()
        if not resumed:
            for renewed in self.on_renewed:
                renewed()
        calls = []
        for actor, life in self._lives.items():
            attach = pb.KvAttach(member=pack_member(life.member), lease_ms=to_ms(life.lease_s), hash_key=life.hash_key)
            if not resumed:
                attach.handles.extend(map(pack_view, life.held.values()))
            calls.append(pb.KvCall(attach=attach))
            if life.queues:
                calls.append(pb.KvCall(watch=pack_actor(actor)))
        return calls

    def _on_disconnect(self, reason: str) -> None:
        self._connected.clear()
        for life in self._lives.values():
            for queue in life.queues:
                queue.put(Suspended(f"no kvstore: {reason}"))

    # -- views --------------------------------------------------------------------------------------------------------
    async def view(self, handle: Handle) -> HandleView | Rejection:
        """See `Ledger`."""
        reply = await self.connection.call(pb.KvCall(view=pack_handle(handle)))
        return _rejection(reply) or unpack_view(reply.view)

    async def views(self, actor: Actor | None = None) -> list[HandleView] | Rejection:
        """See `Ledger`."""
        message = pb.KvViews() if actor is None else pb.KvViews(actor=pack_actor(actor))
        reply = await self.connection.call(pb.KvCall(views=message))
        return _rejection(reply) or [unpack_view(view) for view in reply.views.views]

    async def members(self) -> list[Member] | Rejection:
        """See `Ledger`."""
        reply = await self.connection.call(pb.KvCall(members=pb.KvMembers()))
        return _rejection(reply) or [unpack_member(member) for member in reply.members.members]

    # -- directory ----------------------------------------------------------------------------------------------------
    async def publish(self, actor: Actor, sequence: int, events: Sequence[CacheEvent]) -> Applied | Rejection:
        """See `Directory`."""
        kinds, hashes = pack_events(events)
        message = pb.KvPublish(actor=pack_actor(actor), sequence=sequence, kinds=kinds, block_hashes=hashes)
        reply = await self.connection.call(pb.KvCall(publish=message))
        return _rejection(reply) or Applied(reply.applied)

    async def resync(self, actor: Actor, sequence: int, block_hashes: Sequence[bytes]) -> Rejection | None:
        """See `Directory`."""
        for page, last, hashes in pages_of(block_hashes):
            message = pb.KvResync(
                actor=pack_actor(actor), sequence=sequence, page=page, last=last, block_hashes=pack_hashes(hashes)
            )
            rejection = _rejection(await self.connection.call(pb.KvCall(resync=message)))
            if rejection is not None:
                return rejection
        return None

    async def follow(self) -> AsyncIterator[DirectoryNotice]:
        """See `Directory`."""
        told: set[str] = set()
        while True:
            await self._connected.wait()
            for name in told:  # what is known may be out of date by now, and comes again
                yield HolderEnded(name)
            told.clear()
            stub = self.connection.stub
            try:
                if stub is not None:
                    async for pages in stub.Follow(pb.FollowRequest(), metadata=self._metadata):
                        for page in pages.pages:
                            notice = _unpack_page(page)
                            told.add(page.actor.name)
                            yield notice
            except (grpc.aio.AioRpcError, grpc.aio.UsageError, Malformed) as error:
                log.warning("the directory's stream broke", error=str(error))
            await asyncio.sleep(FOLLOW_PAUSE_S)


def _unpack_page(page: pb.HoldingPage) -> DirectoryNotice:
    if page.ended:
        return HolderEnded(page.actor.name)
    events = unpack_events(page.kinds, page.block_hashes)
    return Holding(unpack_actor(page.actor), page.sequence, events, page.replaces)


def _move_call(event: Event, handle: Handle, actor: Actor, deadline_s: float | None, extents: int) -> pb.KvCall:
    return pb.KvCall(
        move=pb.KvMove(
            event=event.value,
            handle=pack_handle(handle),
            actor=pack_actor(actor),
            deadline_ms=0 if deadline_s is None else to_ms(deadline_s),
            extents=extents,
        )
    )


def _rejection(reply: pb.KvReply) -> Rejection | None:
    return unpack_rejection(reply.rejection) if reply.HasField("rejection") else None
