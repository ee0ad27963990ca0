"""NIXL over UCX: readers read the owner's registered memory by themselves (UCX chooses RDMA, CMA, TCP, ...).

The handshake and the fence are the control connection's. On a Unix socket it carries a gate, which a reader holds while
a read of its is under way. Between machines there is no gate: a reader that neither answers nor ends stays quarantined.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import ConfigError, DeadlineExceeded, TransferFailed
from tokenrelay.transfer.control import VERSION, Active, Exported, Hello, Reader, Welcome, dial
from tokenrelay.transfer.gate import ReaderGate
from tokenrelay.transfer.memory import WORD_BYTES, Memory, Words
from tokenrelay.transfer.metrics import Metrics
from tokenrelay.transfer.nixl_agent import Descriptors, NixlAgent
from tokenrelay.transfer.owner import Owner
from tokenrelay.transfer.runs import Runs, Span, bounded, coalesce, split
from tokenrelay.transfer.security import Security, token_of
from tokenrelay.transfer.transport import Connection, Identity, Proof, Transport

READ_BYTES = 64 << 20  # of one NIXL transfer: some ten milliseconds, so that a deadline or a fence is noticed
READ_DESCRIPTORS = 8192


class NixlTransport(Transport):
    """Serves registered memory, of the host or of one CUDA device."""

    kind = "nixl"

    def __init__(
        self,
        identity: Identity,
        memory: Memory,
        *,
        listen: str,
        token: str = "",
        security: Security | None = None,
        metrics: Metrics | None = None,
        advertise: str = "",
    ) -> None:
        """`listen`: of the control connection, `unix:PATH` or `HOST:PORT`. Raises ConfigError."""
        super().__init__(identity, memory, metrics, advertise)
        devices = {region.device for region in memory.regions}
        if len(devices) != 1:
            raise ConfigError(f"regions on several devices ({devices}): NIXL takes one pool of one device")
        self.device = next(iter(devices))
        self._token = token_of(token, security)
        self._owner = Owner(self, listen, self._welcome, gated=False, security=security, on_change=self._peers_changed)
        self._opened: NixlAgent | None = None
        self._metadata = b""
        self._references: dict[str, int] = {}  # agent -> connections

    @property
    def agent(self) -> NixlAgent:
        """After `open`."""
        assert self._opened is not None, "the transport is not open"
        return self._opened

    async def open(self) -> None:
        """Register the memory and listen. Raises ConfigError."""
        self._opened = await asyncio.to_thread(self._register)
        await self._owner.open()

    def _register(self) -> NixlAgent:
        agent = NixlAgent(self.identity.incarnation)
        try:
            regions = [(region.address, region.bytes, region.device or 0) for region in self.memory.regions]
            agent.register(np.array(regions, dtype=np.uint64), memory_kind(self.device))
            words = [(self.memory.generations, self.memory.blocks * WORD_BYTES, 0)]
            agent.register(np.array(words, dtype=np.uint64), "DRAM")
            self._metadata = agent.metadata()
        except TransferFailed as error:
            agent.close()
            raise ConfigError(f"NIXL cannot register the KV pool: {error.message}") from error
        return agent

    def endpoint(self) -> bytes:
        """For a peer's `connect`; it names this incarnation."""
        return self.endpoint_at(self._owner.address)

    def _welcome(self, hello: Hello) -> tuple[Welcome, list[int]]:
        regions = self.memory.regions
        exported = Exported(
            blocks=self.memory.blocks,
            addresses=tuple(region.address for region in regions),
            strides=tuple(region.block_stride for region in regions),
            generations=self.memory.generations,
            devices=tuple(-1 if region.device is None else region.device for region in regions),
        )
        layout = self.memory.layout
        return Welcome(identity=self.identity, layout=layout, exported=exported, metadata=self._metadata), []

    def _peers_changed(self) -> None:
        self.agent.peers_read(any(session.reading for session in self._owner.sessions))

    async def connect(self, endpoint: bytes, deadline: Deadline) -> NixlConnection:
        """Raises HandshakeRefused, Overloaded, DeadlineExceeded or TransferFailed."""
        wanted = self.wanted(endpoint)
        hello = Hello(
            version=VERSION, kind=self.kind, identity=self.identity, layout=self.memory.layout, token=self._token
        )
        control = await dial(wanted.address, hello, deadline)
        try:
            self.check_incarnation(wanted.identity, control.welcome.identity)
            self.memory.layout.check(self.identity.name, control.welcome.layout, control.welcome.identity.name)
            _check_exported(control.welcome.exported, self.memory.layout.block_bytes)
            agent = await asyncio.wrap_future(self.agent.add_peer(control.welcome.metadata))
            if agent != control.welcome.identity.incarnation:
                raise TransferFailed(f"NIXL metadata of {agent!r} came from {wanted.identity.name}", reason="corrupt")
            connection = await asyncio.to_thread(NixlConnection, self, control, agent)
        except BaseException:
            for fd in control.fds:
                os.close(fd)
            await control.close()
            raise
        connection.listen()
        self._references[agent] = self._references.get(agent, 0) + 1
        self.remember(connection)
        return connection

    async def release(self, agent: str) -> None:
        """One connection less."""
        self._references[agent] -= 1
        if not self._references[agent]:
            del self._references[agent]
            with contextlib.suppress(TransferFailed):  # it is gone already
                await asyncio.wrap_future(self.agent.remove_peer(agent))

    def peers(self) -> list[Identity]:
        """Who may read."""
        return self._owner.peers()

    async def _cut_off(self, incarnation: str, deadline: Deadline, kill: bool) -> Proof:
        return await self._owner.cut_off(incarnation, deadline, kill)

    async def _shut(self) -> None:
        await self._owner.close()
        if self._opened is not None:
            await asyncio.to_thread(self._opened.close)


class NixlConnection(Connection):
    """A peer whose metadata is loaded."""

    def __init__(self, transport: NixlTransport, control: Reader, agent: str) -> None:
        """Blocking: it registers room for the generation words. Raises TransferFailed."""
        exported = control.welcome.exported
        super().__init__(transport, control.welcome.identity, exported.blocks)
        self._nixl = transport
        self._agent = agent
        self._control = control
        self._remote = exported
        self._staged: Words = np.zeros(exported.blocks, dtype=np.uint64)
        rows = np.array([(self._staged.ctypes.data, self._staged.nbytes, 0)], dtype=np.uint64)
        self._registration = transport.agent.register(rows, "DRAM")
        self._gate = ReaderGate(control.fds.pop()) if control.fds else None
        self._words_lock = asyncio.Lock()
        self._active = 0

    def listen(self) -> None:
        """On the loop."""
        self._control.listen(self._break, self.settled)

    async def _read(self, runs: Runs, deadline: Deadline) -> None:
        memory = self.transport.memory
        sizes = np.asarray(memory.layout.block_bytes, dtype=np.int64)
        here = [(region.address, region.block_stride) for region in memory.regions]
        there = list(zip(self._remote.addresses, self._remote.strides, strict=True))
        runs = bounded(runs, memory.layout.block_bytes, READ_BYTES)
        if any(pair[1] != size for side in (here, there) for pair, size in zip(side, sizes, strict=True)):
            runs = bounded(runs, memory.layout.block_bytes, 1)  # blocks do not touch: one descriptor each
        lengths = runs.blocks * sizes[runs.layers]
        source = _descriptors(there, runs.layers, runs.remote, lengths, max(0, self._remote.devices[0]))
        target = _descriptors(here, runs.layers, runs.local, lengths, self._nixl.device or 0)
        kinds = memory_kind(None if self._remote.devices[0] < 0 else 0), memory_kind(self._nixl.device)
        with self._reading():
            for first, last in split(runs, memory.layout.block_bytes, READ_BYTES):
                for start in range(first, last, READ_DESCRIPTORS):
                    end = min(last, start + READ_DESCRIPTORS)
                    await self._post((kinds[0], source[start:end]), (kinds[1], target[start:end]), deadline)

    async def _post(self, source: tuple[str, Descriptors], target: tuple[str, Descriptors], deadline: Deadline) -> None:
        """One NIXL read. It cannot be taken back: where it is given up, `settled` waits for it."""
        self._check(deadline)
        self._control.send(Active(True))
        gate = self._gate or contextlib.nullcontext()
        read = asyncio.wrap_future(self._nixl.agent.read(self._agent, source, target, gate))
        self._reads.add(read)
        read.add_done_callback(self._read_ended)
        left_s = deadline.left_s()
        done, _ = await asyncio.wait([read], timeout=None if left_s == float("inf") else left_s)
        if not done:
            raise DeadlineExceeded(f"the deadline of a pull from {self.peer.name} passed while NIXL read")
        error = read.exception()
        if error is not None:
            raise self._broken or error

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """The owner is told to make progress meanwhile, and until what was given up has ended."""
        self._active += 1
        try:
            yield
        finally:
            self._active -= 1
            self._say_when_idle()

    def _read_ended(self, waiter: asyncio.Future[None]) -> None:
        super()._read_ended(waiter)
        self._say_when_idle()

    def _say_when_idle(self) -> None:
        if not self._active and not self._reads:
            self._control.send(Active(False))

    async def _words(self, blocks: npt.NDArray[np.int64], deadline: Deadline) -> Words:
        """One at a time: an older answer must not overwrite a newer one."""
        numbers = np.unique(blocks)
        runs = coalesce(
            [Span(0, 1, numbers, numbers)], layers=1, remote_blocks=self.remote_blocks, local_blocks=self.remote_blocks
        )
        offsets, lengths = runs.remote * WORD_BYTES, runs.blocks * WORD_BYTES
        async with self._words_lock:
            with self._reading():
                for start in range(0, len(runs), READ_DESCRIPTORS):
                    part = slice(start, start + READ_DESCRIPTORS)
                    source = _rows(self._remote.generations + offsets[part], lengths[part], 0)
                    target = _rows(self._staged.ctypes.data + offsets[part], lengths[part], 0)
                    await self._post(("DRAM", source), ("DRAM", target), deadline)
            return self._staged[blocks]

    async def _release(self) -> None:
        await asyncio.to_thread(self._nixl.agent.deregister, self._registration)
        await self._nixl.release(self._agent)
        if self._gate is not None:
            self._gate.close()
        await self._control.close()


def memory_kind(device: int | None) -> str:
    """NIXL's name for memory of a CUDA device, or of the host."""
    return "DRAM" if device is None else "VRAM"


def _rows(addresses: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], device: int) -> Descriptors:
    return np.stack([addresses, lengths, np.full_like(addresses, device)], axis=1).astype(np.uint64)


def _descriptors(
    regions: list[tuple[int, int]],
    layers: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    device: int,
) -> Descriptors:
    """Of runs: uint64 [n, 3], address, bytes, device."""
    bases, strides = np.array(regions, dtype=np.int64).T
    return _rows(bases[layers] + blocks * strides[layers], lengths, device)


def _check_exported(exported: Exported, block_bytes: tuple[int, ...]) -> None:
    """What NIXL does not check by itself: it refuses what lies outside the registered memory."""
    layers = len(block_bytes)
    if exported.blocks <= 0 or not len(exported.addresses) == len(exported.strides) == len(exported.devices) == layers:
        raise TransferFailed(
            f"the peer describes {len(exported.addresses)} regions of {exported.blocks} blocks, expected {layers}",
            reason="corrupt",
        )
    if len(set(exported.devices)) != 1 or any(s < size for s, size in zip(exported.strides, block_bytes, strict=True)):
        raise TransferFailed("the peer's regions overlap, or lie on several devices", reason="corrupt")
