"""Same-host shared memory: the owner's memfd is mapped read-only by its readers, which copy out of it.

The descriptor passes over the control connection (SCM_RIGHTS, unix(7)). A reader copies a few megabytes at a time, each
time behind its gate, so that even a paused reader can be fenced. Needs a SharedPool, and one pid namespace.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading

import numpy as np
import numpy.typing as npt

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import ConfigError, TransferFailed
from tokenrelay.transfer.control import VERSION, Exported, Hello, Reader, Welcome, dial
from tokenrelay.transfer.gate import ReaderGate
from tokenrelay.transfer.memory import WORD_BYTES, Memory, Words, address_of
from tokenrelay.transfer.metrics import Metrics
from tokenrelay.transfer.owner import Owner
from tokenrelay.transfer.runs import Runs, bounded, split
from tokenrelay.transfer.security import Security, token_of
from tokenrelay.transfer.transport import Connection, Identity, Proof, Transport

CHUNK_BYTES = 8 << 20  # copied behind the gate at a time: about a millisecond
INLINE_BYTES = 512 << 10  # copied on the loop itself: that takes less than waking a thread


class SharedTransport(Transport):
    """Serves a SharedPool to the processes of this machine."""

    kind = "shared"

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
        """`listen`: `unix:PATH`. Raises ConfigError when the memory cannot be shared."""
        if memory.shared is None:
            raise ConfigError("shared memory needs its KV pool in a SharedPool")
        if not listen.startswith("unix:"):
            raise ConfigError(f"shared memory listens on unix:PATH, not on {listen!r}")
        super().__init__(identity, memory, metrics, advertise)
        self._pool = memory.shared
        self._token = token_of(token, security)
        self._owner = Owner(self, listen, self._welcome, gated=True, security=security)

    async def open(self) -> None:
        """Listen. Raises ConfigError that names the address."""
        await self._owner.open()

    def endpoint(self) -> bytes:
        """For a peer's `connect`; it names this incarnation."""
        return self.endpoint_at(self._owner.address)

    def _welcome(self, hello: Hello) -> tuple[Welcome, list[int]]:
        base, regions = self._pool.address, self.memory.regions
        exported = Exported(
            blocks=self.memory.blocks,
            addresses=tuple(region.address - base for region in regions),
            strides=tuple(region.block_stride for region in regions),
            generations=self.memory.generations - base,
            devices=(-1,) * len(regions),
        )
        welcome = Welcome(identity=self.identity, layout=self.memory.layout, exported=exported)
        return welcome, [self._pool.reader_fd()]

    async def connect(self, endpoint: bytes, deadline: Deadline) -> SharedConnection:
        """Map the peer's pool. Raises HandshakeRefused, Overloaded, DeadlineExceeded or TransferFailed."""
        wanted = self.wanted(endpoint)
        hello = Hello(
            version=VERSION, kind=self.kind, identity=self.identity, layout=self.memory.layout, token=self._token
        )
        control = await dial(wanted.address, hello, deadline)
        try:
            self.check_incarnation(wanted.identity, control.welcome.identity)
            self.memory.layout.check(self.identity.name, control.welcome.layout, control.welcome.identity.name)
            connection = SharedConnection(self, control)
        except BaseException:
            for fd in control.fds:
                os.close(fd)
            await control.close()
            raise
        self.remember(connection)
        return connection

    def peers(self) -> list[Identity]:
        """Who has this pool mapped."""
        return self._owner.peers()

    async def _cut_off(self, incarnation: str, deadline: Deadline, kill: bool) -> Proof:
        return await self._owner.cut_off(incarnation, deadline, kill)

    async def _shut(self) -> None:
        await self._owner.close()


class SharedConnection(Connection):
    """A mapping of a peer's pool."""

    def __init__(self, transport: SharedTransport, control: Reader) -> None:
        """Raises TransferFailed for a mapping that does not hold what the peer says."""
        exported = control.welcome.exported
        super().__init__(transport, control.welcome.identity, exported.blocks)
        if len(control.fds) != 2:
            raise TransferFailed(f"{len(control.fds)} descriptors came, expected a pool and a gate", reason="corrupt")
        size = os.fstat(control.fds[0]).st_size
        _check_exported(exported, transport.memory.layout.block_bytes, size)
        self._control = control
        self._remote = exported
        self._map = mmap.mmap(control.fds[0], size, mmap.MAP_SHARED, mmap.PROT_READ)
        self._base = address_of(self._map)
        self._gate = ReaderGate(control.fds[1])
        os.close(control.fds[0])
        control.fds.clear()
        control.listen(self._break, self.settled)

    async def _read(self, runs: Runs, deadline: Deadline) -> None:
        if runs.bytes(self.transport.memory.layout.block_bytes) <= INLINE_BYTES:
            self._copy(runs, deadline, threading.Event())
        else:
            await self._in_thread(lambda stop: self._copy(runs, deadline, stop))

    def _copy(self, runs: Runs, deadline: Deadline, stop: threading.Event) -> None:
        """In a thread, if it is much; ctypes lets the GIL go while it copies."""
        regions, sizes, remote = self.transport.memory.regions, self.transport.memory.layout.block_bytes, self._remote
        runs = bounded(runs, sizes, CHUNK_BYTES)
        for start, end in split(runs, sizes, CHUNK_BYTES):
            self._go_on(stop, deadline)
            columns = (column[start:end].tolist() for column in (runs.layers, runs.remote, runs.local, runs.blocks))
            with self._gate:
                for layer, remote_block, local_block, blocks in zip(*columns, strict=True):
                    there, here, size = remote.strides[layer], regions[layer].block_stride, sizes[layer]
                    source = self._base + remote.addresses[layer] + remote_block * there
                    target = regions[layer].address + local_block * here
                    if there == here == size:
                        ctypes.memmove(target, source, blocks * size)
                        continue
                    for block in range(blocks):
                        ctypes.memmove(target + block * here, source + block * there, size)

    async def _words(self, blocks: npt.NDArray[np.int64], deadline: Deadline) -> Words:
        with self._gate:
            offset = self._remote.generations
            return np.frombuffer(self._map, np.uint64, self.remote_blocks, offset)[blocks]

    async def _release(self) -> None:
        self._map.close()
        self._gate.close()
        await self._control.close()


def _check_exported(exported: Exported, block_bytes: tuple[int, ...], size: int) -> None:
    """Every block lies in the file, or reading it would be a SIGBUS."""
    layers, blocks = len(block_bytes), exported.blocks
    if blocks <= 0 or len(exported.addresses) != layers or len(exported.strides) != layers:
        raise TransferFailed(
            f"the peer describes {len(exported.addresses)} regions, expected {layers}", reason="corrupt"
        )
    for layer, (offset, stride) in enumerate(zip(exported.addresses, exported.strides, strict=True)):
        end = offset + (blocks - 1) * stride + block_bytes[layer]
        if offset < 0 or stride < block_bytes[layer] or end > size:
            raise TransferFailed(f"the peer's layer {layer} ends at {end}, its memory at {size}", reason="corrupt")
    end = exported.generations + blocks * WORD_BYTES
    if exported.generations < 0 or exported.generations % WORD_BYTES or end > size:
        raise TransferFailed(f"the peer's generations end at {end}, its memory at {size}", reason="corrupt")
