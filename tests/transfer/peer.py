"""The other process of a transfer test: obeys JSON lines on stdin, answers each with one on stdout.

python peer.py '{"kind": "shared", "name": "prefill-0", "listen": "unix:/tmp/x", "blocks": 64, "layout": {…}}'
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from pools import Pool, layout

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.ids import incarnation
from tokenrelay.transfer.runs import Span
from tokenrelay.transfer.select import open_transport
from tokenrelay.transfer.transport import Connection, Identity, Transport


class Peer:
    """One process: a pool, a transport, at most one connection."""

    def __init__(self, given: dict[str, Any]) -> None:
        fields = dict(given.get("layout", {}))
        fields["model_identity"] = fields.pop("identity", "m" * 16).encode()
        self.pool = Pool(layout(**fields), given["blocks"])
        self.transport: Transport = open_transport(
            given["kind"],
            Identity(given["name"], given.get("incarnation") or incarnation()),
            self.pool.memory,
            listen=given["listen"],
            token=given.get("token", ""),
        )
        self.connection: Connection | None = None
        self.pulling: asyncio.Task[None] | None = None

    async def obey(self, command: dict[str, Any]) -> Any:
        """One command; its result."""
        name = command.pop("do")
        return await getattr(self, f"do_{name}")(**command)

    async def do_endpoint(self) -> dict[str, str]:
        """Where we are, and who."""
        return {"endpoint": self.transport.endpoint().hex(), "incarnation": self.transport.identity.incarnation}

    async def do_fill(self, blocks: list[int], layers: list[int] | None = None) -> list[int]:
        """Write; the generations written."""
        self.pool.fill(blocks, layers)
        return [int(word) for word in self.pool.memory.words(blocks)]

    async def do_reuse(self, blocks: list[int]) -> None:
        """Give the blocks to somebody else: bump, then write."""
        self.pool.memory.bump(blocks)
        self.pool.fill(blocks)

    async def do_fence(self, incarnation: str, within_s: float, kill: bool = False) -> str:
        """Fence; the proof."""
        return (await self.transport.fence(incarnation, Deadline.after(within_s), kill=kill)).value

    async def do_readmit(self, incarnation: str) -> None:
        """Undo a fence."""
        self.transport.readmit(incarnation)

    async def do_peers(self) -> list[str]:
        """Who is connected."""
        return [peer.incarnation for peer in self.transport.peers()]

    async def do_connect(self, endpoint: str, within_s: float = 10) -> None:
        """Become a reader."""
        self.connection = await self.transport.connect(bytes.fromhex(endpoint), Deadline.after(within_s))

    async def do_pull(self, blocks: list[int], within_s: float = 10) -> None:
        """All layers of these blocks into the same numbers."""
        assert self.connection is not None
        span = Span(0, len(self.pool.layout.block_bytes), blocks, blocks)
        await self.connection.pull([span], Deadline.after(within_s))

    async def do_pull_for_ever(self, blocks: list[int]) -> None:
        """Pull again and again, until it fails."""

        async def pull() -> None:
            while True:
                await self.do_pull(blocks, 60)

        self.pulling = asyncio.create_task(pull())

    async def do_pull_outcome(self, within_s: float = 20) -> str:
        """How that ended."""
        assert self.pulling is not None
        try:
            await asyncio.wait_for(self.pulling, within_s)
        except TokenRelayError as error:
            return f"{error.code} {getattr(error, 'reason', '')}".strip()
        return "ended"

    async def do_processor_s(self) -> float:
        """Used so far, all threads."""
        return time.process_time()

    async def do_metrics(self) -> dict[str, dict[str, float]]:
        """Counters."""
        return {name: dict(values) for name, _, _, values in self.transport.metrics.samples()}


def main() -> None:
    """Until stdin ends."""
    asyncio.run(serve(Peer(json.loads(sys.argv[1]))))


async def serve(peer: Peer) -> None:
    """Commands run at once, each is answered under its number."""
    await peer.transport.open()
    loop, lines = asyncio.get_running_loop(), asyncio.Queue[str]()

    def read() -> None:
        for line in sys.stdin:
            loop.call_soon_threadsafe(lines.put_nowait, line)
        loop.call_soon_threadsafe(lines.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    tasks = set()
    print(json.dumps({"ready": True}), flush=True)
    while line := await lines.get():
        task = asyncio.create_task(answer(peer, json.loads(line)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    if peer.pulling is not None:
        peer.pulling.cancel()
    await peer.transport.close()


async def answer(peer: Peer, command: dict[str, Any]) -> None:
    """One line back: the result, or the error's code and message."""
    number = command.pop("number")
    try:
        print(json.dumps({"number": number, "result": await peer.obey(command)}), flush=True)
    except TokenRelayError as error:
        print(json.dumps({"number": number, "error": error.code, "message": error.message}), flush=True)


if __name__ == "__main__":
    main()
