"""The worker's side of a router: the gRPC servicer that multiplexes all requests of one router on one stream.

The host (the roles on an engine) knows one id space; each Session has its own. The servicer maps between them, so that
a router can neither see nor abort what another one runs. Per engine step the host calls `deliver` once on the event
loop, and each Session sends at most one message. A Session that ends, however it ends, aborts whatever it had open.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.proto import worker_pb2, worker_pb2_grpc
from tokenrelay.services.chassis.channel import ROUTER_INCARNATION_KEY, WORKER_INCARNATION_KEY, encode_error
from tokenrelay.services.chassis.outbox import Outbox
from tokenrelay.services.chassis.spans import Spans
from tokenrelay.services.chassis.tracing import Tracer

log = get_logger("session")

# A reader that lags this many tokens behind is cut: about 4 s of a worker that makes 64k tokens/s.
OUTBOX_TOKENS_MAX = 1 << 18
# Ended sequences of one router that a next turn can name; the scheduler keeps the texts of as many.
ENDED_MAX = 1024


Explain = Callable[[str], Awaitable[worker_pb2.ExplainReply]]  # request id; empty: all. Raises TokenRelayError


class WorkerHost(Protocol):
    """What does the work behind the stream. Called on the event loop; nothing here may block or raise."""

    def handshake(self) -> worker_pb2.HandshakeReply:
        """Who the worker is."""

    def submit(self, sequence_id: int, submit: worker_pb2.Submit) -> worker_pb2.SequenceOutput | None:
        """Begin a sequence; a terminal output when it is refused at once. Else exactly one comes through `deliver`."""

    def abort(self, sequence_id: int) -> None:
        """End a sequence; its terminal output comes through `deliver`. One that has ended takes its offer back."""

    def stats(self) -> worker_pb2.Stats:
        """Counters as of the last step."""


@dataclass(eq=False)
class _Session:
    """One router's stream."""

    router: str
    outbox: Outbox
    open: dict[int, int] = field(default_factory=dict)  # the router's id -> the host's id
    ended: dict[int, int] = field(default_factory=dict)  # the same of the last ENDED_MAX that ended, in that order
    ending: bool = False  # flush, then end the stream from this side
    cut: asyncio.Event = field(default_factory=asyncio.Event)  # end it without flushing: the reader is too slow


class WorkerServicer(worker_pb2_grpc.WorkerServicer):
    """Serves `tokenrelay.v1.Worker` for a host."""

    def __init__(
        self,
        host: WorkerHost,
        *,
        outbox_tokens_max: int = OUTBOX_TOKENS_MAX,
        explain: Explain | None = None,
        tracer: Tracer | None = None,
        name: str = "",
    ) -> None:
        """`explain` answers the rpc of that name; without it this worker has nothing to say. `name`: in its traces."""
        self._host = host
        self._explain = explain
        self.spans = Spans(tracer, name)
        self._outbox_tokens_max = outbox_tokens_max
        self._routes: dict[int, tuple[_Session, int]] = {}  # the host's id -> session, the router's id
        self._sessions: set[_Session] = set()
        self._next_id = 1
        self._stats = worker_pb2.Stats()
        self._draining = False
        self._quiet = asyncio.Event()  # set while nothing is open
        self._quiet.set()

    @property
    def open_count(self) -> int:
        """Sequences that have no terminal output yet."""
        return len(self._routes)

    # -- from the host ------------------------------------------------------------------------------------------------
    def deliver(self, outputs: Iterable[worker_pb2.SequenceOutput], stats: worker_pb2.Stats) -> None:
        """Outputs of one step, under the host's ids (the messages are taken over). Once per step, on the event loop."""
        self._stats = stats
        for output in outputs:
            host_id = output.id
            route = self._routes.get(host_id)
            if route is None:
                continue  # its session has gone, the abort is on its way
            session, output.id = route
            if self.spans.open:
                self.spans.seen(host_id, output)
            if output.finish:
                self._forget(host_id)
            if not session.outbox.add(output):
                self._cut(session)

    def _forget(self, host_id: int) -> None:
        session, router_id = self._routes.pop(host_id)
        if self.spans.open:
            self.spans.ended(host_id)
        del session.open[router_id]
        if len(session.ended) >= ENDED_MAX:
            del session.ended[next(iter(session.ended))]
        session.ended[router_id] = host_id
        if not self._routes:
            self._quiet.set()

    def _cut(self, session: _Session) -> None:
        """The reader is too slow: end its stream, and with it everything it had open."""
        session.outbox.discard()
        session.cut.set()
        self._abandon(session)

    def _abandon(self, session: _Session) -> None:
        for host_id in list(session.open.values()):
            self._forget(host_id)
            self._host.abort(host_id)

    # -- drain --------------------------------------------------------------------------------------------------------
    async def drain(self, deadline: Deadline) -> None:
        """Refuse what is new, let what runs end, then end the sessions; at the deadline the rest gets an error."""
        self._draining = True
        try:
            await asyncio.wait_for(self._quiet.wait(), None if deadline.at_s == float("inf") else deadline.left_s())
        except TimeoutError:
            self.fail_all(Unavailable("the worker stops and the time to drain is over"))
        self.end_sessions()

    def end_sessions(self) -> None:
        """Send what waits, then end the streams."""
        self._draining = True
        for session in self._sessions:
            session.ending = True
            session.outbox.wake()

    def fail_all(self, error: Unavailable) -> None:
        """Answer everything that is open with `error`, and tell the host to end it."""
        text = encode_error(error)
        for host_id, (session, router_id) in list(self._routes.items()):
            self._forget(host_id)
            self._host.abort(host_id)
            session.outbox.add(worker_pb2.SequenceOutput(id=router_id, finish=worker_pb2.FINISH_ERROR, error=text))

    # -- rpc ----------------------------------------------------------------------------------------------------------
    async def Handshake(self, request: worker_pb2.HandshakeRequest, context: Any) -> worker_pb2.HandshakeReply:
        """Who the worker is; the caller decides whether that fits."""
        return self._host.handshake()

    async def GetStats(self, request: worker_pb2.StatsRequest, context: Any) -> worker_pb2.Stats:
        """Counters, for a scrape."""
        return self._host.stats()

    async def Explain(self, request: worker_pb2.ExplainRequest, context: Any) -> worker_pb2.ExplainReply:
        """Why open sequences are where they are."""
        if self._explain is None:
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "this worker does not explain")
            raise AssertionError("abort raises")
        try:
            return await self._explain(request.request_id)
        except TokenRelayError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
            raise AssertionError("abort raises") from error

    async def Session(self, request_iterator: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """All requests of one router, until either side ends it."""
        metadata = dict(context.invocation_metadata() or ())
        session = _Session(str(metadata.get(ROUTER_INCARNATION_KEY, "?")), Outbox(self._outbox_tokens_max))
        if self._draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the worker drains")
        await context.send_initial_metadata(((WORKER_INCARNATION_KEY, self._host.handshake().incarnation),))
        self._sessions.add(session)
        log.info("session opened", router=session.router)
        tasks = [
            asyncio.create_task(work)
            for work in (self._read(session, context), self._write(session, context), session.cut.wait())
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for failure in (result for result in results if isinstance(result, Exception)):
                log.error("session failed", router=session.router, error=repr(failure))
            self._sessions.discard(session)
            self._abandon(session)
            log.info("session closed", router=session.router, cut=session.cut.is_set())
        if session.cut.is_set():
            reason = f"the router lags more than {self._outbox_tokens_max} tokens behind"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, reason)

    async def _read(self, session: _Session, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        while (command := await context.read()) is not grpc.aio.EOF:
            kind = command.WhichOneof("command")
            if kind == "submit":
                self._submit(session, command.submit)
            elif kind == "abort":
                host_id = session.open.get(command.abort.id) or session.ended.get(command.abort.id)
                if host_id is not None:
                    self._host.abort(host_id)

    def _submit(self, session: _Session, submit: worker_pb2.Submit) -> None:
        refusal: worker_pb2.SequenceOutput | None
        if submit.id in session.open:
            # Answering under this id would end the sequence that rightly holds it: a programmer's error of the router.
            log.error("submit with an id that is open; ignored", router=session.router, id=submit.id)
            return
        if self._draining:
            refusal = worker_pb2.SequenceOutput(
                finish=worker_pb2.FINISH_REJECTED,
                reject_reason=worker_pb2.REJECT_DRAINING,
                error=encode_error(Unavailable("the worker drains")),
            )
        elif not self._find_parent(session, submit):
            refusal = worker_pb2.SequenceOutput(
                finish=worker_pb2.FINISH_REJECTED,
                reject_reason=worker_pb2.REJECT_PARENT_UNKNOWN,
                error=encode_error(Unavailable("the parent is no sequence of this session, or ended long ago")),
            )
        else:
            host_id, self._next_id = self._next_id, self._next_id + 1
            session.open[submit.id] = host_id
            self._routes[host_id] = (session, submit.id)
            self._quiet.clear()
            self.spans.begin(host_id, submit)
            refusal = self._host.submit(host_id, submit)
            if refusal is not None:
                self.spans.seen(host_id, refusal)
                self._forget(host_id)
        if refusal is not None:
            refusal.id = submit.id
            if not session.outbox.add(refusal):
                self._cut(session)

    def _find_parent(self, session: _Session, submit: worker_pb2.Submit) -> bool:
        """Put the host's id of the parent in the place of the router's. False: this session has no such sequence."""
        if not submit.parent_tokens:
            submit.parent = 0
            return True
        host_id = session.open.get(submit.parent) or session.ended.get(submit.parent)
        submit.parent = host_id or 0
        return host_id is not None

    async def _write(self, session: _Session, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        """One message at a time; while it waits for the reader, the outbox coalesces."""
        while len(session.outbox) or not session.ending:
            await session.outbox.wait()
            if len(session.outbox):
                await context.write(session.outbox.take(self._stats))
        if self._stats.integrity_failures:  # the worker's last words: it counts no more after this
            await context.write(session.outbox.take(self._stats))
