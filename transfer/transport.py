"""What every transport is: an owner's side that can be read and can fence, and connections that pull.

    transport = SharedTransport(Identity("decode-1", incarnation), memory, listen="unix:/run/decode-1.kv.sock")
    await transport.open()
    connection = await transport.connect(endpoint_of_the_prefill_service, deadline)
    await connection.pull(spans, deadline)
    await connection.validate(blocks, generations, deadline)

Errors: HandshakeRefused (the two do not fit, or were fenced), DeadlineExceeded (time was up, the transport may be
fine), TransferFailed (the transport or the peer is not), StaleGeneration, Overloaded. After any of them nothing of that
pull may be adopted; the local blocks may be reused once `settled()` has returned.
"""

from __future__ import annotations

import abc
import asyncio
import enum
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import msgspec
import numpy as np

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import (
    DeadlineExceeded,
    HandshakeRefused,
    Overloaded,
    StaleGeneration,
    TokenRelayError,
    TransferFailed,
)
from tokenrelay.base.logging import get_logger
from tokenrelay.transfer.memory import Blocks, Layout, Memory, Words
from tokenrelay.transfer.metrics import Metrics
from tokenrelay.transfer.runs import Runs, Span, coalesce

PULLS_MAX = 256  # of one transport, running and waiting for a thread
THREADS = 2  # that copy or wait for a device, per transport
FENCED_MAX = 65_536  # incarnations remembered as fenced
PEERS_MAX = 256
CLOSE_S = 5.0  # for a connection, when its transport closes
log = get_logger("transfer")
Result = TypeVar("Result")


class Identity(msgspec.Struct, frozen=True):
    """A process by its name, for people, and its incarnation, for everything else (law 6)."""

    name: str
    incarnation: str


class Endpoint(msgspec.Struct, frozen=True):
    """Where a transport is reached, and which life of it: what `Transport.endpoint()` encodes. Opaque to services."""

    kind: str
    address: str
    identity: Identity

    @staticmethod
    def decode(data: bytes) -> Endpoint:
        """Raises HandshakeRefused for anything else."""
        try:
            return msgspec.msgpack.decode(data, type=Endpoint)
        except msgspec.MsgspecError as error:
            raise HandshakeRefused(f"not a transfer endpoint: {error}") from error


class Proof(enum.Enum):
    """How the owner knows that a fenced peer reads no more."""

    ABSENT = "absent"  # it has no connection, and gets none
    ACKNOWLEDGED = "acknowledged"  # it said so, after its last read ended
    REVOKED = "revoked"  # its right to read is taken back: the owner itself reads for it, or holds the lock it needs
    GONE = "gone"  # its kernel closed the control connection, which it does after the last read, or for a dead process
    DEAD = "dead"  # its pidfd says that the process ended


class Connection(abc.ABC):
    """To one incarnation of a peer. Pulls may run at once; nothing is repeated, a broken connection stays broken."""

    def __init__(self, transport: Transport, peer: Identity, remote_blocks: int) -> None:
        self.transport = transport
        self.peer = peer
        self.remote_blocks = remote_blocks
        self._broken: TransferFailed | None = None
        self._reads: set[asyncio.Future[None]] = set()
        self._stop = threading.Event()  # set once: ends what reads
        self._closed = False

    async def pull(self, spans: Sequence[Span], deadline: Deadline) -> None:
        """Copy the extents into local blocks. Cancelling waits for the thread that copies (it looks up every few ms).

        Raises ValueError for extents that are not in the pools.
        """
        memory, metrics = self.transport.memory, self.transport.metrics
        runs = coalesce(spans, layers=len(memory.regions), remote_blocks=self.remote_blocks, local_blocks=memory.blocks)
        moved = runs.bytes(memory.layout.block_bytes)
        began_s = time.monotonic()
        with metrics.outcome(self.transport.kind):
            self._check(deadline)
            if len(runs):
                await self._read(runs, deadline)
            if self._broken is not None:
                raise self._broken
        metrics.moved(self.transport.kind, moved, len(runs), int(runs.blocks.sum()), time.monotonic() - began_s)

    async def generations(self, blocks: Blocks, deadline: Deadline) -> Words:
        """The peer's words of these blocks, uint64 [len(blocks)], read now: call it after the data came."""
        array = np.asarray(blocks, dtype=np.int64)
        if array.size and (array.min() < 0 or array.max() >= self.remote_blocks):
            raise ValueError(f"blocks has a block outside [0, {self.remote_blocks})")
        self._check(deadline)
        return await self._words(array, deadline)

    async def validate(self, blocks: Blocks, expected: Sequence[int] | Words, deadline: Deadline) -> None:
        """Law 4: raise StaleGeneration unless every block still has the generation it was offered with."""
        found = await self.generations(blocks, deadline)
        wanted = np.asarray(expected, dtype=np.uint64)
        if wanted.shape != found.shape:
            raise ValueError(f"{len(wanted)} generations for {len(found)} blocks")
        wrong = np.flatnonzero(found != wanted)
        if len(wrong):
            self.transport.metrics.stale(self.transport.kind)
            block, index = int(np.asarray(blocks)[wrong[0]]), wrong[0]
            raise StaleGeneration(
                f"{len(wrong)} of {len(found)} blocks of {self.peer.name} were reused, for example block {block}: "
                f"generation {int(found[index])}, offered with {int(wanted[index])}"
            )

    @property
    def broken(self) -> TransferFailed | None:
        """Why this connection is of no use any more."""
        return self._broken

    async def settled(self) -> None:
        """Wait until no pull of this connection can write into local memory. Law 2, for the destination's blocks."""
        while self._reads:
            await asyncio.wait(list(self._reads))

    async def close(self) -> None:
        """Stop reading, wait until nothing is written here, then give up the right to read. Once is enough."""
        if self._closed:
            return
        self._closed = True
        self._break(TransferFailed(f"the connection to {self.peer.name} was closed here", reason="closed"))
        await self.settled()
        await self._release()
        self.transport.forget(self)

    # For transports.

    @abc.abstractmethod
    async def _read(self, runs: Runs, deadline: Deadline) -> None:
        """Copy; return, or raise, when nothing is written any more or `settled` knows about it."""

    @abc.abstractmethod
    async def _words(self, blocks: np.typing.NDArray[np.int64], deadline: Deadline) -> Words:
        """The peer's generation words, read after this was called."""

    @abc.abstractmethod
    async def _release(self) -> None:
        """Give back what was held of the peer, and close."""

    def _check(self, deadline: Deadline) -> None:
        if self._broken is not None:
            raise self._broken
        if deadline.passed:
            raise DeadlineExceeded(f"the deadline of a pull from {self.peer.name} passed")

    def _break(self, error: TransferFailed) -> None:
        """The first reason stays."""
        if self._broken is None:
            self._broken = error
        self._stop.set()

    async def _in_thread(self, call: Callable[[threading.Event], None]) -> None:
        """Run a copy in a thread; it is given an event that asks it to end. Only returns when the thread is done."""
        stop = threading.Event()
        future = self.transport.submit(lambda: call(stop))
        waiter = asyncio.wrap_future(future)
        self._reads.add(waiter)
        waiter.add_done_callback(self._read_ended)
        try:
            await asyncio.shield(waiter)
        except asyncio.CancelledError:
            stop.set()
            if not future.cancel():
                await asyncio.wait([waiter])
            raise

    def _read_ended(self, waiter: asyncio.Future[None]) -> None:
        self._reads.discard(waiter)
        if not waiter.cancelled():
            waiter.exception()  # whoever was cancelled does not ask for it

    def _go_on(self, stop: threading.Event, deadline: Deadline) -> None:
        """In a thread, now and then: raise if the copy should end."""
        if self._stop.is_set() or stop.is_set():
            raise self._broken or TransferFailed("the pull was cancelled", reason="closed")
        if deadline.passed:
            raise DeadlineExceeded(f"the deadline of a pull from {self.peer.name} passed while it was copied")


class Transport(abc.ABC):
    """One per process and kind: serves its memory to peers, and connects to theirs. Used from one event loop."""

    kind: str

    def __init__(self, identity: Identity, memory: Memory, metrics: Metrics | None = None, advertise: str = "") -> None:
        self.identity = identity
        self._advertise = advertise
        self.memory = memory
        self.metrics = metrics or Metrics()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix=f"transfer-{self.kind}")
        self._pulls = 0
        self._pulls_lock = threading.Lock()
        self._connections: set[Connection] = set()
        self._fenced: OrderedDict[str, None] = OrderedDict()

    @abc.abstractmethod
    async def open(self) -> None:
        """Listen. Raises ConfigError that names the address."""

    @abc.abstractmethod
    def endpoint(self) -> bytes:
        """For a peer's `connect`; it names this incarnation."""

    @abc.abstractmethod
    async def connect(self, endpoint: bytes, deadline: Deadline) -> Connection:
        """A connection to exactly the incarnation that made the endpoint."""

    async def fence(self, incarnation: str, deadline: Deadline, *, kill: bool = False) -> Proof:
        """Take that incarnation's right to read away, for ever; return when it cannot touch memory any more, and why.

        Raises DeadlineExceeded when that is not known yet: its blocks stay in quarantine, and the call can be repeated.
        `kill` ends a process of this machine that does not let go, with SIGKILL.
        """
        self._fenced[incarnation] = None
        self._fenced.move_to_end(incarnation)
        while len(self._fenced) > FENCED_MAX:
            self._fenced.popitem(last=False)
        proof = await self._cut_off(incarnation, deadline, kill)
        self.metrics.fenced(self.kind, proof.value)
        return proof

    def readmit(self, incarnation: str) -> None:
        """Undo a fence, for a peer that has no claim left and joined again."""
        self._fenced.pop(incarnation, None)

    @abc.abstractmethod
    def peers(self) -> list[Identity]:
        """Who is connected to this memory now."""

    async def close(self) -> None:
        """Close the connections, then stop serving. Peers see the end of their connection."""
        for connection in list(self._connections):
            try:
                await asyncio.wait_for(connection.close(), CLOSE_S)
            except TimeoutError:  # a read that cannot be taken back; its right to read ends with this process
                log.warning("a connection did not settle", transport=self.kind, peer=connection.peer.name)
        await self._shut()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # For transports and their connections.

    @abc.abstractmethod
    async def _cut_off(self, incarnation: str, deadline: Deadline, kill: bool) -> Proof: ...

    @abc.abstractmethod
    async def _shut(self) -> None: ...

    def refusal(self, peer: Identity, layout: Layout, peers: int) -> TokenRelayError | None:
        """Why this peer may not read here, or None."""
        if peer.incarnation in self._fenced:
            return HandshakeRefused(f"{peer.name} ({peer.incarnation}) was fenced by {self.identity.name}")
        if peers >= PEERS_MAX:
            return Overloaded(f"{self.identity.name} serves {peers} peers already")
        try:
            self.memory.layout.check(self.identity.name, layout, peer.name)
        except HandshakeRefused as error:
            return error
        return None

    def endpoint_at(self, address: str) -> bytes:
        """The endpoint of a transport that listens there; peers of other machines are told `advertise` as the host."""
        if self._advertise and not address.startswith("unix:"):
            address = f"{self._advertise}:{address.rpartition(':')[2]}"
        return msgspec.msgpack.encode(Endpoint(self.kind, address, self.identity))

    def wanted(self, endpoint: bytes) -> Endpoint:
        """The endpoint, if it is one of this kind. Raises HandshakeRefused."""
        wanted = Endpoint.decode(endpoint)
        if wanted.kind != self.kind:
            raise HandshakeRefused(f"{wanted.identity.name} offers {wanted.kind}, {self.identity.name} has {self.kind}")
        return wanted

    def check_incarnation(self, wanted: Identity, found: Identity) -> None:
        """Raise HandshakeRefused when another life answers at the address (law 6)."""
        if wanted.incarnation != found.incarnation:
            raise HandshakeRefused(
                f"{wanted.name} was {wanted.incarnation} when it gave its address; {found.incarnation} answers there"
            )

    def remember(self, connection: Connection) -> None:
        """Closed with the transport."""
        self._connections.add(connection)

    def forget(self, connection: Connection) -> None:
        """It is closed."""
        self._connections.discard(connection)

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Run in one of the threads. Raises Overloaded past the bound."""
        with self._pulls_lock:
            if self._pulls >= PULLS_MAX:
                raise Overloaded(f"{self._pulls} pulls run or wait already")
            self._pulls += 1
        future = self._threads.submit(call)
        future.add_done_callback(self._pull_ended)
        return future

    def _pull_ended(self, _: object) -> None:
        with self._pulls_lock:
            self._pulls -= 1
