"""Workers found through a kvstore: who joins is used, who leaves is not, and a lost kvstore stops nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from router_mesh import Mesh
from router_stack import until


@pytest.fixture
async def mesh(tmp_path: Path, model_folder: Path) -> AsyncIterator[Mesh]:
    mesh = Mesh(tmp_path, model_folder)
    await mesh.start()
    yield mesh
    await mesh.close()


async def test_workers_come_and_go(mesh: Mesh) -> None:
    status, reply = await mesh.stack.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]})
    assert status == 503
    assert "none is known" in reply["error"]["message"]
    first = await mesh.join("a")
    await until(lambda: mesh.used == {"a"})
    await mesh.stack.chat()
    await mesh.join("b")
    await until(lambda: mesh.used == {"a", "b"})
    # One leaves in good order: what it still serves goes on until its connection ends.
    await first.leave(mesh.members["a"].actor)
    await asyncio.sleep(0.05)
    await mesh.workers["a"].stop()
    await until(lambda: [client.target for client in mesh.router.pool.clients] == [mesh.workers["b"].address])
    await mesh.stack.chat()


async def test_what_ran_on_the_last_but_one_worker_goes_on(mesh: Mesh) -> None:
    for name in "ab":
        await mesh.join(name)
    await until(lambda: mesh.used == {"a", "b"})
    for worker in mesh.workers.values():
        worker.host.step_s = 0.01
        worker.say("The quick brown fox jumps over the lazy dog")
    streams = [asyncio.create_task(mesh.stack.chat_stream()) for _ in range(4)]
    await until(lambda: all(worker.running for worker in mesh.workers.values()))
    await mesh.clients[0].leave(mesh.members["a"].actor)
    await mesh.workers["a"].stop()
    for events in await asyncio.wait_for(asyncio.gather(*streams), 10):
        assert events[-1] == "[DONE]"


async def test_a_lost_kvstore_stops_nothing(mesh: Mesh) -> None:
    await mesh.join("a")
    await until(lambda: mesh.used == {"a"})
    await mesh.stop_kvstore()
    await asyncio.sleep(0.1)
    await mesh.stack.chat()
    await mesh.start_kvstore()
    await mesh.join("b")
    await until(lambda: "b" in mesh.used, timeout_s=10)
    await mesh.stack.chat()
