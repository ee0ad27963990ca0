"""One prefill and one decode worker with a kvstore, and a router's two legs in a few lines."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from kv_process import KvProcess
from worker_process import Stream, WorkerProcess, connect, submit_message

from tokenrelay.ledger.api import Actor, HandleView, Rejection
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient

PREFILL, DECODE = worker_pb2.Handover.ROLE_SOURCE, worker_pb2.Handover.ROLE_DESTINATION
TIMES = (
    "--lease-s",
    "1.0",
    "--read-deadline-s",
    "2.0",
    "--handle-deadline-s",
    "20",
    "--transfer-deadline-s",
    "20",
    "--ledger-wait-s",
    "1.0",
)


@dataclass
class Relayed:
    """A request on two legs: what each said, and the text a client would see."""

    source: Stream
    destination: Stream | None = None

    @property
    def token_ids(self) -> list[int]:
        """In the order of the text."""
        return self.source.token_ids + (self.destination.token_ids if self.destination else [])

    @property
    def finish(self) -> int:
        """Of the request: the source's, unless it handed over."""
        terminal = self.source.terminals[0]
        if terminal.finish != worker_pb2.FINISH_HANDOVER or self.destination is None:
            return terminal.finish
        return self.destination.terminals[0].finish


class Fleet:
    """The processes, and a client of each."""

    def __init__(
        self,
        model: Path,
        *,
        transport: str = "",
        chunk_tokens: int = 32,
        prefill_blocks: int = 120,
        decode_blocks: int = 120,
        more: dict[str, tuple[str, ...]] | None = None,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="trf-")  # short: a socket's path has at most 107 bytes
        self.model = model
        self.flags = ["--slots", "8", "--chunk-tokens", str(chunk_tokens), *TIMES]
        if transport:
            self.flags += ["--transports", transport]
        self._more = more or {}  # flags of one role's worker
        self._blocks = {"prefill": prefill_blocks, "decode": decode_blocks}
        self.workers: dict[str, WorkerProcess] = {}
        self.clients: dict[str, WorkerClient] = {}

    async def start(self) -> None:
        """All of it, ready."""
        self.kvstore = await asyncio.to_thread(KvProcess, Path(self._folder.name), "kv")
        self.ledger = KvstoreClient([self.kvstore.address])
        self.ledger.start()
        await asyncio.gather(self.start_worker("prefill"), self.start_worker("decode"))

    async def start_kvstore(self) -> None:
        """Another life of it, at the same address."""
        self.kvstore.close()
        self.kvstore = await asyncio.to_thread(KvProcess, Path(self._folder.name), "kv")

    async def start_worker(self, role: str) -> None:
        """A life of this role's worker."""
        flags = ["--role", role, "--name", role, "--kvstore", self.kvstore.address, *self.flags]
        flags += self._more.get(role, ())
        worker = WorkerProcess(*flags, "--blocks", str(self._blocks[role]), "--admin-port", "0", model=self.model)
        self.workers[role] = worker
        settled = await asyncio.to_thread(worker.wait_settled)
        assert settled["event"] == "ready", worker.log.read_text()
        self.clients[role] = await connect(worker)

    async def relay(self, prompt: list[int], tokens_max: int, **fields: object) -> Relayed:
        """Submit to both; returns when the destination has it (or the source has ended)."""
        relayed = self.begin(prompt, tokens_max, **fields)
        await relayed.source.until(lambda: relayed.source.terminals or any(o.offer for o in relayed.source.outputs))
        offer = next((output.offer for output in relayed.source.outputs if output.offer), None)
        if offer is not None:
            relayed.destination = self.join(offer, prompt, tokens_max, **fields)
        return relayed

    def begin(self, prompt: list[int], tokens_max: int, **fields: object) -> Relayed:
        """The source's leg."""
        relayed = Relayed(Stream())
        handover = worker_pb2.Handover(role=PREFILL)
        message = submit_message(prompt, tokens_max, handover=handover, **fields)
        relayed.source.id = self.clients["prefill"].submit(message, relayed.source)  # type: ignore[attr-defined]
        return relayed

    def join(self, offer: bytes, prompt: list[int], tokens_max: int, **fields: object) -> Stream:
        """The destination's leg."""
        stream = Stream()
        handover = worker_pb2.Handover(role=DECODE, offer=offer)
        message = submit_message(prompt, tokens_max, handover=handover, **fields)
        stream.id = self.clients["decode"].submit(message, stream)  # type: ignore[attr-defined]
        return stream

    async def finish(self, relayed: Relayed) -> list[int]:
        """Both legs ended: the text."""
        await relayed.source.ended()
        if relayed.destination is not None:
            await relayed.destination.ended()
        return relayed.token_ids

    async def alone(self, role: str, prompt: list[int], tokens_max: int) -> list[int]:
        """The same request on one worker from its first to its last token."""
        return (await self.stream(role, prompt, tokens_max)).token_ids

    async def stream(self, role: str, prompt: list[int], tokens_max: int, **fields: object) -> Stream:
        """What such a request was answered, all of it."""
        stream = Stream()
        self.clients[role].submit(submit_message(prompt, tokens_max, **fields), stream)  # type: ignore[arg-type]
        await stream.ended()
        return stream

    def logs(self, *more: object) -> str:
        """For a failure's message."""
        tails = [f"{role}:\n{worker.log.read_text()[-3000:]}" for role, worker in self.workers.items()]
        return "\n".join([*map(str, more), *tails])

    async def open_handles(self) -> list[HandleView]:
        """What the ledger says is not over."""
        views = await self.ledger.views(None)
        assert not isinstance(views, Rejection), views
        return views

    async def settles(self, *roles: str) -> None:
        """Nothing is left: no handle in the ledger, no block held in any worker."""
        for _ in range(600):
            views = await self.ledger.views(None)  # a Rejection while no kvstore answers
            stats = [await self.clients[role].get_stats() for role in roles]
            held = [(s.blocks_active, s.sequences_running, s.sequences_waiting) for s in stats]
            if not views and all(h == (0, 0, 0) for h in held):
                return
            await asyncio.sleep(0.05)
        raise AssertionError(self.logs("left:", views, dict(zip(roles, held, strict=True))))

    async def close(self) -> None:
        """Whatever state it is in."""
        for client in self.clients.values():
            await client.close()
        for worker in self.workers.values():
            with contextlib.suppress(Exception):
                worker.close()
        await self.ledger.close()
        self.kvstore.close()
        self._folder.cleanup()


__all__ = ["Actor", "Fleet", "Relayed"]
