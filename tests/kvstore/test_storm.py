"""Handovers while kvstores are killed and paused, etcd stops, and members die: law 2 holds, and no handle stays behind.

What an owner uses again and what a claimant reads meet in one place here, `Memory`: an owner that was allowed to take
its blocks back while a claimant, neither cut off nor done, was allowed to read them fails the test at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import signal
import time
from collections import Counter
from pathlib import Path

import grpc
import pytest
from etcd_server import EtcdServer
from kv_process import KvProcess

from tokenrelay.ledger.api import Code, Handle, HandleView, Joined, Member, Rejection, State
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.connection import ConnectionOptions
from tokenrelay.proto import kvstore_pb2, kvstore_pb2_grpc

EXTENTS = 4
OPTIONS = ConnectionOptions(connect_timeout_s=0.5, call_timeout_s=0.7, backoff_min_s=0.02, backoff_max_s=0.3)
LEASE_S = 4.0
_READING = {State.CLAIMED, State.TRANSFERRING, State.QUARANTINED}


class Memory:
    """Who may read what, and who uses it again."""

    def __init__(self) -> None:
        self.reading: dict[Handle, str] = {}
        self.cut_off: set[Handle] = set()
        self.counts: Counter[str] = Counter()

    def read(self, handle: Handle, claimant: str) -> None:
        """The ledger let it claim."""
        if handle not in self.cut_off:
            self.reading[handle] = claimant

    def done(self, handle: Handle) -> None:
        """It reads no more."""
        self.reading.pop(handle, None)

    def cut(self, handle: Handle) -> None:
        """The owner dropped the registration: no read reaches the blocks any more."""
        self.cut_off.add(handle)
        self.done(handle)

    def use_again(self, handle: Handle, how: str) -> None:
        """The owner takes the blocks back."""
        assert handle not in self.reading, f"{how}: {self.reading[handle]} may be reading {handle}"
        self.counts[how] += 1


class Life:
    """A member in one life: joined, kept alive, ended by its own process's death or by the ledger."""

    def __init__(self, name: str, role: str, targets: list[str], memory: Memory, offers: asyncio.Queue[Handle]) -> None:
        self.member = Member(name=name, incarnation=secrets.token_hex(6), role=role)
        self.client = KvstoreClient(targets, options=OPTIONS)
        self.memory, self.offers = memory, offers
        self.over = asyncio.Event()
        self.mine: set[Handle] = set()  # handles with something left to do

    async def run(self, rng: random.Random, stop: asyncio.Event) -> None:
        """Until stopped, killed (cancelled) or ended by the ledger."""
        self.client.start()
        while isinstance(answer := await self.client.join(self.member, lease_s=LEASE_S), Rejection):
            if answer.code is Code.STALE_INCARNATION:  # it had joined, and was not told so in time
                await self.client.close()
                return
            await asyncio.sleep(0.1)
        work = self.own if self.member.role == "prefill" else self.take
        tasks = [asyncio.create_task(self.keep_alive())]
        tasks += [asyncio.create_task(work(rng, stop)) for _ in range(4)]
        try:
            done = asyncio.gather(*tasks[1:])
            over = asyncio.create_task(self.over.wait())
            await asyncio.wait([done, over], return_when=asyncio.FIRST_COMPLETED)
            over.cancel()
            if done.done():
                done.result()
                tasks[0].cancel()
                while self.mine and not self.over.is_set():  # noqa: ASYNC110 - nothing is left behind
                    await asyncio.sleep(0.05)
                await self.client.leave(self.member.actor)
            else:
                done.cancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.client.close()
            for handle in self.mine:  # its memory is gone, and it reads no more
                self.memory.cut(handle) if self.member.role == "prefill" else self.memory.done(handle)

    async def keep_alive(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 4)
            answer = await self.client.keepalive(self.member.actor)
            if answer is not None and answer.code is Code.STALE_INCARNATION:
                self.memory.counts["lives ended"] += 1
                self.over.set()

    async def own(self, rng: random.Random, stop: asyncio.Event) -> None:
        me, ledger = self.member.actor, self.client
        while not stop.is_set():
            handle = await ledger.reserve(me, extents=EXTENTS, deadline_s=20)
            if isinstance(handle, Rejection):
                self.memory.counts["colocated"] += 1
                await asyncio.sleep(0.05)
                continue
            self.mine.add(handle)
            if await ledger.offer(handle, me) is None:
                with contextlib.suppress(asyncio.QueueFull):
                    self.offers.put_nowait(handle)
                await ledger.seal(handle, me, extents=EXTENTS)
            await asyncio.sleep(rng.uniform(0, 0.2))
            await self.finish(handle, rng)
            self.mine.discard(handle)

    async def finish(self, handle: Handle, rng: random.Random) -> None:
        """Bring it to an end, whatever it takes."""
        me, ledger, memory = self.member.actor, self.client, self.memory
        patience_s = time.monotonic() + rng.choice([0.0, 0.5, 1.0])
        while not self.over.is_set():
            if rng.random() < 0.5 and await ledger.reclaim(handle, me) is None:  # greedily: the ledger must refuse
                return memory.use_again(handle, "reclaimed")
            view = await ledger.view(handle)
            if isinstance(view, HandleView) and view.owner == me:
                if view.state is State.ADOPTED and await ledger.release(handle, me) is None:
                    return memory.use_again(handle, "released")
                if view.state not in _READING and await ledger.reclaim(handle, me) is None:
                    return memory.use_again(handle, "reclaimed")
                if view.state in _READING and time.monotonic() > patience_s:
                    if view.state is not State.QUARANTINED:
                        await ledger.quarantine(handle, me, deadline_s=0.5)
                        patience_s = time.monotonic() + 0.5
                    else:
                        memory.cut(handle)  # first
                        if await ledger.fence(handle, me) is None:
                            return memory.use_again(handle, "fenced")
                if view.state is State.CLAIMED:
                    await ledger.seal(handle, me, extents=EXTENTS)
            elif isinstance(view, HandleView) or view.code in (Code.UNKNOWN_HANDLE, Code.STALE_TERM):
                memory.cut(handle)  # over without us: whoever had claimed it is cut off before
                return memory.use_again(handle, "over")
            await asyncio.sleep(0.05)
        return None

    async def take(self, rng: random.Random, stop: asyncio.Event) -> None:
        me, ledger, memory = self.member.actor, self.client, self.memory
        while not stop.is_set():
            try:
                handle = await asyncio.wait_for(self.offers.get(), 0.2)
            except TimeoutError:
                continue
            if await ledger.claim(handle, me, deadline_s=rng.choice([0.3, 5.0])) is not None:
                continue
            self.mine.add(handle)
            memory.read(handle, me.name)
            await asyncio.sleep(rng.choice([0.02, 0.05, 0.2, 3.0]))  # a slow network outlives a takeover
            adopted = rng.random() < 0.8 and await ledger.adopt(handle, me) is None
            memory.done(handle)
            if not adopted:
                await ledger.decline(handle, me)  # a refusal leaves it to its deadline and its owner
            self.mine.discard(handle)


class Storm:
    """What goes wrong meanwhile."""

    def __init__(self, folder: Path, etcd: EtcdServer, rng: random.Random) -> None:
        self._folder, self._etcd, self._rng = folder, etcd, rng
        self._prefix = f"/storm-{secrets.token_hex(4)}/"
        self.kvstores = {name: self._start(name) for name in ("a", "b")}

    def _start(self, name: str) -> KvProcess:
        fields = {"backend": "etcd", "etcd": (self._etcd.endpoint,), "etcd_prefix": self._prefix}
        return KvProcess(self._folder, name, **fields, lease_s=1, etcd_timeout_s=0.3, log_level="warning")

    async def strike(self) -> str:
        """One of them, over when it returns."""
        what = self._rng.choice(["kill", "blind kill", "blind kill", "pause", "etcd", "etcd pause"])
        name = self._rng.choice(list(self.kvstores))
        if "kill" in what:
            if what == "blind kill":  # nothing of what is decided now is written down
                self._etcd.pause()
                await asyncio.sleep(self._rng.uniform(0.2, 0.6))
            self.kvstores[name].signal(signal.SIGKILL)
            self.kvstores[name].wait()
            if what == "blind kill":
                self._etcd.resume()
            await asyncio.sleep(self._rng.uniform(0, 1.5))
            self.kvstores[name] = await asyncio.to_thread(self._start, name)
        elif what == "pause":
            self.kvstores[name].signal(signal.SIGSTOP)
            await asyncio.sleep(self._rng.uniform(0.5, 3))
            self.kvstores[name].signal(signal.SIGCONT)
        elif what == "etcd":
            self._etcd.stop()
            await asyncio.sleep(self._rng.uniform(0.2, 2.5))
            await asyncio.to_thread(self._etcd.start)
        else:
            self._etcd.pause()
            await asyncio.sleep(self._rng.uniform(0.2, 2))
            self._etcd.resume()
        return what

    async def report(self) -> str:
        """What the kvstores say of themselves."""
        found = []
        for process in self.kvstores.values():
            async with grpc.aio.insecure_channel(process.address) as channel:
                stub = kvstore_pb2_grpc.KvstoreStub(channel)  # type: ignore[no-untyped-call]
                found.append(str(await stub.GetStatus(kvstore_pb2.KvStatusRequest(), timeout=2)))
            found.append("\n".join(process.log.read_text().splitlines()[-25:]))
        return "\n".join(found)

    def close(self) -> None:
        """Whatever state they are in."""
        for process in self.kvstores.values():
            process.close()


async def revive(
    name: str,
    role: str,
    targets: list[str],
    memory: Memory,
    offers: asyncio.Queue[Handle],
    rng: random.Random,
    stop: asyncio.Event,
    lives: list[Life],
) -> None:
    """One life after another, some of them short."""
    while not stop.is_set():
        life = Life(name, role, targets, memory, offers)
        lives.append(life)
        running = asyncio.create_task(life.run(rng, stop))
        try:
            done, _ = await asyncio.wait([running], timeout=rng.uniform(4, 15))
            if not done and rng.random() < 0.5 and not stop.is_set():
                running.cancel()  # it dies
                memory.counts["deaths"] += 1
            await asyncio.wait([running])
        finally:
            running.cancel()
        if not running.cancelled():
            running.result()


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
async def test_handovers_in_a_storm(seed: int, tmp_path: Path, own_etcd: EtcdServer) -> None:
    rng, memory = random.Random(seed), Memory()
    storm = Storm(tmp_path, own_etcd, rng)
    targets = [process.address for process in storm.kvstores.values()]
    offers: asyncio.Queue[Handle] = asyncio.Queue(maxsize=64)
    stop, lives = asyncio.Event(), []  # type: ignore[var-annotated]
    roles = [("p1", "prefill"), ("p2", "prefill"), ("d1", "decode"), ("d2", "decode")]
    members = [asyncio.create_task(revive(*role, targets, memory, offers, rng, stop, lives)) for role in roles]
    try:
        for _ in range(8):
            await asyncio.sleep(rng.uniform(0.3, 2))
            for failed in (task for task in members if task.done()):
                failed.result()
            memory.counts[await storm.strike()] += 1
        stop.set()
        _, unfinished = await asyncio.wait(members, timeout=30)
        held = [(life.member.name, life.client.connection.last_error, life.mine) for life in lives if life.mine]
        assert not unfinished, f"members that do not come to an end: {held}\n{await storm.report()}"
        for task in members:
            task.result()
        late = KvstoreClient(targets, options=OPTIONS)
        late.start()
        async with asyncio.timeout(30):
            while await late.views() != []:  # noqa: ASYNC110 - dead members' leases run out
                await asyncio.sleep(0.2)
            router = Member(name="late", incarnation="1", role="router")
            while not isinstance(await late.join(router, lease_s=1), Joined):  # noqa: ASYNC110
                await asyncio.sleep(0.2)
        await late.close()
    finally:
        stop.set()
        for task in members:
            task.cancel()
        await asyncio.gather(*members, return_exceptions=True)
        storm.close()
    print(f"seed {seed}: {dict(memory.counts)}, {len(lives)} lives")
    assert memory.counts["released"] > 20 and memory.counts["reclaimed"] > 0
