"""The block tier: KV blocks in host memory and on disk that outlive their worker, for every worker of the fleet.

    tier = BlockTier(memory_bytes=1 << 28, disk=Path("/var/tier"), disk_bytes=1 << 34)
    await tier.start()                                  # finds what an earlier life left
    await tier.put(Block(block_hash, layout, payload))  # memory at once, disk behind
    await tier.get(block_hash, layout)

A cache: it may forget at any time, and says so by None. Bounded in bytes in memory, on disk and on the way there; what
does not fit is refused and counted, nobody waits for a disk. Event loop only; files are touched in threads of its own.
"""

from __future__ import annotations

import asyncio
import errno
import functools
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Block, Code, Rejection
from tokenrelay.ledger.segments import Segments
from tokenrelay.ledger.tier_files import BlockFiles, Corrupt, Key, checksum

log = get_logger("tier")

BLOCK_BYTES_MAX = 48 << 20  # below the wire's bound of a message
LAYOUT_BYTES_MAX = 512
UNWRITTEN_BYTES_MAX = 256 << 20
READS_MAX = 64  # waiting for the disk; one more is a miss
READ_TIMEOUT_S = 2.0
DISK_REST_MIN_S, DISK_REST_MAX_S = 1.0, 60.0  # no write is tried for so long after one that failed
THREADS = 4
Result = TypeVar("Result")


class BlockTier:
    """Implements `Tier`. `disk` None: memory alone."""

    def __init__(
        self,
        *,
        memory_bytes: int,
        disk: Path | None = None,
        disk_bytes: int = 0,
        unwritten_bytes_max: int = UNWRITTEN_BYTES_MAX,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.memory: Segments[Key] = Segments(memory_bytes)
        self.disk: Segments[Key] = Segments(disk_bytes if disk is not None else 0)
        self._blocks: dict[Key, tuple[bytes, bytes]] = {}  # of `memory`: (payload, checksum)
        self._files = None if disk is None else BlockFiles(disk)
        self._folder = disk
        self._unwritten: dict[Key, tuple[bytes, bytes]] = {}
        self._unwritten_bytes = 0
        self._unwritten_bytes_max = unwritten_bytes_max
        self._doomed: deque[Key] = deque()  # files to be removed
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tier")
        self._reads = 0
        self._rest_until_s = 0.0  # on the loop's clock
        self._rest_s = DISK_REST_MIN_S

    # -- life ---------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Find what is on disk, and begin to write. Raises ConfigError when the folder cannot be used."""
        if self._files is None:
            return
        try:
            found = await self._in_thread(self._files.scan)
        except OSError as error:
            raise ConfigError(f"the tier's folder {self._folder}: {error.strerror or error}") from error
        for entry in found:
            if entry.bytes > self.disk.bytes_max:
                self._doomed.append(entry.key)
            else:
                self._doomed.extend(self.disk.add(entry.key, entry.bytes))
        log.info("tier", folder=str(self._folder), blocks=len(self.disk), bytes=self.disk.bytes)
        self._work.set()
        self._writer = asyncio.create_task(self._write(), name="tier-writer")

    async def stop(self, flush_s: float = 0.0) -> None:
        """End it, after `flush_s` seconds for what is not on disk yet, at most."""
        if flush_s:
            await self.flushed(flush_s)
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.cancel()
            await asyncio.gather(writer, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def flushed(self, timeout_s: float) -> bool:
        """Whether everything is on disk, within `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._writer is not None and (self._unwritten or self._doomed or not self._idle.is_set()):
                    self._idle.clear()
                    self._work.set()
                    await self._idle.wait()
        except TimeoutError:
            return False
        return True

    # -- Tier ---------------------------------------------------------------------------------------------------------
    async def put(self, block: Block) -> Rejection | None:
        """See `Tier`."""
        return self.keep(block, await self.digest(block.payload))

    async def digest(self, payload: bytes) -> bytes:
        """The payload's checksum, made in a thread: megabytes take milliseconds."""
        return await self._in_thread(functools.partial(checksum, payload))

    def keep(self, block: Block, digest: bytes) -> Rejection | None:
        """Keep a block whose checksum is known to be right."""
        invalid = _invalid(block)
        if invalid is not None:
            return self._refuse(Code.INVALID, invalid)
        key, size = (block.layout, block.block_hash), len(block.payload)
        if key in self.memory or key in self.disk or key in self._unwritten:
            self.memory.touch(key)
            self.disk.touch(key)
            self.counts["put_known"] += 1
            return None
        in_memory = size <= self.memory.bytes_max
        if in_memory:
            for evicted in self.memory.add(key, size):
                del self._blocks[evicted]
                self.counts["evicted_memory"] += 1
            self._blocks[key] = (block.payload, digest)
        reason = self._write_soon(key, block.payload, digest)
        if reason is not None and not in_memory:
            return self._refuse(Code.FULL, reason)
        self.counts["put"] += 1
        return None

    async def get(self, block_hash: bytes, layout: str) -> Block | None:
        """See `Tier`."""
        found = await self.fetch(block_hash, layout)
        return None if found is None else found[0]

    async def fetch(self, block_hash: bytes, layout: str) -> tuple[Block, bytes] | None:
        """The block and its checksum."""
        key = (layout, block_hash)
        found = self._blocks.get(key) or self._unwritten.get(key)
        where = "memory"
        if found is not None:
            self.memory.touch(key)
            self.disk.touch(key)
        elif key in self.disk:
            found, where = await self._read(key), "disk"
        self.counts["get_missed" if found is None else f"get_{where}"] += 1
        return None if found is None else (Block(block_hash, layout, found[0]), found[1])

    async def contains(self, block_hashes: Sequence[bytes], layout: str) -> int:
        """See `Tier`."""
        for count, block_hash in enumerate(block_hashes):
            key = (layout, block_hash)
            if key not in self._blocks and key not in self._unwritten and key not in self.disk:
                return count
        return len(block_hashes)

    def _refuse(self, code: Code, reason: str) -> Rejection:
        self.counts[f"refused_{code.value}"] += 1
        return Rejection(code, reason)

    # -- disk ---------------------------------------------------------------------------------------------------------
    def _write_soon(self, key: Key, payload: bytes, digest: bytes) -> str | None:
        """Why it will not be on disk, or None."""
        if self._files is None:
            return "there is no tier on disk, and none in memory that is large enough"
        reason = None
        if BlockFiles.size(key, len(payload)) > self.disk.bytes_max:
            reason = f"a block of {len(payload)} bytes is larger than the whole tier"
        elif self._rest_until_s > asyncio.get_running_loop().time():
            reason = "the disk failed a moment ago"
        elif self._unwritten_bytes + len(payload) > self._unwritten_bytes_max:
            reason = f"{self._unwritten_bytes} bytes wait to be written already"
        if reason is not None:
            self.counts["not_written"] += 1
            return reason
        self._unwritten[key] = (payload, digest)
        self._unwritten_bytes += len(payload)
        self._work.set()
        return None

    async def _write(self) -> None:
        """One file at a time, oldest first."""
        while True:
            while self._doomed:
                await self._remove(self._doomed.popleft())
            if self._unwritten:
                await self._write_one(next(iter(self._unwritten)))
                continue
            self._idle.set()
            await self._work.wait()
            self._work.clear()

    async def _write_one(self, key: Key) -> None:
        assert self._files is not None
        payload, digest = self._unwritten[key]
        size = BlockFiles.size(key, len(payload))
        for evicted in self.disk.add(key, size):  # makes room before it is needed
            self.counts["evicted_disk"] += 1
            await self._remove(evicted)
        try:
            await self._in_thread(functools.partial(self._files.write, key, payload, digest))
            self.counts["written"] += 1
            self._rest_s = DISK_REST_MIN_S
        except OSError as error:
            self.disk.remove(key)
            self._disk_failed(error)
        except Exception:  # a bug, and no reason to write nothing any more
            self.disk.remove(key)
            log.exception("a block was not written")
        finally:
            del self._unwritten[key]
            self._unwritten_bytes -= len(payload)

    def _disk_failed(self, error: OSError) -> None:
        """Full, or broken: nothing is written for a while. Whatever waits would fail too."""
        self.counts[f"disk_{errno.errorcode.get(error.errno or 0, 'error')}"] += 1
        log.error("the tier's disk failed", error=str(error), rest_s=self._rest_s)
        self._rest_until_s = asyncio.get_running_loop().time() + self._rest_s
        self._rest_s = min(2 * self._rest_s, DISK_REST_MAX_S)

    async def _remove(self, key: Key) -> None:
        assert self._files is not None
        try:
            await self._in_thread(functools.partial(self._files.remove, key))
        except OSError as error:
            self._disk_failed(error)

    async def _read(self, key: Key) -> tuple[bytes, bytes] | None:
        assert self._files is not None
        if self._reads >= READS_MAX:
            self.counts["reads_refused"] += 1
            return None
        self._reads += 1
        try:
            async with asyncio.timeout(READ_TIMEOUT_S):
                found = await self._in_thread(functools.partial(self._files.read, key))
        except Corrupt as error:
            log.error("a block on disk is not what was written: dropped", block_hash=key[1].hex(), error=str(error))
            self.counts["corrupt"] += 1
            found = None
            self._doomed.append(key)
            self._work.set()
        except TimeoutError:
            self.counts["reads_timed_out"] += 1
            return None
        except OSError as error:
            self._disk_failed(error)
            return None
        finally:
            self._reads -= 1
        if found is None:
            self.disk.remove(key)
            return None
        self.disk.touch(key)
        if len(found[0]) <= self.memory.bytes_max:
            for evicted in self.memory.add(key, len(found[0])):
                del self._blocks[evicted]
                self.counts["evicted_memory"] += 1
            self._blocks[key] = found
        return found

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)


def _invalid(block: Block) -> str | None:
    if len(block.block_hash) != 16:
        return f"block_hash has {len(block.block_hash)} bytes, expected 16"
    if not 0 < len(block.layout.encode()) <= LAYOUT_BYTES_MAX:
        return f"layout has {len(block.layout.encode())} bytes, expected 1 to {LAYOUT_BYTES_MAX}"
    if not 0 < len(block.payload) <= BLOCK_BYTES_MAX:
        return f"payload has {len(block.payload)} bytes, expected 1 to {BLOCK_BYTES_MAX}"
    return None
