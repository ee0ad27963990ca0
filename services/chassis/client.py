"""The router's side of a worker: one Session stream that carries all requests.

    client = WorkerClient("unix:/run/tokenrelay/worker.sock")
    await client.start()
    await client.wait_ready(30)
    sequence = client.submit(Submit(token_ids=…, …), on_output)     # on_output(SequenceOutput) on the event loop
    client.abort(sequence)                                          # the terminal output still comes, once

Every submitted sequence gets exactly one output whose `finish` is not FINISH_NONE: the worker's, or, when the worker
dies or the stream breaks, one made here with FINISH_ERROR and an `error` that `decode_error` turns into Unavailable.
The client reconnects by itself, for ever, with jittered backoff; a worker that came back is another incarnation and
knows nothing of before.
All methods belong to one event loop.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import grpc

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, HandshakeRefused, Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.ids import incarnation as new_incarnation
from tokenrelay.base.logging import get_logger
from tokenrelay.base.version import version
from tokenrelay.proto import worker_pb2, worker_pb2_grpc
from tokenrelay.services.chassis.channel import (
    ROUTER_INCARNATION_KEY,
    WORKER_INCARNATION_KEY,
    encode_error,
)
from tokenrelay.services.chassis.handshake import Expectation
from tokenrelay.services.chassis.security import Security

log = get_logger("worker-client")

CANCEL_AGAIN_S = 0.5
OnOutput = Callable[[worker_pb2.SequenceOutput], None]


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Bounds of one client. Times in seconds."""

    connect_timeout_s: float = 5.0
    backoff_min_s: float = 0.05
    backoff_max_s: float = 2.0
    refused_retry_s: float = 5.0  # after a refused handshake: only another worker behind the address can help
    commands_max: int = 8192  # written by nobody yet: the worker does not read


class WorkerClient:
    """One worker, as a router sees it. `ready` says whether submit() may be called now."""

    def __init__(
        self,
        target: str,
        *,
        router_incarnation: str | None = None,
        expect: Expectation | None = None,
        options: ClientOptions | None = None,
        on_ready: Callable[[bool], None] | None = None,
        security: Security | None = None,
    ) -> None:
        self.target = target
        self.ready = False
        self.handshake: worker_pb2.HandshakeReply | None = None  # of the last successful connection
        self.stats = worker_pb2.Stats()  # as of the last StepOutput
        self.integrity_failures = 0  # lives of the worker that ended because its scheduler's books were broken
        self.last_error: TokenRelayError | None = None  # why it is not ready
        self.connections = 0  # sessions opened so far
        self._router_incarnation = router_incarnation or new_incarnation()
        self._expect = expect or Expectation()
        self._options = options or ClientOptions()
        self._on_ready = on_ready
        self._security = security or Security()
        self._changed = asyncio.Event()
        self._open: dict[int, OnOutput] = {}  # every id here is owed exactly one terminal output
        self._next_id = 1  # never reused, not even across incarnations: a late answer cannot meet a new request
        self._commands: deque[worker_pb2.Command] = deque()
        self._commands_waiting = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None
        self._stub: worker_pb2_grpc.WorkerStub | None = None

    # -- life ---------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Begin to connect, in the background."""
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name=f"worker-client {self.target}")

    async def close(self) -> None:
        """End the session; whatever is still open gets its terminal error."""
        runner, self._runner = self._runner, None
        while runner is not None and not runner.done():
            runner.cancel()  # again and again: one that comes as a call ends may be taken for the end of that call
            await asyncio.wait([runner], timeout=CANCEL_AGAIN_S)
        self._fail_open(Unavailable(f"the connection to worker {self.target} was closed"))

    async def wait_ready(self, timeout_s: float) -> None:
        """Return when ready. Raises the last error, or DeadlineExceeded, after `timeout_s` seconds."""
        deadline = Deadline.after(timeout_s)
        while not self.ready:
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), deadline.left_s())
            except TimeoutError:
                raise self.last_error or DeadlineExceeded(
                    f"worker {self.target} was not ready in {timeout_s} s"
                ) from None

    # -- requests -----------------------------------------------------------------------------------------------------
    @property
    def open_count(self) -> int:
        """Sequences that still wait for their terminal output."""
        return len(self._open)

    def submit(self, submit: worker_pb2.Submit, on_output: OnOutput) -> int:
        """Send a sequence; its id is assigned here (and set in `submit`, which belongs to the client from now on).

        `on_output` is called on the event loop, must be quick and must not raise. Raises Unavailable when the worker is
        not ready, Overloaded when it does not read its commands.
        """
        if not self.ready:
            raise Unavailable(f"worker {self.target} is not ready{_because(self.last_error)}")
        if len(self._commands) >= self._options.commands_max:
            raise Overloaded(f"worker {self.target} has {len(self._commands)} commands unread")
        sequence, self._next_id = self._next_id, self._next_id + 1
        submit.id = sequence
        self._open[sequence] = on_output
        self._send(worker_pb2.Command(submit=submit))
        return sequence

    def abort(self, sequence: int) -> None:
        """Ask the worker to end it; the terminal output comes as for any other end. No effect once it has ended."""
        if sequence in self._open and self.ready:
            self._send(worker_pb2.Command(abort=worker_pb2.Abort(id=sequence)))

    def withdraw(self, sequence: int) -> None:
        """Nobody will take the KV that this ended sequence offered; nothing is answered."""
        if self.ready:
            self._send(worker_pb2.Command(abort=worker_pb2.Abort(id=sequence)))

    async def get_stats(self, timeout_s: float = 2.0) -> worker_pb2.Stats:
        """Fresh counters. Raises Unavailable."""
        if self._stub is None:
            raise Unavailable(f"worker {self.target} is not connected{_because(self.last_error)}")
        try:
            stats: worker_pb2.Stats = await self._stub.GetStats(
                worker_pb2.StatsRequest(), timeout=timeout_s, metadata=self._security.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"worker {self.target} gave no stats: {error.details()}") from error
        self._take_stats(stats)
        return stats

    async def explain(self, request_id: str, timeout_s: float) -> worker_pb2.ExplainReply:
        """Why the sequences of a request (all open ones, if it is empty) are where they are. Raises Unavailable."""
        if self._stub is None:
            raise Unavailable(f"worker {self.target} is not connected{_because(self.last_error)}")
        try:
            reply: worker_pb2.ExplainReply = await self._stub.Explain(
                worker_pb2.ExplainRequest(request_id=request_id), timeout=timeout_s, metadata=self._security.metadata
            )
        except grpc.aio.AioRpcError as error:
            raise Unavailable(f"worker {self.target} did not explain: {error.details()}") from error
        return reply

    def _take_stats(self, stats: worker_pb2.Stats) -> None:
        """A worker's counters end with its life; a failure that ended it is counted here."""
        self.integrity_failures += max(0, stats.integrity_failures - self.stats.integrity_failures)
        self.stats = stats

    def _send(self, command: worker_pb2.Command) -> None:
        self._commands.append(command)
        self._commands_waiting.set()

    # -- the connection -----------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        """Connect, serve, fail what was open, back off; until cancelled."""
        backoff_s = self._options.backoff_min_s
        while True:
            connections = self.connections
            delay_s = 0.0
            try:
                await self._connect_and_serve()
            except HandshakeRefused as error:
                self.last_error = error
                delay_s = self._options.refused_retry_s
                log.error("handshake refused", target=self.target, reason=error.message)
            except TokenRelayError as error:
                self.last_error = error
            except grpc.aio.AioRpcError as error:
                self.last_error = Unavailable(f"worker {self.target}: {error.code().name}: {error.details()}")
            finally:
                self._set_ready(False)
                self._fail_open(self.last_error or Unavailable(f"worker {self.target} is gone"))
            if self.connections > connections:
                backoff_s = self._options.backoff_min_s
                log.warning("worker lost", target=self.target, reason=str(self.last_error))
            await asyncio.sleep(max(delay_s, backoff_s * (0.5 + random.random())))
            backoff_s = min(backoff_s * 2, self._options.backoff_max_s)

    async def _connect_and_serve(self) -> None:
        """One connection: handshake, session, dispatch until the stream ends. Raises why it ended."""
        async with self._security.open_channel(self.target) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)  # type: ignore[no-untyped-call]
            timeout_s = self._options.connect_timeout_s
            request = worker_pb2.HandshakeRequest(router_incarnation=self._router_incarnation, version=version())
            metadata = self._security.metadata
            reply = await stub.Handshake(request, timeout=timeout_s, metadata=metadata)
            self._expect.check(reply, self.target)
            call = stub.Session(metadata=(*metadata, (ROUTER_INCARNATION_KEY, self._router_incarnation)))
            writer: asyncio.Task[None] | None = None
            try:
                await self._check_session(call, reply.incarnation, timeout_s)
                self.handshake, self._stub = reply, stub
                self.connections += 1
                self.last_error = None
                self._commands.clear()
                writer = asyncio.create_task(self._write(call), name=f"worker-client writer {self.target}")
                self._set_ready(True)
                await self._read(call)
            finally:
                self._stub = None
                if writer is not None:
                    writer.cancel()
                    await asyncio.gather(writer, return_exceptions=True)
                call.cancel()

    async def _check_session(self, call: grpc.aio.StreamStreamCall, incarnation: str, timeout_s: float) -> None:
        """The worker that opens the Session must be the one that shook hands: it may have been restarted since."""
        try:
            async with asyncio.timeout(timeout_s):  # wait_for loses a cancellation at times (before Python 3.12)
                metadata = await call.initial_metadata()
        except TimeoutError:
            raise Unavailable(f"worker {self.target} did not open the session in {timeout_s} s") from None
        found = dict(metadata or ()).get(WORKER_INCARNATION_KEY)
        if found is None:  # refused before it began: the status says why
            raise Unavailable(f"worker {self.target} refused the session: {await call.details()}")
        if found != incarnation:
            raise Unavailable(f"worker {self.target} was restarted during the handshake ({incarnation} is now {found})")

    async def _read(self, call: grpc.aio.StreamStreamCall) -> None:
        """Dispatch until the stream ends; always raises."""
        open_sequences = self._open
        while (message := await call.read()) is not grpc.aio.EOF:
            self._take_stats(message.stats)
            for output in message.outputs:
                if output.finish:
                    on_output = open_sequences.pop(output.id, None)
                else:
                    on_output = open_sequences.get(output.id)
                if on_output is not None:
                    self._deliver(on_output, output)
        raise Unavailable(f"worker {self.target} ended the session: {await call.details() or 'stream closed'}")

    async def _write(self, call: grpc.aio.StreamStreamCall) -> None:
        """Send commands in order. A failed write ends the call, which the reader then sees."""
        while True:
            await self._commands_waiting.wait()
            self._commands_waiting.clear()
            while self._commands:
                await call.write(self._commands.popleft())

    def _deliver(self, on_output: OnOutput, output: worker_pb2.SequenceOutput) -> None:
        try:
            on_output(output)
        except Exception:
            log.exception("an output callback raised; the other sequences go on", sequence=output.id)

    def _fail_open(self, error: TokenRelayError) -> None:
        """Give everything open its one terminal output."""
        self._commands.clear()
        failed, text = list(self._open.items()), encode_error(_as_unavailable(error))
        self._open.clear()
        for sequence, on_output in failed:
            self._deliver(
                on_output,
                worker_pb2.SequenceOutput(id=sequence, finish=worker_pb2.FINISH_ERROR, error=text),
            )

    def _set_ready(self, ready: bool) -> None:
        self._changed.set()
        if ready != self.ready:
            self.ready = ready
            if self._on_ready is not None:
                self._on_ready(ready)


def _as_unavailable(error: TokenRelayError) -> TokenRelayError:
    return error if isinstance(error, Unavailable) else Unavailable(error.message)


def _because(error: TokenRelayError | None) -> str:
    return f": {error.message}" if error is not None else ""
