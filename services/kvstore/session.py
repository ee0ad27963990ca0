"""One client's stream: its calls in order, each answered once, and its members' notices.

What the client sends is judged here: what no client sends (a forged field, half a hash) is refused, counted, and never
an exception of the server. A client that does not read is cut off at a bound, and comes back.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Actor, Code, Event, Joined, Rejection
from tokenrelay.ledger.notices import NoticeQueue
from tokenrelay.ledger.wire import (
    Malformed,
    pack_handle,
    pack_member,
    pack_notice,
    pack_rejection,
    pack_view,
    to_ms,
    unpack_actor,
    unpack_events,
    unpack_handle,
    unpack_hashes,
    unpack_member,
    unpack_view,
)
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.services.kvstore.store import Store

log = get_logger("kvstore")

ANSWERS_KEPT = 4096  # of a client, for repeated calls; more than a client may have open
REPLIES_MAX = 16384  # that a client has not read
MESSAGE_REPLIES = 1024
CALLS_MAX = 4096  # of one message
# Answers that say something was decided: not to leave when the right to decide ended meanwhile.
_DECISIONS = ("join", "attach", "leave", "reserve", "move")

Answer = Callable[[pb.KvCall, pb.KvReply], None]


class Client:
    """One life of a client: the answers it was given, and its present session."""

    def __init__(self) -> None:
        self.answers: OrderedDict[int, pb.KvReply] = OrderedDict()
        self.session: Session | None = None

    def keep(self, reply: pb.KvReply) -> None:
        """For when the call comes again."""
        self.answers[reply.number] = reply
        if len(self.answers) > ANSWERS_KEPT:
            self.answers.popitem(last=False)


class Session:
    """One stream of one client."""

    def __init__(self, store: Store, client: Client) -> None:
        self._store = store
        self._client = client
        self._replies: list[tuple[bool, pb.KvReply]] = []  # (whether it tells of a decision, the reply)
        self._queues: dict[Actor, NoticeQueue] = {}
        self._waiting = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.over = ""  # why it ends
        self._answers: dict[str, Answer] = {
            "keepalive": self._keepalive,
            "leave": self._leave,
            "reserve": self._reserve,
            "move": self._move,
            "watch": self._watch,
            "unwatch": self._unwatch,
            "view": self._view,
            "views": self._views,
            "members": self._members,
            "publish": self._publish,
            "resync": self._resync,
        }

    # -- life ---------------------------------------------------------------------------------------------------------
    def end(self, reason: str) -> None:
        """From this side; the writer sees it."""
        self.over = self.over or reason
        self._waiting.set()

    def close(self) -> None:
        """Nothing of this session is done any more, nobody is told anything through it."""
        self.over = self.over or "closed"
        self._waiting.set()
        for actor, queue in self._queues.items():
            self._store.host.unwatch(actor, queue)
        self._queues.clear()
        for task in self._tasks:
            task.cancel()
        if self._client.session is self:
            self._client.session = None

    async def read(self, context: Any) -> None:
        """Until the client ends its side, or the session does."""
        while not self.over and isinstance(message := await context.read(), pb.KvCalls):
            if self.over:
                return  # another session of this client has begun: what comes here now came too late
            if len(message.calls) > CALLS_MAX:
                self._store.malformed["too_many_calls"] += 1
                self.end(f"{len(message.calls)} calls in one message, at most {CALLS_MAX} are expected")
                return
            for call in message.calls:
                self._take(call)
            if len(self._replies) > REPLIES_MAX:
                self.end(f"{len(self._replies)} answers are unread")

    async def write(self, context: Any) -> None:
        """What waits, one message at a time, until the session ends."""
        while not self.over:
            await self._waiting.wait()
            self._waiting.clear()
            while message := self._compose():
                await context.write(message)

    def _compose(self) -> pb.KvReplies | None:
        message = pb.KvReplies()
        replies, self._replies = self._replies[:MESSAGE_REPLIES], self._replies[MESSAGE_REPLIES:]
        refusal = self._store.host.refusal()
        for decided, reply in replies:
            if decided and refusal is not None and not reply.HasField("rejection"):
                # The process was held up between the decision and here, and the right to decide is over.
                reply = pb.KvReply(number=reply.number, rejection=pack_rejection(refusal))
                self._client.keep(reply)
            message.replies.append(reply)
        for actor, queue in list(self._queues.items()):
            message.notices.extend(pack_notice(actor, notice) for notice in self._store.host.drain(actor, queue))
            if queue.ended:
                del self._queues[actor]
        return message if message.replies or message.notices else None

    # -- calls --------------------------------------------------------------------------------------------------------
    def _take(self, call: pb.KvCall) -> None:
        repeated = self._client.answers.get(call.number)
        if repeated is not None:
            self._send(repeated, decided=False)
            return
        kind = call.WhichOneof("call") or ""
        reply = pb.KvReply(number=call.number)
        try:
            if kind in ("join", "attach"):
                self._begin(call, reply)
                return
            answer = self._answers.get(kind)
            if answer is None:
                raise Malformed("a call of a kind nobody knows")
            answer(call, reply)
        except Malformed as error:
            self._refuse_malformed(kind, str(error), reply)
        self._send(reply, decided=kind in _DECISIONS)

    def _refuse_malformed(self, kind: str, what: str, reply: pb.KvReply) -> None:
        self._store.malformed[kind or "unknown"] += 1
        reply.rejection.CopyFrom(pack_rejection(Rejection(Code.INVALID, f"malformed {kind or 'call'}: {what}")))

    def _send(self, reply: pb.KvReply, *, decided: bool) -> None:
        self._client.keep(reply)
        self._replies.append((decided, reply))
        self._waiting.set()

    def _begin(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        """A life begins, or goes on. Decided at once, in order with the calls behind it; answered when written down."""
        if call.HasField("join"):
            joined = self._store.host.join(unpack_member(call.join.member), call.join.lease_ms / 1000)
        else:
            attach = call.attach
            handles = [unpack_view(view) for view in attach.handles]
            member, lease_s = unpack_member(attach.member), attach.lease_ms / 1000
            joined = self._store.reattach(member, lease_s, handles, attach.hash_key)
        if isinstance(joined, Rejection):
            _put(reply, joined)
            self._send(reply, decided=False)
            return
        task = asyncio.create_task(self._answer_durably(joined, reply))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer_durably(self, joined: Joined, reply: pb.KvReply) -> None:
        """A life must be written down before it is told that it began: a later kvstore must know whom to wait for."""
        if await self._store.durable():
            reply.joined.CopyFrom(
                pb.KvJoined(term=joined.term, lease_ms=to_ms(joined.lease_s), hash_key=joined.hash_key)
            )
        else:
            _put(reply, Rejection(Code.UNAVAILABLE, "the kvstore's backend does not answer"))
        self._send(reply, decided=self._store.attach is None)

    def _keepalive(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        _put(reply, self._store.host.keepalive(unpack_actor(call.keepalive)))

    def _leave(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        _put(reply, self._store.host.leave(unpack_actor(call.leave)))

    def _reserve(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        message = call.reserve
        answer = self._store.host.reserve(unpack_actor(message.owner), message.extents, message.deadline_ms / 1000)
        if isinstance(answer, Rejection):
            _put(reply, answer)
        else:
            reply.handle.CopyFrom(pack_handle(answer))

    def _move(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        message = call.move
        try:
            event = Event(message.event)
        except ValueError as error:
            raise Malformed(f"event {message.event!r}") from error
        rejection = self._store.host.move(
            event,
            unpack_handle(message.handle),
            unpack_actor(message.actor),
            deadline_s=message.deadline_ms / 1000 if message.deadline_ms else None,
            extents=message.extents,
        )
        _put(reply, rejection)

    def _watch(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        actor = unpack_actor(call.watch)
        self._unwatch(pb.KvCall(unwatch=call.watch), reply)
        queue = NoticeQueue(wake=self._waiting.set)
        rejection = self._store.host.watch(actor, queue)
        if rejection is None:
            self._queues[actor] = queue
        else:
            _put(reply, rejection)

    def _unwatch(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        actor = unpack_actor(call.unwatch)
        queue = self._queues.pop(actor, None)
        if queue is not None:
            self._store.host.unwatch(actor, queue)

    def _view(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        refusal = self._store.host.refusal()
        view = None if refusal is not None else self._store.host.books.view(unpack_handle(call.view))
        if view is None:
            _put(reply, refusal or Rejection(Code.UNKNOWN_HANDLE, "there is no such handle"))
        else:
            reply.view.CopyFrom(pack_view(view))

    def _views(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        refusal = self._store.host.refusal()
        if refusal is not None:
            _put(reply, refusal)
            return
        actor = unpack_actor(call.views.actor) if call.views.HasField("actor") else None
        reply.views.CopyFrom(pb.KvHandleViews(views=map(pack_view, self._store.host.books.views(actor))))

    def _members(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        refusal = self._store.host.refusal()
        if refusal is not None:
            _put(reply, refusal)
        else:
            reply.members.CopyFrom(pb.KvMemberList(members=map(pack_member, self._store.host.roster.members())))

    # -- the directory ------------------------------------------------------------------------------------------------
    def _publish(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        message = call.publish
        actor = unpack_actor(message.actor)
        events = unpack_events(message.kinds, message.block_hashes)
        if self._store.host.roster.alive(actor):
            reply.applied = self._store.directory.apply(actor, message.sequence, events).value
        else:
            _put(reply, Rejection(Code.STALE_INCARNATION, "this life of the member is over, or it never joined"))

    def _resync(self, call: pb.KvCall, reply: pb.KvReply) -> None:
        message = call.resync
        actor = unpack_actor(message.actor)
        hashes = unpack_hashes(message.block_hashes)
        if self._store.host.roster.alive(actor):
            _put(
                reply,
                self._store.directory.resync_page(actor, message.sequence, message.page, message.last, hashes),
            )
        else:
            _put(reply, Rejection(Code.STALE_INCARNATION, "this life of the member is over, or it never joined"))


def _put(reply: pb.KvReply, rejection: Rejection | None) -> None:
    if rejection is not None:
        reply.rejection.CopyFrom(pack_rejection(rejection))
