"""Requests over two legs between several workers, while workers and the kvstore are killed and paused at random.

A request is answered with its whole text or with one clean terminal error; nothing hangs, nothing is wrong, and when it
is quiet again no handle and no block is left. Everything random comes from the seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fleet import DECODE, PREFILL, Fleet, Relayed
from kv_process import KvProcess
from worker_process import Stream, WorkerProcess, connect, submit_message

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.proto import worker_pb2

NAMES = ("prefill-1", "prefill-2", "decode-1", "decode-2")
PAUSE_S = 3.5  # longer than the members' lease and a claim's deadline
HUNG_S = 60.0
CLEAN = (worker_pb2.FINISH_ERROR, worker_pb2.FINISH_ABORT, worker_pb2.FINISH_REJECTED)


@dataclass
class Tally:
    """What came of it."""

    texts: int = 0
    errors: Counter[str] = field(default_factory=Counter)  # clean terminal errors by their first words
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)  # by what was done to whom
    over: Counter[str] = field(default_factory=Counter)  # lives that a kvstore ended though nobody had touched them


class ChaosStream(Stream):
    """Says where it is."""

    def __repr__(self) -> str:
        offered = any(output.offer for output in self.outputs)
        ends = [end.error or end.finish for end in self.terminals]
        return f"<offered {offered}, {len(self.token_ids)} tokens, ends {ends}>"


class ChaosFleet(Fleet):
    """Two workers of each role."""

    async def start(self) -> None:
        """All of it, ready."""
        self.flags += ["--lease-s", "1.5"]
        self.kvstore = await self._new_kvstore()
        self.ledger = KvstoreClient([self.kvstore.address])
        self.ledger.start()
        await asyncio.gather(*(self.start_worker(name) for name in NAMES))

    async def _new_kvstore(self) -> KvProcess:
        return await asyncio.to_thread(KvProcess, Path(self._folder.name), "kv")

    async def start_worker(self, name: str) -> None:
        """A life of that name."""
        role = name.partition("-")[0]
        flags = ["--role", role, "--name", name, "--kvstore", self.kvstore.address, *self.flags]
        worker = WorkerProcess(*flags, "--blocks", str(self._blocks[role]), model=self.model)
        self.workers[name] = worker
        settled = await asyncio.to_thread(worker.wait_settled)
        assert settled["event"] == "ready", (settled, worker.log.read_text())
        self.clients[name] = await connect(worker)

    async def stop_worker(self, name: str) -> None:
        """Its client goes first: it would only try to connect."""
        client = self.clients.pop(name, None)
        if client is not None:
            await client.close()
        worker = self.workers.pop(name)
        await asyncio.to_thread(worker.close)

    def up(self, role: str) -> list[str]:
        """Workers of that role that can be asked."""
        return [name for name in self.clients if name.startswith(role)]


class Chaos:
    """Clients, a killer, and the verdict."""

    def __init__(self, fleet: ChaosFleet, seed: int) -> None:
        self.fleet = fleet
        self.tally = Tally()
        self._chosen = random.Random(seed)
        self._requests = iter(range(1 << 30))
        self._texts: dict[int, list[int]] = {}
        self._live: dict[int, tuple[str, str, Relayed]] = {}  # that are open

    def prompt(self, number: int) -> list[int]:
        """Of one of a few conversations that share their beginnings."""
        chosen = random.Random(number % 5)
        base = [chosen.randrange(3, 380) for _ in range(200)]
        chosen = random.Random(number)
        return base + [chosen.randrange(3, 380) for _ in range(chosen.randrange(1, 900))]

    def tokens(self, number: int) -> int:
        """Of its answer."""
        return 4 + number % 60

    async def run(self, requests: int, kills: int, clients: int = 6) -> None:
        """So many requests at least, and so many kills; then nothing may be left."""
        await self._expect(requests)
        killer = asyncio.create_task(self._kill(kills))
        await asyncio.gather(*(self._client(requests, killer) for _ in range(clients)))
        await killer
        await self.settles()

    async def _expect(self, requests: int) -> None:
        """What each says when it is alone on one worker, before anything happens."""
        worker = self.fleet.clients["decode-1"]
        for number in range(requests):
            stream = Stream()
            worker.submit(submit_message(self.prompt(number), self.tokens(number)), stream)
            assert (await stream.ended()).finish == worker_pb2.FINISH_LENGTH
            self._texts[number] = stream.token_ids

    # -- clients ------------------------------------------------------------------------------------------------------
    async def _client(self, requests: int, killer: asyncio.Task[None]) -> None:
        while (number := next(self._requests)) < requests or not killer.done():
            while not (self.fleet.up("prefill") and self.fleet.up("decode")):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            try:
                async with asyncio.timeout(HUNG_S):
                    relayed = await self._request(number, number % requests)
            except TimeoutError:
                raise AssertionError(self.fleet.logs(f"request {number} hangs: {self._live.get(number)}")) from None
            self._live.pop(number, None)
            self._judge(number % requests, relayed)
            await asyncio.sleep(0.02)

    async def _request(self, key: int, number: int) -> Relayed | str:
        """Both legs to their ends; or why it could not begin."""
        at, then = (self._chosen.choice(self.fleet.up(role)) for role in ("prefill", "decode"))
        relayed = Relayed(ChaosStream())
        source = relayed.source
        try:
            self._submit(at, number, source, worker_pb2.Handover(role=PREFILL))
        except (TokenRelayError, KeyError) as error:
            return f"not begun: {error}"
        self._live[key] = (at, then, relayed)
        await source.until(lambda: source.terminals or any(output.offer for output in source.outputs))
        offer = next((output.offer for output in source.outputs if output.offer), None)
        if offer is not None:
            destination = ChaosStream()
            with contextlib.suppress(TokenRelayError, KeyError):  # it died meanwhile: the source's leg is ended then
                self._submit(then, number, destination, worker_pb2.Handover(role=DECODE, offer=offer))
                relayed.destination = destination
        await self._end_both(relayed, at, then)
        return relayed

    def _submit(self, name: str, number: int, stream: Stream, handover: worker_pb2.Handover) -> None:
        message = submit_message(self.prompt(number), self.tokens(number), handover=handover)
        stream.id = self.fleet.clients[name].submit(message, stream)  # type: ignore[attr-defined]

    async def _end_both(self, relayed: Relayed, at: str, then: str) -> None:
        """As a router does: the first error of a leg ends the other one."""
        legs = [(at, relayed.source)] + ([(then, relayed.destination)] if relayed.destination else [])
        waits = [asyncio.create_task(leg.ended()) for _, leg in legs]
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        failed = any(wait.result().finish in CLEAN for wait in done)
        if failed or relayed.destination is None:
            for name, leg in legs:
                client = self.fleet.clients.get(name)
                if client is not None and not leg.terminals:
                    with contextlib.suppress(TokenRelayError):
                        client.abort(leg.id)  # type: ignore[attr-defined]
        await asyncio.gather(*waits)

    def _judge(self, number: int, relayed: Relayed | str) -> None:
        if isinstance(relayed, str):
            self.tally.errors[relayed[:60]] += 1
            return
        text, said = self._texts[number], relayed.token_ids
        if said != text[: len(said)]:
            self.tally.wrong.append(f"request {number}: {said} instead of {text}")
        elif relayed.finish == worker_pb2.FINISH_LENGTH and said == text:
            self.tally.texts += 1
        elif relayed.finish in CLEAN or relayed.destination is None:
            leg = (
                relayed.destination
                if relayed.destination and relayed.destination.terminals[0].error
                else relayed.source
            )
            self.tally.errors[leg.terminals[0].error[:60] or "no destination"] += 1
        else:
            self.tally.wrong.append(f"request {number}: {relayed.source.terminals} {relayed.destination}")

    # -- the killer ---------------------------------------------------------------------------------------------------
    async def _kill(self, kills: int) -> None:
        for _ in range(kills):
            await asyncio.sleep(0.3 + self._chosen.random())
            victim = self._chosen.choice([*NAMES, "kvstore"])
            pauses = self._chosen.random() < 0.3
            self.tally.kills[f"{'pause' if pauses else 'kill'} {victim.partition('-')[0]}"] += 1
            if victim == "kvstore":
                await self._strike_kvstore(pauses)
            else:
                await self._strike_worker(victim, pauses)

    async def _strike_worker(self, name: str, pauses: bool) -> None:
        worker = self.fleet.workers[name]
        if pauses:
            worker.signal(signal.SIGSTOP)
            await asyncio.sleep(PAUSE_S)
            worker.signal(signal.SIGCONT)
            await asyncio.to_thread(worker.wait)  # it is told that its life is over
        else:
            worker.signal(signal.SIGKILL)
        await self.fleet.stop_worker(name)
        await self.fleet.start_worker(name)

    async def _strike_kvstore(self, pauses: bool) -> None:
        kvstore = self.fleet.kvstore
        if pauses:
            kvstore.signal(signal.SIGSTOP)
            await asyncio.sleep(PAUSE_S)
            kvstore.signal(signal.SIGCONT)
        else:
            kvstore.signal(signal.SIGKILL)
            await asyncio.to_thread(kvstore.wait)
            await asyncio.sleep(self._chosen.random())
            self.fleet.kvstore = await self.fleet._new_kvstore()
        await self._revive()

    async def _revive(self) -> None:
        """Lives that a kvstore declared over meanwhile end by themselves; others begin under their names."""
        await asyncio.sleep(PAUSE_S)
        over = [name for name in NAMES if self.fleet.workers[name].process.poll() is not None]
        for name in over:
            self.tally.over[name.partition("-")[0]] += 1
            await self.fleet.stop_worker(name)
        await asyncio.gather(*(self.fleet.start_worker(name) for name in over))

    # -- afterwards ---------------------------------------------------------------------------------------------------
    async def settles(self, within_s: float = 40.0) -> None:
        """No handle in the ledger, no block held in any worker, and every worker's own books balance."""
        deadline_s = time.monotonic() + within_s
        while True:
            views = await self.fleet.ledger.views(None)
            held = {}
            for name, client in self.fleet.clients.items():
                stats = await client.get_stats()
                held[name] = (stats.blocks_active, stats.sequences_running, stats.sequences_waiting)
                assert stats.integrity_failures == 0, name
            if views == [] and not any(any(each) for each in held.values()):
                return
            assert time.monotonic() < deadline_s, self.fleet.logs("left:", views, held, self.tally)
            await asyncio.sleep(0.2)
