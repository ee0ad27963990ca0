"""The wire under a kvstore's client: one stream, calls numbered and answered once, reconnects by itself.

    connection = Connection(["kvstore-a:7000", "kvstore-b:7000"], open_channel=…)
    connection.start()
    reply = await connection.call(pb.KvCall(move=…), timeout_s=2)       # a KvReply; its rejection says why not

Calls wait for a connection until their deadline. What was sent and not answered when a connection broke is sent again
under its number where the same kvstore is found (it answers a number once), and fails as UNAVAILABLE, outcome unknown,
where another one is. One event loop.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.base.version import version
from tokenrelay.ledger.api import Code, Rejection
from tokenrelay.ledger.wire import ACTIVE_KVSTORE_KEY, pack_rejection
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.proto import kvstore_pb2_grpc

log = get_logger("kvstore-client")

OpenChannel = Callable[[str], grpc.aio.Channel]
BATCH_CALLS = 256  # of one message
CANCEL_AGAIN_S = 0.2


@dataclass(frozen=True, slots=True)
class ConnectionOptions:
    """Bounds. Times in seconds."""

    connect_timeout_s: float = 2.0
    call_timeout_s: float = 2.0
    backoff_min_s: float = 0.05
    backoff_max_s: float = 2.0  # times 0.5 to 1.5: a fleet must not come back in one instant
    calls_max: int = 2048  # open at once; one more is refused


@dataclass(slots=True)
class _Pending:
    """A call that has no answer yet."""

    call: pb.KvCall
    answered: asyncio.Future[pb.KvReply]
    sent: bool = False
    orphaned: bool = False  # its caller gave up; an answer that comes late is undone


class Connection:
    """Calls to whichever of `targets` is the active kvstore."""

    def __init__(
        self,
        targets: Sequence[str],
        *,
        open_channel: OpenChannel,
        metadata: tuple[tuple[str, str], ...] = (),
        options: ConnectionOptions | None = None,
    ) -> None:
        self.options = options or ConnectionOptions()
        self.ready = False
        self.term = 0  # the highest seen: what a kvstore of a lower one says is stale
        self.target = ""  # of the present or last connection
        self.connections = 0
        self.last_error: TokenRelayError | None = None
        self.on_connect: Callable[[bool], list[pb.KvCall]] = lambda resumed: []  # calls that go before all others
        self.on_disconnect: Callable[[str], None] = lambda reason: None
        self.on_notice: Callable[[pb.KvNotice], None] = lambda notice: None
        self.on_late: Callable[[pb.KvCall, pb.KvReply], None] = lambda call, reply: None
        self._targets = list(targets)
        self._active = ""  # where a standby says that the active kvstore is: one name may stand for both of them
        self._open_channel = open_channel
        self._metadata = metadata
        self._client = secrets.token_hex(16)
        self._incarnation = ""  # of the kvstore that knows our numbers
        self._next_number = 1
        self._pending: dict[int, _Pending] = {}  # by number, rising
        self._outgoing: deque[int] = deque()
        self._outgoing_waiting = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._heard = 0  # messages received, ever
        self._stalled = asyncio.Event()
        self.stub: Any = None  # of the present connection, for calls of its own

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Begin to connect, in the background."""
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name="kvstore-client")

    async def close(self) -> None:
        """End it; what is open fails as UNAVAILABLE."""
        runner, self._runner = self._runner, None
        while runner is not None and not runner.done():
            runner.cancel()  # again and again: one that comes as a call ends may be taken for the end of that call
            await asyncio.wait([runner], timeout=CANCEL_AGAIN_S)
        self._fail("the client was closed", lambda pending: True)

    @property
    def open_count(self) -> int:
        """Calls without an answer."""
        return len(self._pending)

    # -- calls --------------------------------------------------------------------------------------------------------
    async def call(self, call: pb.KvCall, timeout_s: float | None = None) -> pb.KvReply:
        """Its answer. A rejection UNAVAILABLE when there is none within the deadline."""
        if self._runner is None:
            return _unavailable(0, "the client is closed")
        if len(self._pending) >= self.options.calls_max:
            return _unavailable(0, f"{len(self._pending)} calls are open already")
        pending = self._enqueue(call)
        heard = self._heard
        timeout_s = self.options.call_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(pending.answered)
        except TimeoutError:
            self._give_up(pending)
            if pending.sent and heard == self._heard:
                self._stalled.set()  # it hangs: another connection, perhaps another kvstore
            why = "no answer" if pending.sent else f"no kvstore: {self.last_error or 'not connected yet'}"
            return _unavailable(call.number, f"{why} within {timeout_s:g} s")
        except asyncio.CancelledError:
            self._give_up(pending)
            raise

    def send(self, call: pb.KvCall) -> None:
        """A call whose answer nobody waits for; dropped where the bound is reached."""
        if self._runner is not None and len(self._pending) < self.options.calls_max:
            self._enqueue(call).orphaned = True

    def _enqueue(self, call: pb.KvCall) -> _Pending:
        call.number, self._next_number = self._next_number, self._next_number + 1
        pending = _Pending(call, asyncio.get_running_loop().create_future())
        self._pending[call.number] = pending
        self._outgoing.append(call.number)
        self._outgoing_waiting.set()
        return pending

    def _give_up(self, pending: _Pending) -> None:
        """Its caller waits no more. What may still be done must be undone when the answer comes."""
        pending.orphaned = True
        if not pending.sent or pending.call.WhichOneof("call") not in ("reserve", "move"):
            self._pending.pop(pending.call.number, None)

    def _fail(self, reason: str, which: Callable[[_Pending], bool]) -> None:
        for number, pending in list(self._pending.items()):
            if which(pending):
                del self._pending[number]
                if not pending.answered.done():
                    pending.answered.set_result(_unavailable(number, reason))

    # -- the connection -----------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        backoff_s = self.options.backoff_min_s
        while True:
            targets, led = deque(random.sample(self._targets, len(self._targets))), False
            while targets:
                target, connections, self._active = targets.popleft(), self.connections, ""
                try:
                    await self._connect_and_serve(target)
                except TokenRelayError as error:
                    self.last_error = error
                except grpc.aio.AioRpcError as error:
                    self._active = _active_of(error.trailing_metadata())
                    self.last_error = Unavailable(f"kvstore {target}: {error.code().name}: {error.details()}")
                except (grpc.aio.UsageError, asyncio.InvalidStateError, OSError) as error:
                    # A write into a call that ended under it, which grpc tells in several ways.
                    self.last_error = Unavailable(f"kvstore {target}: {error!r}")
                except asyncio.CancelledError:
                    task = asyncio.current_task()
                    if task is None or task.cancelling():
                        raise
                    self.last_error = Unavailable(f"kvstore {target}: the call was cancelled")
                except Exception as error:  # a bug, and no reason to leave this process without a kvstore
                    log.exception("the connection failed", target=target)
                    self.last_error = Unavailable(f"kvstore {target}: {error!r}")
                self.ready, self.stub = False, None
                if self.connections > connections:
                    log.warning("kvstore lost", target=target, reason=str(self.last_error))
                    backoff_s = self.options.backoff_min_s
                    self.on_disconnect(str(self.last_error))
                    break
                if self._active and self._active != target and not led:
                    led = True  # once a round: what it says may be old
                    targets.appendleft(self._active)
            await asyncio.sleep(backoff_s * (0.5 + random.random()))
            backoff_s = min(backoff_s * 2, self.options.backoff_max_s)

    async def _connect_and_serve(self, target: str) -> None:
        """One connection, until it ends. Raises why."""
        async with self._open_channel(target) as channel:
            stub = kvstore_pb2_grpc.KvstoreStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Session(metadata=self._metadata)
            tasks: list[asyncio.Task[None]] = []
            try:
                welcome = await self._greet(call, target)
                self._welcomed(welcome, target, stub)
                self._stalled.clear()
                tasks = [asyncio.create_task(work) for work in (self._read(call), self._write(call), self._stall())]
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                call.cancel()

    async def _greet(self, call: Any, target: str) -> pb.KvWelcome:
        deadline = Deadline.after(self.options.connect_timeout_s)
        hello = pb.KvHello(client=self._client, version=version(), term_seen=self.term)
        try:
            await asyncio.wait_for(call.write(pb.KvCalls(hello=hello)), deadline.left_s())
            first = await asyncio.wait_for(call.read(), deadline.left_s())
        except TimeoutError:
            raise Unavailable(f"kvstore {target} did not answer in {self.options.connect_timeout_s} s") from None
        except asyncio.InvalidStateError:  # the call ended before the write
            first = grpc.aio.EOF
        if first is grpc.aio.EOF:
            self._active = _active_of(await call.trailing_metadata())
            raise Unavailable(f"kvstore {target} refused: {await call.details()}")
        if not first.HasField("welcome"):
            raise Unavailable(f"kvstore {target} did not begin with a welcome")
        if first.welcome.term < self.term:
            raise Unavailable(f"kvstore {target} is of term {first.welcome.term}, {self.term} was seen already")
        welcome: pb.KvWelcome = first.welcome
        return welcome

    def _welcomed(self, welcome: pb.KvWelcome, target: str, stub: Any) -> None:
        resumed = welcome.resumed and welcome.incarnation == self._incarnation and welcome.term == self.term
        self._incarnation, self.term, self.target, self.stub = welcome.incarnation, welcome.term, target, stub
        self.connections += 1
        self.last_error = None
        if not resumed:
            self._fail(
                "the connection broke, and another kvstore answers now: nobody knows whether it was done",
                lambda pending: pending.sent,
            )
        before = list(self._pending)
        for call in self.on_connect(resumed):
            self._enqueue(call).orphaned = True
        added = list(self._pending)[len(before) :]
        self._outgoing = deque([*added, *before])
        self._outgoing_waiting.set()
        self.ready = True
        log.info("kvstore found", target=target, term=welcome.term, resumed=resumed)

    async def _stall(self) -> None:
        await self._stalled.wait()
        raise Unavailable(f"kvstore {self.target} does not answer")

    async def _read(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            self._heard += 1
            for reply in message.replies:
                pending = self._pending.pop(reply.number, None)
                if pending is None:
                    continue
                if pending.orphaned:
                    self.on_late(pending.call, reply)
                if not pending.answered.done():
                    pending.answered.set_result(reply)
            for notice in message.notices:
                self.on_notice(notice)
        raise Unavailable(f"kvstore {self.target} ended the session: {await call.details() or 'stream closed'}")

    async def _write(self, call: Any) -> None:
        """In order; what came meanwhile goes in one message."""
        while True:
            await self._outgoing_waiting.wait()
            self._outgoing_waiting.clear()
            while self._outgoing:
                message = pb.KvCalls()
                while self._outgoing and len(message.calls) < BATCH_CALLS:
                    pending = self._pending.get(self._outgoing.popleft())
                    if pending is not None:
                        pending.sent = True
                        message.calls.append(pending.call)
                if message.calls:
                    await call.write(message)


def _active_of(trailing: Any) -> str:
    """The address in a standby's refusal, if there is one."""
    return next((str(value) for key, value in trailing or () if key == ACTIVE_KVSTORE_KEY), "")


def _unavailable(number: int, reason: str) -> pb.KvReply:
    return pb.KvReply(number=number, rejection=pack_rejection(Rejection(Code.UNAVAILABLE, reason)))
