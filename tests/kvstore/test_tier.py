"""The block tier: bounds, what goes first, restarts, a disk that lies, is full or hangs; embedded and by wire."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
import signal
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from kv_fleet import Fleet
from kv_process import KvProcess

from tokenrelay.base.errors import ConfigError
from tokenrelay.ledger.api import Block, Code, Rejection, Tier
from tokenrelay.ledger.segments import Segments
from tokenrelay.ledger.tier import BlockTier
from tokenrelay.ledger.tier_client import TierClient
from tokenrelay.ledger.tier_files import BlockFiles, Key, checksum
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.proto import kvstore_pb2_grpc
from tokenrelay.services.kvstore.folders import FOLDERS_MAX, own_folder

LAYOUT = "bfloat16 mla 512+64 x64"
KIB = 1024


def block(number: int, size: int = KIB, layout: str = LAYOUT) -> Block:
    seed = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    return Block(seed, layout, random.Random(number).randbytes(size))


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest_asyncio.fixture(params=["embedded", "kvstore"])
async def tiers(request: pytest.FixtureRequest, empty_fleet: Fleet) -> AsyncIterator[tuple[Tier, Tier]]:
    """The tier as two workers see it."""
    if request.param == "embedded":
        tier = BlockTier(memory_bytes=64 * KIB, disk=empty_fleet.folder / "tier", disk_bytes=1024 * KIB)
        await tier.start()
        yield tier, tier
        await tier.stop()
        return
    await empty_fleet.start_service(
        tier_memory_bytes=64 * KIB, tier_dir=str(empty_fleet.folder / "tier"), tier_disk_bytes=1024 * KIB
    )
    clients = [TierClient((await empty_fleet.kvstore_client()).connection) for _ in range(2)]
    yield clients[0], clients[1]
    for client in clients:
        await client.close()


def code(answer: object) -> Code | None:
    return answer.code if isinstance(answer, Rejection) else None


async def test_what_one_worker_puts_another_one_reads(tiers: tuple[Tier, Tier]) -> None:
    writer, reader = tiers
    blocks = [block(number, 8 * KIB) for number in range(20)]  # more than memory holds
    for one in blocks:
        assert await writer.put(one) is None
    assert await writer.put(blocks[0]) is None, "again changes nothing"
    hashes = [one.block_hash for one in blocks]
    assert await reader.contains([*hashes, bytes(16)], LAYOUT) == 20
    assert await reader.contains([bytes(16), *hashes], LAYOUT) == 0
    for one in blocks:
        assert await reader.get(one.block_hash, LAYOUT) == one
    assert await reader.get(blocks[0].block_hash, "float32 mla 512+64 x64") is None, "another layout never sees it"
    assert await reader.get(bytes(16), LAYOUT) is None
    for bad in (
        Block(b"short", LAYOUT, b"x"),
        Block(bytes(16), "", b"x"),
        Block(bytes(16), "l" * 600, b"x"),
        Block(bytes(16), LAYOUT, b""),
    ):
        assert code(await writer.put(bad)) is Code.INVALID
    assert code(await writer.put(block(99, 2048 * KIB))) is Code.FULL


async def test_a_restart_finds_everything_and_drops_what_is_damaged(tmp_path: Path) -> None:
    blocks = [block(number) for number in range(8)]
    tier = BlockTier(memory_bytes=0, disk=tmp_path, disk_bytes=1024 * KIB)
    await tier.start()
    for one in blocks:
        assert await tier.put(one) is None
    assert await tier.flushed(5)
    await tier.stop()
    files = BlockFiles(tmp_path)
    paths = [files.path((LAYOUT, one.block_hash)) for one in blocks]
    flipped = bytearray(paths[0].read_bytes())
    flipped[-1] ^= 1
    paths[0].write_bytes(flipped)  # as long as before: seen when it is read
    paths[1].write_bytes(paths[1].read_bytes()[:-10])  # cut short: seen at once
    paths[2].write_bytes(b"")
    paths[3].write_bytes(paths[4].read_bytes())  # another block's content
    (paths[0].parent / "crashed.part").write_bytes(b"half")
    (tmp_path / "stranger.txt").write_bytes(b"what is this")

    again = BlockTier(memory_bytes=0, disk=tmp_path, disk_bytes=1024 * KIB)
    await again.start()
    assert len(again.disk) == 5 and len(files_of(tmp_path)) == 5
    assert [await again.get(one.block_hash, LAYOUT) == one for one in blocks] == [False] * 4 + [True] * 4
    assert again.counts["corrupt"] == 1 and await again.flushed(5)
    assert len(files_of(tmp_path)) == 4, "the corrupt one is gone"
    assert await again.put(blocks[0]) is None and await again.flushed(5)
    assert await again.get(blocks[0].block_hash, LAYOUT) == blocks[0]
    paths[5].write_bytes(paths[5].read_bytes()[:-1])  # cut short while it runs
    paths[6].unlink()
    assert await again.get(blocks[5].block_hash, LAYOUT) is None
    assert await again.get(blocks[6].block_hash, LAYOUT) is None
    assert await again.contains([blocks[5].block_hash], LAYOUT) == 0
    await again.stop()


async def test_it_stays_within_its_bytes_and_the_least_useful_goes_first(tmp_path: Path) -> None:
    tier = BlockTier(memory_bytes=10 * KIB, disk=tmp_path, disk_bytes=20 * KIB)
    await tier.start()
    shared = [block(number) for number in range(3)]
    for one in shared:
        await tier.put(one)
        assert await tier.get(one.block_hash, LAYOUT) == one  # asked for again
    for number in range(100, 200):  # long unique prompts pass through
        await tier.put(block(number))
        await tier.flushed(5)
        assert tier.memory.bytes <= 10 * KIB and tier.disk.bytes <= 20 * KIB
    on_disk = files_of(tmp_path)
    assert sum(path.stat().st_size for path in on_disk) == tier.disk.bytes <= 20 * KIB
    assert len(on_disk) == len(tier.disk) > 10
    for one in shared:
        assert await tier.get(one.block_hash, LAYOUT) == one, "what many share outlives it"
    assert await tier.get(block(100).block_hash, LAYOUT) is None
    await tier.stop()
    smaller = BlockTier(memory_bytes=0, disk=tmp_path, disk_bytes=5 * KIB)
    await smaller.start()
    assert await smaller.flushed(5)
    assert sum(path.stat().st_size for path in files_of(tmp_path)) <= 5 * KIB
    await smaller.stop()


class FullFiles(BlockFiles):
    """A disk without room."""

    full = True

    def write(self, key: Key, payload: bytes, digest: bytes) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(key, payload, digest)


async def test_a_full_disk_is_counted_and_refused_and_serves_again_when_there_is_room(tmp_path: Path) -> None:
    tier = BlockTier(memory_bytes=0, disk=tmp_path, disk_bytes=1024 * KIB)
    files = tier._files = FullFiles(tmp_path)
    await tier.start()
    assert await tier.put(block(1)) is None, "nobody knows yet"
    assert await tier.flushed(5)
    assert tier.counts["disk_ENOSPC"] == 1 and len(tier.disk) == 0 and tier.disk.bytes == 0
    answer = await asyncio.wait_for(tier.put(block(2)), 1)
    assert isinstance(answer, Rejection) and answer.code is Code.FULL and "disk failed" in answer.reason
    assert await tier.get(block(1).block_hash, LAYOUT) is None
    files.full = False
    tier._rest_until_s = 0.0
    assert await tier.put(block(3)) is None and await tier.flushed(5)
    assert await tier.get(block(3).block_hash, LAYOUT) == block(3)
    await tier.stop()


async def test_a_disk_that_hangs_delays_nobody(tmp_path: Path) -> None:
    release = threading.Event()

    class HungFiles(BlockFiles):
        def write(self, key: Key, payload: bytes, digest: bytes) -> None:
            release.wait(20)

    tier = BlockTier(memory_bytes=4 * KIB, disk=tmp_path, disk_bytes=1024 * KIB, unwritten_bytes_max=8 * KIB)
    tier._files = HungFiles(tmp_path)
    await tier.start()
    async with asyncio.timeout(2):
        for number in range(50):
            assert await tier.put(block(number)) is None
        assert await tier.get(block(49).block_hash, LAYOUT) == block(49)
        assert not await tier.flushed(0.05)
    assert tier.counts["not_written"] == 42 and tier._unwritten_bytes <= 8 * KIB
    without_memory = BlockTier(memory_bytes=0, disk=tmp_path, disk_bytes=1024 * KIB, unwritten_bytes_max=2 * KIB)
    without_memory._files = tier._files
    await without_memory.start()
    assert [code(await without_memory.put(block(number))) for number in range(4)] == [None, None, Code.FULL, Code.FULL]
    release.set()
    await without_memory.stop()
    await tier.stop()


async def test_a_folder_that_cannot_be_used_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ConfigError, match="tier's folder"):
        await BlockTier(memory_bytes=0, disk=tmp_path / "file", disk_bytes=KIB).start()


async def test_bytes_that_changed_on_the_way_are_refused(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    async with grpc.aio.insecure_channel(service.address) as channel:
        stub = kvstore_pb2_grpc.KvstoreStub(channel)  # type: ignore[no-untyped-call]
        one = block(1)
        request = pb.PutBlockRequest(block_hash=one.block_hash, layout=LAYOUT, payload=one.payload)
        request.checksum = checksum(one.payload + b"!")
        assert (await stub.PutBlock(request)).rejection.code == "invalid"
        assert not (await stub.GetBlock(pb.GetBlockRequest(block_hash=one.block_hash, layout=LAYOUT))).found
        assert (await stub.CountBlocks(pb.CountBlocksRequest(block_hashes=b"half", layout=LAYOUT))).count == 0
    assert service.store.malformed.total() == 2
    assert service.store.tier is not None
    await service.store.tier.put(one)
    key = (LAYOUT, one.block_hash)
    service.store.tier._blocks[key] = (one.payload[:-1] + b"?", service.store.tier._blocks[key][1])
    client = TierClient((await empty_fleet.kvstore_client()).connection)
    assert await client.get(one.block_hash, LAYOUT) is None and client.counts["corrupt"] == 1
    await client.close()


async def test_without_a_kvstore_the_tier_is_empty(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client = TierClient((await empty_fleet.kvstore_client()).connection, timeout_s=0.5)
    await client.put(block(1))
    await service.stop()
    empty_fleet.services.clear()
    assert await client.get(block(1).block_hash, LAYOUT) is None
    assert code(await client.put(block(2))) is Code.UNAVAILABLE
    assert await client.contains([block(1).block_hash], LAYOUT) == 0
    await client.close()


async def test_kill_9_while_blocks_are_written(empty_fleet: Fleet, tmp_path: Path) -> None:
    fields = {"tier_dir": str(tmp_path / "tier"), "tier_memory_bytes": 0}
    process = KvProcess(tmp_path, "kv", **fields)
    tier = TierClient((await empty_fleet.kvstore_client(process.address)).connection)
    blocks = [block(number, 256 * KIB) for number in range(24)]
    putting = [asyncio.create_task(tier.put(one)) for one in blocks]
    await asyncio.wait(putting, return_when=asyncio.FIRST_COMPLETED)
    process.signal(signal.SIGKILL)
    process.wait()
    await asyncio.gather(*putting)
    await tier.close()
    again = BlockTier(memory_bytes=0, disk=tmp_path / "tier/0", disk_bytes=1 << 30)
    await again.start()
    found = [await again.get(one.block_hash, LAYOUT) for one in blocks]
    assert all(one is None or one == expected for one, expected in zip(found, blocks, strict=True))
    assert not list((tmp_path / "tier").rglob("*.part"))
    await again.stop()


async def test_kvstores_with_one_folder_do_not_share_files(empty_fleet: Fleet, tmp_path: Path) -> None:
    """A standby on the same volume has its own part; who comes after a dead one finds that one's blocks."""
    fields = {"tier_dir": str(tmp_path / "tier"), "tier_memory_bytes": 0}
    first, second = (KvProcess(tmp_path, name, **fields) for name in ("first", "second"))
    try:
        for number, one in enumerate((first, second)):
            tier = TierClient((await empty_fleet.kvstore_client(one.address)).connection)
            assert await tier.put(block(number)) is None
            await tier.close()
        until = time.monotonic() + 10
        while [len([*(tmp_path / "tier" / part).rglob("??/*")]) for part in "01"] != [1, 1]:
            assert time.monotonic() < until, [*(tmp_path / "tier").rglob("*")]
            await asyncio.sleep(0.02)
        first.signal(signal.SIGKILL)
        first.wait()
        third = KvProcess(tmp_path, "third", **fields)
        tier = TierClient((await empty_fleet.kvstore_client(third.address)).connection)
        assert await tier.get(block(0).block_hash, LAYOUT) == block(0)
        assert await tier.get(block(1).block_hash, LAYOUT) is None
        await tier.close()
        third.close()
    finally:
        first.close()
        second.close()


def test_a_folder_that_no_kvstore_can_have(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"kvstore\.tier_dir: .*file: Not a directory|File exists"):
        own_folder(tmp_path / "file")
    locks = [own_folder(tmp_path / "tier")[0] for _ in range(FOLDERS_MAX)]
    with pytest.raises(ConfigError, match=r"64 kvstores use .*tier already"):
        own_folder(tmp_path / "tier")
    os.close(locks[5])
    lock, folder = own_folder(tmp_path / "tier")
    assert folder == tmp_path / "tier/5"
    for one in (*locks[:5], *locks[6:], lock):
        os.close(one)


@given(st.lists(st.tuples(st.sampled_from("atr"), st.integers(0, 9), st.integers(1, 40)), max_size=80))
def test_segments_agree_with_plain_counting(steps: list[tuple[str, int, int]]) -> None:
    segments: Segments[int] = Segments(100)
    kept: dict[int, int] = {}
    for kind, key, size in steps:
        if kind == "a":
            evicted = segments.add(key, size)
            kept.pop(key, None)
            assert key not in evicted and len(set(evicted)) == len(evicted)
            for gone in evicted:
                del kept[gone]
            kept[key] = size
        elif kind == "t":
            assert segments.touch(key) == (key in kept)
        else:
            assert segments.remove(key) == (kept.pop(key, None) is not None)
        assert set(segments.keys()) == set(kept) and segments.bytes == sum(kept.values()) <= 100
