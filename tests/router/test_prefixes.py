"""The router's copy of the prefix directory: who has how much of a prompt, after every kind of gap, and for whom."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mock_worker import BLOCK_TOKENS
from router_mesh import Mesh
from router_stack import until

from tokenrelay.ledger.api import Joined, Member, Rejection
from tokenrelay.ledger.feed import DirectoryFeed
from tokenrelay.libscheduler import block_hashes
from tokenrelay.services.router import prefixes as module
from tokenrelay.services.router.prefixes import Prefixes

IDENTITY = b"m" * 16
PROMPT = [3 + i % 200 for i in range(10 * BLOCK_TOKENS + 7)]


def packed(token_ids: list[int]) -> bytes:
    return np.array(token_ids, dtype="<u4").tobytes()


def hashes(token_ids: list[int], key: bytes, salt: bytes = b"") -> list[bytes]:
    """As the scheduler of a worker makes them."""
    ids = np.array(token_ids, dtype=np.uint32)
    return block_hashes(ids, block_tokens=BLOCK_TOKENS, hash_key=key, model_identity=IDENTITY, salt=salt)


class Feeding(Mesh):
    """And workers that tell what they hold."""

    def __init__(self, folder: Path, model: Path) -> None:
        super().__init__(folder, model)
        self.feeds: dict[str, DirectoryFeed] = {}

    async def worker(self, name: str, life: str = "1", blocks: int = 0, salt: bytes = b"") -> None:
        """A worker that has the first `blocks` blocks of PROMPT."""
        client = await self.join(name, life)
        feed = self.feeds[name] = DirectoryFeed(client, self.members[name].actor)
        client.on_renewed.append(feed.renew)
        feed.start()
        feed.publish([("sealed", block_hash) for block_hash in hashes(PROMPT, self.hash_key, salt)[:blocks]])

    def held(self, salt: bytes = b"") -> dict[str, int]:
        """Blocks of PROMPT, as the router knows them, by worker."""
        found = self.router.pool.prefixes.cached_tokens(packed(PROMPT), salt)
        names = {worker.address: name for name, worker in self.workers.items()}
        return {names[target]: tokens // BLOCK_TOKENS for target, tokens in found.items()}

    async def close(self) -> None:
        for feed in self.feeds.values():
            await feed.stop()
        await super().close()


@pytest.fixture
async def mesh(tmp_path: Path, model_folder: Path) -> AsyncIterator[Feeding]:
    mesh = Feeding(tmp_path, model_folder)
    await mesh.start()
    yield mesh
    await mesh.close()


async def complete(mesh: Feeding, salt: str = "", prompt: list[int] = PROMPT, tokens: int = 2) -> None:
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": tokens}
    status, reply = await mesh.stack.post("/v1/completions", body | ({"cache_salt": salt} if salt else {}))
    assert status == 200, reply


def served(mesh: Feeding) -> dict[str, int]:
    return {name: len(worker.submits) for name, worker in mesh.workers.items()}


async def test_a_prompt_goes_where_most_of_it_is(mesh: Feeding) -> None:
    for name, blocks in (("a", 2), ("b", 7), ("c", 0)):
        await mesh.worker(name, blocks=blocks)
    await until(lambda: mesh.held() == {"a": 2, "b": 7} and len(mesh.used) == 3)
    for _ in range(4):
        await complete(mesh)
    assert served(mesh) == {"a": 0, "b": 4, "c": 0}
    mesh.feeds["b"].publish([("evicted", block_hash) for block_hash in hashes(PROMPT, mesh.hash_key)[1:7]])
    await until(lambda: mesh.held() == {"a": 2, "b": 1})
    await complete(mesh)
    assert served(mesh)["a"] == 1
    other = [5] * (2 * BLOCK_TOKENS)  # nobody has it: to whom has least to do, and was not chosen for longest
    for _ in range(3):
        await complete(mesh, prompt=other)
    assert served(mesh) == {"a": 2, "b": 5, "c": 1}


async def test_what_moves_goes_where_most_of_it_is(mesh: Feeding) -> None:
    """Its worker dies; of the others the one is chosen that need not compute the prompt again."""
    for name, blocks in (("a", 8), ("b", 0), ("c", 0), ("d", 5)):
        await mesh.worker(name, blocks=blocks)
    await until(lambda: mesh.held() == {"a": 8, "d": 5} and len(mesh.used) == 4)
    mesh.workers["a"].host.step_s = 0.05
    running = asyncio.create_task(complete(mesh, tokens=40))
    await until(lambda: served(mesh)["a"] == 1)
    await mesh.workers["a"].stop()
    await asyncio.wait_for(running, 10)
    assert served(mesh) == {"a": 1, "b": 0, "c": 0, "d": 1}


async def test_salts_are_never_shared(mesh: Feeding) -> None:
    await mesh.worker("a", blocks=8, salt=b"tenant-1")
    await mesh.worker("b")
    await until(lambda: mesh.held(b"tenant-1") == {"a": 8} and len(mesh.used) == 2)
    assert mesh.held() == {} and mesh.held(b"tenant-2") == {}
    for _ in range(3):
        await complete(mesh, "tenant-1")
    assert served(mesh) == {"a": 3, "b": 0}


async def test_the_routers_own_turns_go_first(mesh: Feeding) -> None:
    """What this router knows of a conversation is newer than what the directory says."""
    await mesh.worker("a")
    await mesh.worker("b", blocks=10)
    await until(lambda: mesh.held() == {"b": 10} and len(mesh.used) == 2)
    for client in mesh.router.pool.clients:
        assert client.handshake is not None
        client.handshake.next_turns = True
    mesh.router.pool.prefixes.forget("b")
    while not mesh.workers["a"].submits:  # a first turn at `a`, as far as this router's memory goes
        await complete(mesh)
    mesh.router.pool.prefixes.learn(mesh.members["b"])
    before = served(mesh)["a"]
    turn = mesh.router.pool.turns.find(packed([*PROMPT, 1, 2, 3, 4]), b"")
    assert turn is not None
    target = turn.turn.client.target
    for _ in range(3):
        await complete(mesh, prompt=[*PROMPT, 1, 2, 3, 4])
    name = next(name for name, worker in mesh.workers.items() if worker.address == target)
    assert name == "a" and served(mesh)["a"] == before + 3


async def test_two_routers_know_the_same(mesh: Feeding) -> None:
    await mesh.worker("a", blocks=3)
    first = mesh.router
    await until(lambda: mesh.held() == {"a": 3})
    await mesh.start_router()  # as one that restarted does: it is told everything
    await until(lambda: mesh.held() == {"a": 3})
    mesh.feeds["a"].publish([("sealed", block_hash) for block_hash in hashes(PROMPT, mesh.hash_key)[3:5]])
    for router in (first, mesh.router):
        await until(lambda router=router: set(router.pool.prefixes.cached_tokens(packed(PROMPT)).values()) == {320})  # type: ignore[misc]


async def test_what_a_dead_worker_had_vanishes(mesh: Feeding) -> None:
    await mesh.worker("a", blocks=3)
    await mesh.worker("b", blocks=1)
    await until(lambda: mesh.held() == {"a": 3, "b": 1})
    assert mesh.kvstore is not None
    mesh.kvstore.store.host.end([mesh.members["a"].actor], "nothing was heard of it")
    await until(lambda: mesh.held() == {"b": 1})
    await mesh.worker("a", life="2", blocks=2)
    await until(lambda: mesh.held() == {"a": 2, "b": 1})


async def test_a_gap_is_filled(mesh: Feeding) -> None:
    await mesh.worker("a", blocks=3)
    await until(lambda: mesh.held() == {"a": 3})
    feed = mesh.feeds["a"]
    feed._sequence += 1  # a batch was lost on its way
    feed.publish([("evicted", hashes(PROMPT, mesh.hash_key)[2])])
    await until(lambda: mesh.held() == {"a": 2})
    assert feed.resyncs == 1


async def test_a_kvstore_that_restarts_is_told_everything(mesh: Feeding) -> None:
    """And hands on the key that its members hash with, though it has forgotten it."""
    await mesh.worker("a", blocks=3)
    await until(lambda: mesh.held() == {"a": 3})
    before = mesh.hash_key
    await mesh.stop_kvstore()
    assert mesh.held() == {"a": 3}  # the last copy stays in use
    await mesh.start_kvstore()
    await until(lambda: mesh.kvstore is not None and bool(mesh.kvstore.store.host.roster.find("a")), timeout_s=10)
    await mesh.worker("b", blocks=6)
    assert mesh.hash_key == before
    await until(lambda: mesh.held() == {"a": 3, "b": 6}, timeout_s=10)


async def test_a_router_that_was_given_another_key_joins_anew(mesh: Feeding) -> None:
    """It was faster than the members that hold KV when their kvstore came back."""
    await mesh.worker("a", blocks=3)
    client, feed = mesh.clients[0], mesh.feeds["a"]
    await feed.stop()
    await client.close()
    await mesh.stop_kvstore()
    await mesh.start_kvstore()
    assert mesh.kvstore is not None
    host = mesh.kvstore.store.host
    await until(lambda: len(host.roster.members()) == 1, timeout_s=10)  # the router
    joined = mesh.kvstore.store.reattach(mesh.members["a"], 30.0, [], b"k" * 16)
    assert isinstance(joined, Joined) and joined.hash_key == b"k" * 16
    await until(lambda: mesh.router.pool.prefixes.hash_key == b"k" * 16, timeout_s=10)
    other = dataclasses.replace(mesh.members["a"], name="b")
    refused = mesh.kvstore.store.reattach(other, 30.0, [], b"x" * 16)
    assert isinstance(refused, Rejection) and "a and b" in refused.reason.replace("b and a", "a and b")
    assert "hash_key" in refused.reason


def test_a_copy_of_another_life_is_not_believed() -> None:
    prefixes = Prefixes()
    prefixes.join(b"k" * 16)
    old, new = (
        Member(name="a", incarnation=life, role="decode", address="x", model_identity=IDENTITY, block_tokens=64)
        for life in "12"
    )
    prefixes.learn(old)
    prefixes.directory.resync("a", "1", 1, hashes(PROMPT, b"k" * 16))
    assert prefixes.cached_tokens(packed(PROMPT)) == {"x": 640}
    prefixes.learn(new)
    assert prefixes.cached_tokens(packed(PROMPT)) == {}
    prefixes.directory.resync("a", "2", 1, hashes(PROMPT, b"k" * 16)[:1])
    prefixes.learn(old)
    prefixes.forget("a")  # the end of the first life, heard of after the second began
    prefixes.learn(new)
    assert prefixes.cached_tokens(packed(PROMPT)) == {"x": 64}


def test_a_lookup_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOOKUP_TOKENS_MAX", 4 * BLOCK_TOKENS)
    prefixes = Prefixes()
    prefixes.join(b"k" * 16)
    prefixes.learn(
        Member(name="a", incarnation="1", role="decode", address="x", model_identity=IDENTITY, block_tokens=64)
    )
    prefixes.directory.resync("a", "1", 1, hashes(PROMPT, b"k" * 16))
    assert prefixes.cached_tokens(packed(PROMPT)) == {"x": 4 * BLOCK_TOKENS}
    for short in ([], PROMPT[: BLOCK_TOKENS - 1]):
        assert prefixes.cached_tokens(packed(short)) == {}
