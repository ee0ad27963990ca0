"""Cases 14 to 16 of the fault list: a kvstore and etcd that go away for a while, and what a router knows."""

from __future__ import annotations

import asyncio
import random
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd_server import EtcdServer
from guards import fault
from kv_fleet import FAST, Fleet, member
from mesh import until

from tokenrelay.ledger.api import Actor, Applied, CacheEvent, Code, DirectoryNotice, Handle, Rejection
from tokenrelay.ledger.connection import ConnectionOptions
from tokenrelay.ledger.directory import PrefixDirectory
from tokenrelay.ledger.directory_host import DirectoryHost, follow_into
from tokenrelay.ledger.members import Roster
from tokenrelay.ledger.membership import Membership

LEASE_S = 1.0  # of members; the kvstore's own is 2 s, the least that etcd grants
NAMES = ("prefill", "decode", "decode-2")


# -- 14 ---------------------------------------------------------------------------------------------------------------
def the_patience_of_members(patch: pytest.MonkeyPatch) -> None:
    """A life whose ledger does not answer is taken for over."""

    async def keep_alive(self: Membership, lease_s: float) -> None:
        while (refusal := await self._ledger.keepalive(self.member.actor)) is None:  # noqa: ASYNC110
            await asyncio.sleep(lease_s / 3)
        self._on_ended(refusal.reason)

    patch.setattr(Membership, "_keep_alive", keep_alive)


def the_patience_of_the_kvstore(patch: pytest.MonkeyPatch) -> None:
    """Who could not be heard meanwhile is taken for dead."""
    patch.setattr(Roster, "touch_all", lambda self: None)
    touch = Roster.touch

    def only_before(self: Roster, actor: Actor) -> bool:
        return self.alive(actor) and (self._deaf or touch(self, actor))  # type: ignore[attr-defined]

    patch.setattr(Roster, "touch", only_before)
    patch.setattr(Roster, "_deaf", True, raising=False)


async def blip(folder: Path, away_s: float) -> None:
    """etcd is away for longer than every lease: nobody restarts, nobody reconnects, transitions wait and go on."""
    etcd, fleet, ended = EtcdServer(folder), Fleet(), list[str]()
    await asyncio.to_thread(etcd.start)
    try:
        fleet.use_etcd(etcd.endpoint, lease_s=2)
        service = await fleet.start_service()
        clients = [await fleet.kvstore_client() for _ in NAMES]
        lives = [
            Membership(client, member(name), lease_s=LEASE_S, on_ended=ended.append)
            for name, client in zip(NAMES, clients, strict=True)
        ]
        for life in lives:
            await life.begin(5)
        owner = lives[0].member.actor
        handle = await clients[0].reserve(owner, extents=1, deadline_s=60)
        assert isinstance(handle, Handle)
        await asyncio.to_thread(etcd.stop)
        await until(lambda: service.servicer.status().role == "suspended", "the right to decide ends", 6)
        answer = await clients[0].offer(handle, owner)
        assert answer is not None and answer.code is Code.UNAVAILABLE
        await asyncio.sleep(away_s)
        assert all(life.lapsed for life in lives), "they know that they may be taken for dead, and stay"
        await asyncio.to_thread(etcd.start)
        await until(lambda: service.servicer.status().role == "active", "it decides again", 10)
        await asyncio.sleep(LEASE_S * 1.5)
        assert not ended, ended
        assert await clients[0].offer(handle, owner) is None, "what was reserved before still is"
        assert [client.connection.connections for client in clients] == [1] * len(clients)
        for life in lives:
            await life.leave()
    finally:
        await fleet.close()
        await asyncio.to_thread(etcd.stop)


@pytest.fixture
def etcd_folder(tmp_path: Path) -> Iterator[None]:
    """Where the scenario keeps its etcd: `fault` gives no arguments."""
    global _folder
    _folder = tmp_path
    yield


_folder = Path()


@pytest.mark.usefixtures("etcd_folder")
@fault(the_patience_of_members, the_patience_of_the_kvstore)
async def test_14_a_blip_of_etcd_makes_nobody_restart() -> None:
    await blip(_folder, away_s=1.2)


@pytest.mark.slow
async def test_14_etcd_is_away_for_30_s(tmp_path: Path) -> None:
    await blip(tmp_path, away_s=30)


def the_look_at_its_own_lateness(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("tokenrelay.ledger.host.HELD_UP_S", float("inf"))


@fault(the_look_at_its_own_lateness)
async def test_14_a_kvstore_that_was_paused_takes_nobody_for_dead() -> None:
    """What members said meanwhile waits in its sockets, and its clock says that every lease is over."""
    fleet, ended = Fleet(), list[str]()
    try:
        await fleet.start_service()
        lives = [
            Membership(await fleet.kvstore_client(), member(name), lease_s=0.6, on_ended=ended.append) for name in NAMES
        ]
        for life in lives:
            await life.begin(5)
        await asyncio.sleep(0.3)
        time.sleep(1.5)  # noqa: ASYNC251 - nothing runs, as after SIGSTOP
        await asyncio.sleep(1.5)
        assert not ended, ended
        await lives[0]._ledger.close()  # type: ignore[attr-defined]
        await until(
            lambda: len(fleet.services[0].store.host.roster.members()) == 2, "who is dead is found out all the same"
        )
        for life in lives[1:]:
            await life.leave()
    finally:
        await fleet.close()


def the_jitter(patch: pytest.MonkeyPatch) -> None:
    same = types.SimpleNamespace(**{**vars(random), "random": lambda: 0.5})
    patch.setattr("tokenrelay.ledger.connection.random", same)


@fault(the_jitter)
async def test_14_a_fleet_does_not_come_back_in_one_instant() -> None:
    """How long each of many clients waits after its connection broke."""
    fleet = Fleet()
    waits: list[float] = []
    options = ConnectionOptions(connect_timeout_s=1, call_timeout_s=2, backoff_min_s=0.2, backoff_max_s=0.2)
    try:
        service = await fleet.start_service()
        for _ in range(12):
            lost_s = [0.0]

            def open_channel(target: str, lost_s: list[float] = lost_s) -> grpc.aio.Channel:
                if lost_s[0]:
                    waits.append(time.monotonic() - lost_s[0])
                    lost_s[0] = 0.0
                return grpc.aio.insecure_channel(target)

            client = await fleet.kvstore_client(open_channel=open_channel, options=options)

            def lost(reason: str, lost_s: list[float] = lost_s) -> None:
                lost_s[0] = time.monotonic()

            client.connection.on_disconnect = lost
        await service.stop()
        fleet.services.clear()
        await until(lambda: len(waits) == 12)
        waits.sort()
        assert waits[-2] - waits[1] > 0.05, waits  # of 0.2 s that the pauses may differ by
        assert waits[0] > 0.09, "half of the pause, at least"
    finally:
        await fleet.close()


# -- 15 ---------------------------------------------------------------------------------------------------------------
def the_numbers_of_the_batches(patch: pytest.MonkeyPatch) -> None:
    def apply(self: PrefixDirectory, name: str, life: str, sequence: int, events: Sequence[CacheEvent]) -> Applied:
        holder = self._holders.get(name) or self._add(name, life, 0)
        for kind, block_hash in events:
            (self._hold if kind == "sealed" else self._drop)(holder, block_hash)
        return Applied.APPLIED

    patch.setattr(PrefixDirectory, "apply", apply)


@fault(the_numbers_of_the_batches)
async def test_15_an_old_event_does_not_undo_a_newer_one() -> None:
    """It is told twice, the second time after the eviction; or by a former life of the worker; or one was lost."""
    blocks = [bytes([number]) * 16 for number in range(4)]
    sealed = [("sealed", block) for block in blocks]
    host = DirectoryHost()
    new = Actor("worker", "2")
    assert host.apply(new, 1, sealed) is Applied.APPLIED
    assert host.apply(new, 2, [("evicted", blocks[1])]) is Applied.APPLIED
    assert host.apply(new, 1, sealed) is Applied.REPEATED
    assert host.directory.match(blocks) == {"worker": 1}
    assert host.apply(new, 4, [("sealed", blocks[1])]) is Applied.RESYNC, "batch 3 may have evicted the others"
    assert host.directory.match(blocks) == {}
    assert host.apply(Actor("worker", "1"), 7, sealed) is Applied.RESYNC
    assert host.directory.match(blocks) == {}


# -- 16 ---------------------------------------------------------------------------------------------------------------
def what_a_new_follower_is_told_first(patch: pytest.MonkeyPatch) -> None:
    def nothing(self: DirectoryHost, follower: Any) -> Iterator[list[DirectoryNotice]]:
        follower.take()
        follower.gap = False
        return iter(())

    patch.setattr(DirectoryHost, "_everything", nothing)


@fault(what_a_new_follower_is_told_first)
async def test_16_a_router_that_restarts_knows_the_same_prefixes() -> None:
    fleet = Fleet()
    blocks = [number.to_bytes(16, "big") for number in range(10_000)]
    worker = member("worker")
    followers = []
    try:
        await fleet.start_service()
        client = await fleet.kvstore_client(options=FAST)
        assert not isinstance(await client.join(worker, lease_s=30), Rejection)
        assert await client.publish(worker.actor, 1, [("sealed", block) for block in blocks]) is Applied.APPLIED
        for _ in range(2):  # the second one is the router's next life
            directory = PrefixDirectory()
            at_router = await fleet.kvstore_client(options=FAST)
            followers.append(asyncio.create_task(follow_into(directory, at_router)))
            await until(lambda known=directory: known.match(blocks) == {"worker": len(blocks)}, "all of it is known")
            followers[-1].cancel()
    finally:
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        await fleet.close()
