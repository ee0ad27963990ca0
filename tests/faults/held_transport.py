"""A transport between pools of one process whose reads can be held, slowed and cut, at exactly the wrong moment.

It behaves like the worst of the real ones: a read that was given up still writes when it goes on, and a fence of a
reader in the middle of a read has no proof until that read has ended, unless `revocable`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import numpy.typing as npt

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, TransferFailed
from tokenrelay.transfer.memory import Memory, Words
from tokenrelay.transfer.runs import Runs
from tokenrelay.transfer.transport import Connection, Identity, Proof, Transport


class Wire:
    """Between all transports of a test."""

    def __init__(self) -> None:
        self.owners: dict[str, HeldTransport] = {}  # by address: the life that listens there now
        self.before_read: Callable[[], Awaitable[None]] = _at_once  # of each run
        self.open = asyncio.Event()  # reads wait while it is not set
        self.open.set()
        self.waiting = asyncio.Event()  # a read waits
        self.connect_held = asyncio.Event()  # connections wait while it is not set
        self.connect_held.set()

    def hold(self) -> None:
        """Reads that begin from now on wait."""
        self.open.clear()


async def _at_once() -> None:
    return None


class HeldTransport(Transport):
    """Owner and reader."""

    kind = "held"

    def __init__(self, identity: Identity, memory: Memory, kv: npt.NDArray[np.int64], wire: Wire, address: str) -> None:
        super().__init__(identity, memory)
        self.kv = kv
        self.revocable = False
        self.wire = wire
        self.address = address
        self.readers: set[HeldConnection] = set()
        self.gone = asyncio.Event()  # its process is dead: no read of it goes on

    async def open(self) -> None:
        """Listen."""
        self.wire.owners[self.address] = self

    def endpoint(self) -> bytes:
        """For a peer's `connect`."""
        return self.endpoint_at(self.address)

    async def connect(self, endpoint: bytes, deadline: Deadline) -> HeldConnection:
        """To the life that listens there now."""
        wanted = self.wanted(endpoint)
        await asyncio.wait_for(self.wire.connect_held.wait(), deadline.left_s())
        owner = self.wire.owners.get(wanted.address)
        if owner is None:
            raise TransferFailed(f"nobody listens at {wanted.address}", reason="peer_gone")
        self.check_incarnation(wanted.identity, owner.identity)
        if (refusal := owner.refusal(self.identity, self.memory.layout, len(owner.readers))) is not None:
            raise refusal
        connection = HeldConnection(self, owner)
        owner.readers.add(connection)
        return connection

    def peers(self) -> list[Identity]:
        """Who reads here."""
        return [reader.transport.identity for reader in self.readers]

    async def _cut_off(self, incarnation: str, deadline: Deadline, kill: bool) -> Proof:
        readers = [reader for reader in self.readers if reader.transport.identity.incarnation == incarnation]
        for reader in readers:
            reader.break_off(TransferFailed("fenced", reason="fenced"))
        if not self.revocable:
            try:
                async with asyncio.timeout(deadline.left_s()):
                    for reader in readers:
                        await reader.settled()
            except TimeoutError:
                raise DeadlineExceeded(f"{incarnation} is in the middle of a read") from None
        return Proof.REVOKED if readers else Proof.ABSENT

    async def _shut(self) -> None:
        self.gone.set()
        for reader in self.readers:
            reader.break_off(TransferFailed("the owner is gone", reason="peer_gone"))


class HeldConnection(Connection):
    """Copies when it may."""

    def __init__(self, transport: HeldTransport, owner: HeldTransport) -> None:
        super().__init__(transport, owner.identity, owner.memory.blocks)
        self._here, self._owner = transport, owner
        self._cut = asyncio.Event()

    def break_off(self, error: TransferFailed) -> None:
        """What begins now fails. What reads already goes on, unless the owner is `revocable`."""
        self._break(error)

    def disconnect(self) -> None:
        """The network is cut: what is under way ends as well, wherever it is."""
        self._cut.set()
        self._break(TransferFailed("the connection broke", reason="peer_gone"))

    async def _read(self, runs: Runs, deadline: Deadline) -> None:
        read = asyncio.ensure_future(self._move(runs))
        self._reads.add(read)
        read.add_done_callback(self._read_ended)
        left_s = deadline.left_s()
        done, _ = await asyncio.wait([read], timeout=None if left_s == float("inf") else left_s)
        if not done:
            raise DeadlineExceeded("the deadline of a pull passed")
        read.result()

    async def _move(self, runs: Runs) -> None:
        for remote, local, blocks in zip(runs.remote.tolist(), runs.local.tolist(), runs.blocks.tolist(), strict=True):
            await self._here.wire.before_read()
            if not self._here.wire.open.is_set():
                self._here.wire.waiting.set()
                await _first_of(self._here.wire.open, self._cut, self._owner.gone)
            if self._cut.is_set() or self._owner.gone.is_set() or (self._broken is not None and self._owner.revocable):
                raise self._broken or TransferFailed("the owner is gone", reason="peer_gone")
            self._here.kv[local : local + blocks] = self._owner.kv[remote : remote + blocks]

    async def _words(self, blocks: npt.NDArray[np.int64], deadline: Deadline) -> Words:
        return self._owner.memory.words(blocks)

    async def _release(self) -> None:
        self._owner.readers.discard(self)


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
