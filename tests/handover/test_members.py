"""Workers of any role are members: they join, tell what they hold, pair or are refused, and are missed."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from kv_process import KvProcess
from worker_process import Stream, WorkerProcess, connect, submit_message

from tokenrelay.ledger.api import Joined, Member, Rejection
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.prefixes import Prefixes
from tokenrelay.services.router.service import RouterService
from tokenrelay.services.router.workers import WorkerPool

PROMPT = [random.Random(i).randrange(3, 380) for i in range(100)]  # 6 blocks of 16 and a part of one


class Scene:
    """A kvstore, workers of this model, and what a router would know of them."""

    def __init__(self, model: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="trm-")
        self.model = model
        self.workers: dict[str, WorkerProcess] = {}
        self.prefixes = Prefixes()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        self.kvstore = await asyncio.to_thread(KvProcess, Path(self._folder.name), "kv")
        self.ledger = KvstoreClient([self.kvstore.address])
        self.ledger.start()
        watcher = Member(name="watcher", incarnation="w", role="router")
        joined = await self.ledger.join(watcher, lease_s=30)
        assert isinstance(joined, Joined)
        self.prefixes.join(joined.hash_key)
        self._tasks.append(asyncio.create_task(self.prefixes.follow(self.ledger)))

    async def worker(self, name: str, *flags: str, model: Path | None = None) -> dict[str, object]:
        """Start one; its last status line."""
        flags = ("--name", name, "--kvstore", self.kvstore.address, "--lease-s", "1.0", "--blocks", "40", *flags)
        worker = self.workers[name] = WorkerProcess("--slots", "4", *flags, model=model or self.model)
        return await asyncio.to_thread(worker.wait_settled)

    async def members(self) -> dict[str, Member]:
        found = await self.ledger.members()
        assert not isinstance(found, Rejection)
        return {member.name: member for member in found if member.role != "router"}

    async def compute(self, name: str, salt: bytes = b"") -> None:
        client = await connect(self.workers[name])
        stream = Stream()
        client.submit(submit_message(PROMPT, 4, salt=salt), stream)
        await stream.ended()
        await client.close()

    async def held(self, salt: bytes = b"") -> dict[str, int]:
        """Blocks of the prompt by worker, as a router knows it."""
        for member in (await self.members()).values():
            self.prefixes.learn(member)
        found = self.prefixes.cached_tokens(np.array(PROMPT, dtype="<u4").tobytes(), salt)
        return {Path(target.removeprefix("unix:")).parent.name: tokens // 16 for target, tokens in found.items()}

    def place(self, name: str) -> str:
        """What `held` calls this worker."""
        return Path(self.workers[name].socket).parent.name

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self.workers.values():
            worker.close()
        await self.ledger.close()
        self.kvstore.close()
        self._folder.cleanup()


@pytest.fixture
async def scene(checkpoints: dict[str, Path]) -> AsyncIterator[Scene]:
    scene = Scene(checkpoints["mla"])
    try:
        await scene.start()
        yield scene
    finally:
        await scene.close()


async def until(holds: Callable[[], object]) -> None:
    for _ in range(200):
        if await holds():  # type: ignore[misc]
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come to that")


async def test_a_colocated_worker_is_a_member_until_it_drains(scene: Scene) -> None:
    settled = await scene.worker("alone")
    assert settled["event"] == "ready", scene.workers["alone"].log.read_text()
    member = (await scene.members())["alone"]
    assert (member.role, member.block_tokens, member.dtype) == ("colocated", 16, "float32")
    await scene.compute("alone")
    await scene.compute("alone", salt=b"tenant")
    place = scene.place("alone")
    await until(lambda: _equals(scene.held(), {place: 6}))
    await until(lambda: _equals(scene.held(b"tenant"), {place: 6}))
    assert await scene.held(b"another") == {}
    scene.workers["alone"].signal(signal.SIGTERM)
    assert await asyncio.to_thread(scene.workers["alone"].wait) == 0
    assert await scene.members() == {}
    await until(lambda: _equals(scene.held(), {}))


async def test_a_worker_that_is_killed_is_missed(scene: Scene) -> None:
    await asyncio.gather(scene.worker("a", "--role", "prefill"), scene.worker("b", "--role", "decode"))
    for name in "ab":
        await scene.compute(name)
    await until(lambda: _equals(scene.held(), {scene.place("a"): 6, scene.place("b"): 6}))
    scene.workers["a"].signal(signal.SIGKILL)
    await until(lambda: _equals(scene.held(), {scene.place("b"): 6}))  # when its lease is over
    assert set(await scene.members()) == {"b"}


async def test_two_that_differ_do_not_pair(scene: Scene, checkpoints: dict[str, Path]) -> None:
    assert (await scene.worker("first"))["event"] == "ready"
    differing: dict[str, tuple[tuple[str, ...], Path | None]] = {
        "block_tokens": (("--block-tokens", "32"), None),
        "model_identity": ((), checkpoints["gqa"]),
        "dtype": (("--dtype", "bfloat16"), None),
        "layout": (("--kv-dtype", "fp8"), None),
    }
    seconds = (scene.worker(f"second-{field}", *flags, model=model) for field, (flags, model) in differing.items())
    for field, settled in zip(differing, await asyncio.gather(*seconds), strict=True):
        assert settled["event"] == "failed"
        for word in ("first", f"second-{field}", field):
            assert word in str(settled), settled
    assert set(await scene.members()) == {"first"}


async def _equals(call: object, wanted: dict[str, int]) -> bool:
    return await call == wanted  # type: ignore[misc]


async def test_routers_find_what_real_workers_have(checkpoints: dict[str, Path]) -> None:
    """Two routers, one after the other: the second knows nothing of the conversation but what the directory says."""
    scene = Scene(checkpoints["bundled"])
    routers: list[RouterService] = []
    try:
        await scene.start()
        await asyncio.gather(scene.worker("a"), scene.worker("b"))
        prompt = " ".join(f"line {i} of a file" for i in range(40))
        served: list[tuple[str, int]] = []
        for times in (1, 3):  # workers that have as much to do take turns, if nothing else tells them apart
            config = dataclasses.replace(RouterConfig(), port=0, kvstore=(scene.kvstore.address,))
            routers.append(RouterService(config))
            port, pool = await routers[-1].start(), routers[-1].pool
            await until(lambda pool=pool: _has(pool, 2))
            for _ in range(times):
                before = {client.target: await client.get_stats() for client in pool.clients}
                cached = await complete(port, prompt)
                for client in pool.clients:
                    if (await client.get_stats()).prompt_tokens > before[client.target].prompt_tokens:
                        served.append((client.target, cached))
                await until(lambda pool=pool: _knows(pool))
        first = served[0][0]
        assert [target for target, _ in served] == [first] * 4
        assert served[0][1] == 0 and all(cached >= 160 for _, cached in served[1:])
    finally:
        for router in routers:
            await router.stop()
        await scene.close()


async def complete(port: int, prompt: str) -> int:
    """How many tokens of the prompt were in a cache."""
    body = {"prompt": prompt, "max_tokens": 2, "temperature": 0}
    async with (
        aiohttp.ClientSession() as http,
        http.post(f"http://127.0.0.1:{port}/v1/completions", json=body) as reply,
    ):
        answer = await reply.json()
        assert reply.status == 200, answer
        return int((answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0)


async def _has(pool: WorkerPool, workers: int) -> bool:
    return len(pool.usable) == workers


async def _knows(pool: WorkerPool) -> bool:
    return len(pool.prefixes.directory) >= 10
