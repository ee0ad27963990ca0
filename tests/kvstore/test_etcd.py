"""The kvstore over a real etcd: takeovers, a lost etcd, a paused leader. Leases are short, so that nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from etcd_server import EtcdServer
from kv_fleet import FAST, Fleet, Watcher, member, named
from kv_process import KvProcess
from raw_session import RawSession, join_call, reserve_call

from tokenrelay.ledger.api import (
    Code,
    Handle,
    HandleView,
    Joined,
    MemberEnded,
    Rejection,
    Snapshot,
    State,
    Suspended,
)
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.etcd import EtcdStore
from tokenrelay.ledger.journal import Journal
from tokenrelay.ledger.reign import Claim, Reign, clock_s
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.proto import kvstore_pb2_grpc
from tokenrelay.services.kvstore.service import KvstoreService

PREFILL, DECODE = member("prefill", role="prefill"), member("decode")


def code(answer: object) -> Code | None:
    return answer.code if isinstance(answer, Rejection) else None


async def until(wanted: Callable[[], Any], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not wanted():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def status_of(address: str) -> pb.KvStatus:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = kvstore_pb2_grpc.KvstoreStub(channel)  # type: ignore[no-untyped-call]
        status: pb.KvStatus = await stub.GetStatus(pb.KvStatusRequest(), timeout=2)
        return status


async def pair(fleet: Fleet, etcd: EtcdServer, lease_s: float = 1.0) -> tuple[KvstoreService, KvstoreService]:
    """An active kvstore and a standby."""
    fleet.use_etcd(etcd.endpoint, lease_s)
    active = await fleet.start_service("a")
    await until(lambda: active.servicer.status().role == "active")
    standby = await fleet.start_service("b")
    return active, standby


async def test_a_standby_leads_to_the_active_one(empty_fleet: Fleet, etcd: EtcdServer) -> None:
    """One name may stand for both of them (a service of Docker Compose): a client must not have to guess its way."""
    active, standby = await pair(empty_fleet, etcd)
    await until(lambda: standby.servicer.status().active_address == active.address)
    opened: list[str] = []

    def open_channel(target: str) -> grpc.aio.Channel:
        opened.append(target)
        return grpc.aio.insecure_channel(target)

    client = KvstoreClient([standby.address], open_channel=open_channel)
    client.start()
    assert isinstance(await client.join(DECODE, lease_s=30), Joined)
    assert opened == [standby.address, active.address]
    await client.close()


async def crash(fleet: Fleet, service: KvstoreService) -> None:
    """As kill -9 does: nothing more is written, the lease is not given back."""
    assert service.backend is not None
    await service.backend.journal.stop()
    fleet.services.remove(service)
    await service.stop()


async def test_a_standby_takes_over_and_requests_in_flight_go_on(empty_fleet: Fleet, etcd: EtcdServer) -> None:
    active, standby = await pair(empty_fleet, etcd)
    prefill, decode = await empty_fleet.kvstore_client(), await empty_fleet.kvstore_client()
    assert (await prefill.join(PREFILL, lease_s=30)).term == 1  # type: ignore[union-attr]
    assert isinstance(await decode.join(DECODE, lease_s=30), Joined)
    watcher = Watcher(prefill, PREFILL)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    reserved, offered, claimed, gone = [
        named(await prefill.reserve(PREFILL.actor, extents=2, deadline_s=60)) for _ in range(4)
    ]
    for handle in (offered, claimed):
        assert await prefill.offer(handle, PREFILL.actor) is None
    assert await decode.claim(claimed, DECODE.actor, deadline_s=60) is None
    assert await prefill.seal(claimed, PREFILL.actor, extents=1) is None
    assert await prefill.reclaim(gone, PREFILL.actor) is None
    assert active.backend is not None and await active.backend.journal.flushed(2)
    key = active.store.host.hash_key
    await crash(empty_fleet, active)
    began_s = time.monotonic()
    snapshot = await watcher.until(lambda n: isinstance(n, Snapshot) and n.term == 2, timeout_s=15)
    assert time.monotonic() - began_s < 8, "a lease of 1 s, and the members' way back"
    assert isinstance(snapshot, Snapshot)
    states = {view.handle: view.state for view in snapshot.handles}
    assert states == {reserved: State.RESERVED, offered: State.OFFERED, claimed: State.CLAIMED}
    assert {one.name for one in snapshot.members} == {"prefill", "decode"}
    assert standby.store.host.hash_key == key, "the fleet's key stays"
    assert await prefill.seal(claimed, PREFILL.actor, extents=2) is None
    assert await decode.adopt(claimed, DECODE.actor) is None
    assert await prefill.release(claimed, PREFILL.actor) is None
    assert await prefill.reclaim(offered, PREFILL.actor) is None
    new = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60))
    assert new.term == 2 > reserved.term
    assert code(await prefill.offer(gone, PREFILL.actor)) is not None
    standby.store.host.books.check()
    assert not any(isinstance(notice, MemberEnded) for notice in watcher.notices)


async def test_a_claim_that_was_not_written_down_still_counts(empty_fleet: Fleet, own_etcd: EtcdServer) -> None:
    active, standby = await pair(empty_fleet, own_etcd, lease_s=2)
    prefill, decode = await empty_fleet.kvstore_client(), await empty_fleet.kvstore_client()
    await prefill.join(PREFILL, lease_s=30)
    await decode.join(DECODE, lease_s=30)
    claimed, ended, lost = [named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60)) for _ in range(3)]
    await prefill.offer(claimed, PREFILL.actor)
    await prefill.offer(ended, PREFILL.actor)
    assert active.backend is not None and await active.backend.journal.flushed(2)
    own_etcd.pause()
    assert await decode.claim(claimed, DECODE.actor, deadline_s=60) is None, "memory serves while the lease lasts"
    assert await prefill.reclaim(ended, PREFILL.actor) is None
    unwritten = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60))
    await crash(empty_fleet, active)
    own_etcd.resume()
    await until(lambda: standby.servicer.status().role == "active", 15)
    view = await prefill.view(claimed)
    assert isinstance(view, HandleView) and (view.state, view.claimant) == (State.CLAIMED, DECODE.actor)
    assert code(await prefill.reclaim(claimed, PREFILL.actor)) is Code.WRONG_STATE, "law 2: somebody may be reading"
    assert code(await prefill.view(unwritten)) is Code.UNKNOWN_HANDLE
    assert {v.handle for v in await prefill.views()} == {claimed, lost}  # type: ignore[union-attr]
    assert await decode.decline(claimed, DECODE.actor) is None
    assert await prefill.reclaim(claimed, PREFILL.actor) is None
    assert await prefill.reclaim(lost, PREFILL.actor) is None


async def test_who_does_not_come_back_is_taken_for_dead(empty_fleet: Fleet, etcd: EtcdServer) -> None:
    active, standby = await pair(empty_fleet, etcd)
    prefill, decode = await empty_fleet.kvstore_client(), await empty_fleet.kvstore_client()
    await prefill.join(PREFILL, lease_s=30)
    await decode.join(DECODE, lease_s=3)
    watcher = Watcher(prefill, PREFILL)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    handle = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60))
    await prefill.offer(handle, PREFILL.actor)
    assert await decode.claim(handle, DECODE.actor, deadline_s=60) is None
    assert active.backend is not None and await active.backend.journal.flushed(2)
    await decode.close()
    await crash(empty_fleet, active)
    await until(lambda: standby.servicer.status().role == "recovering", 15)
    assert code(await prefill.reclaim(handle, PREFILL.actor)) is Code.UNAVAILABLE, (
        "nothing is decided until all are back"
    )
    after = await watcher.until(lambda n: isinstance(n, Snapshot) and n.term == 2, timeout_s=10)
    assert isinstance(after, Snapshot) and after.members == (PREFILL,)
    assert [view.state for view in after.handles] == [State.QUARANTINED], "until its owner has cut the claimant off"
    assert code(await prefill.reclaim(handle, PREFILL.actor)) is Code.WRONG_STATE
    assert await prefill.fence(handle, PREFILL.actor) is None


async def test_a_lost_etcd_stops_nobody_before_the_lease_is_over(empty_fleet: Fleet, own_etcd: EtcdServer) -> None:
    empty_fleet.use_etcd(own_etcd.endpoint, lease_s=2)
    service = await empty_fleet.start_service()
    prefill, decode = await empty_fleet.kvstore_client(), await empty_fleet.kvstore_client()
    await prefill.join(PREFILL, lease_s=3)
    await decode.join(DECODE, lease_s=3)
    watcher = Watcher(prefill, PREFILL)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    open_before = named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60))
    own_etcd.stop()
    stopped_s = time.monotonic()
    served: list[Handle] = []
    while time.monotonic() - stopped_s < 0.8:  # well within the lease
        served.append(named(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60)))
        assert await prefill.offer(served[-1], PREFILL.actor) is None
        await asyncio.sleep(0.05)
    await watcher.until(lambda n: isinstance(n, Suspended), timeout_s=5)
    assert code(await prefill.reserve(PREFILL.actor, extents=1, deadline_s=60)) is Code.UNAVAILABLE
    assert code(await decode.claim(served[0], DECODE.actor)) is Code.UNAVAILABLE
    while time.monotonic() - stopped_s < 5:  # longer than every lease
        assert code(await prefill.keepalive(PREFILL.actor)) is Code.UNAVAILABLE
        await asyncio.sleep(0.2)
    assert service.servicer.status().role == "suspended"
    own_etcd.start()
    await watcher.until(lambda n: n is watcher.notices[-1] and isinstance(n, Snapshot), timeout_s=10)
    assert await decode.claim(served[0], DECODE.actor) is None
    assert await prefill.offer(open_before, PREFILL.actor) is None, "what was decided before still holds"
    assert len(await prefill.views()) == len(served) + 1  # type: ignore[arg-type]
    assert prefill.connection.connections == 1, "nobody had to come back"
    assert not any(isinstance(notice, MemberEnded) for notice in watcher.notices), "nobody was taken for dead"
    assert service.backend is not None and await service.backend.journal.flushed(3)


async def test_a_leader_that_drains_hands_over_at_once(empty_fleet: Fleet, etcd: EtcdServer) -> None:
    active, standby = await pair(empty_fleet, etcd, lease_s=20)
    client = await empty_fleet.kvstore_client()
    await client.join(PREFILL, lease_s=30)
    handles = [named(await client.reserve(PREFILL.actor, extents=1, deadline_s=60)) for _ in range(300)]
    await active.drain()
    await until(lambda: standby.servicer.status().role == "active", 5)
    assert {view.handle for view in await client.views()} == set(handles)  # type: ignore[union-attr]


async def test_the_same_kvstore_goes_on_when_nobody_reigned_in_between(
    empty_fleet: Fleet, own_etcd: EtcdServer
) -> None:
    empty_fleet.use_etcd(own_etcd.endpoint)
    service = await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    await client.join(PREFILL, lease_s=30)
    handle = named(await client.reserve(PREFILL.actor, extents=1, deadline_s=60))
    assert service.backend is not None
    lease = service.backend.reign._lease
    assert lease is not None
    await service.backend.etcd.revoke(lease)  # as when etcd was away for longer than the lease
    await until(lambda: service.store.host.term == 2 and service.servicer.status().role == "active")
    assert await client.wait_ready(5)
    assert await client.offer(handle, PREFILL.actor) is None
    assert named(await client.reserve(PREFILL.actor, extents=1, deadline_s=60)).term == 2


@pytest.fixture
def processes(tmp_path: Path, etcd: EtcdServer) -> Any:
    """Two kvstores as processes: the first one is active."""
    prefix = f"/{tmp_path.name}-{time.monotonic_ns()}/"
    fields = {"backend": "etcd", "etcd": (etcd.endpoint,), "etcd_prefix": prefix, "lease_s": 1, "etcd_timeout_s": 0.3}
    started: list[KvProcess] = []

    def start(name: str) -> KvProcess:
        started.append(KvProcess(tmp_path, name, **fields))
        return started[-1]

    yield start
    for process in started:
        process.close()


async def active_at(address: str, timeout_s: float = 10.0) -> pb.KvStatus:
    async with asyncio.timeout(timeout_s):
        while (status := await status_of(address)).role not in ("active", "recovering"):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        return status


async def test_kill_9_and_a_paused_leader_that_wakes_up_after_its_time(
    empty_fleet: Fleet, processes: Callable[[str], KvProcess]
) -> None:
    first = processes("a")
    await active_at(first.address)
    second = processes("b")
    raw = RawSession(first.address)
    await raw.hello()
    await raw.ask(join_call(1, lease_ms=2000), reserve_call(2))
    first.signal(signal.SIGSTOP)  # for longer than every lease
    assert (await active_at(second.address)).term == 2
    client = await empty_fleet.kvstore_client(second.address, options=FAST)
    await raw.send(pb.KvCalls(calls=[reserve_call(3)]))  # waits in its socket, to be read when it wakes up
    first.signal(signal.SIGCONT)
    replies: list[pb.KvReply] = []
    with contextlib.suppress(grpc.aio.AioRpcError):
        while (message := await raw.call.read()) is not grpc.aio.EOF:
            replies += message.replies
    assert all(reply.rejection.code == "unavailable" for reply in replies), "it decides nothing any more"
    assert (await status_of(first.address)).role == "standby"
    assert (await active_at(second.address)).term == 2
    await raw.close()
    async with asyncio.timeout(10):
        while code(answer := await client.join(DECODE, lease_s=30)) is Code.UNAVAILABLE:  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # until the member of the raw session is taken for dead
    assert isinstance(answer, Joined)
    second.signal(signal.SIGKILL)
    assert (await active_at(first.address)).term == 3, "the one that was paused is a good standby"
    first.signal(signal.SIGTERM)
    assert first.wait() == 0


# -- the parts --------------------------------------------------------------------------------------------------------
async def test_following_a_key_goes_on_over_restarts_and_compaction(own_etcd: EtcdServer) -> None:
    follower, writer = (EtcdStore([own_etcd.endpoint], timeout_s=2) for _ in range(2))
    seen: list[bytes | None] = []

    async def follow() -> None:
        async for value in follower.follow(b"k"):
            seen.append(value)

    task = asyncio.create_task(follow())

    async def write(value: bytes) -> None:
        async with asyncio.timeout(15):
            while True:
                try:
                    await writer.swap({}, puts={b"k": value})
                    return
                except Exception:
                    await asyncio.sleep(0.05)

    await until(lambda: None in seen)
    await write(b"1")
    await until(lambda: seen[-1] == b"1")
    own_etcd.stop()
    own_etcd.start()
    await write(b"2")
    await write(b"3")
    await until(lambda: seen[-1] == b"3")
    assert seen.index(b"2") < seen.index(b"3"), "nothing between was missed"
    own_etcd.pause()
    await asyncio.sleep(0.1)
    own_etcd.resume()
    own_etcd.stop()
    own_etcd.start()
    for number in range(20):
        await write(b"x%d" % number)
    client = await writer._connected()
    await client.compact((await client.get(b"k")).mod_revision, physical=True)
    await write(b"last")
    await until(lambda: seen[-1] == b"last")
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await follower.close()
    await writer.close()


async def test_a_write_under_a_former_reign_is_refused_and_ends_it(etcd: EtcdServer) -> None:
    store = EtcdStore([etcd.endpoint], timeout_s=2)
    leader = b"/guard/leader"
    await store.swap({}, puts={leader: b"new reign"})
    foreign: list[str] = []
    journal = Journal(store, guard=lambda: {leader: b"old reign"}, on_foreign=foreign.append)
    journal.start()
    journal.put(b"/guard/handles/1", b"mine")
    await until(lambda: foreign)
    assert await store.get(b"/guard/handles/1") is None and len(journal) == 0
    await journal.stop()
    await store.close()


async def test_the_journal_writes_all_in_order_and_the_latest_wins(etcd: EtcdServer) -> None:
    store = EtcdStore([etcd.endpoint], timeout_s=2)
    leader, prefix = b"/order/leader", b"/order/handles/"
    await store.swap({}, puts={leader: b"me"})
    journal = Journal(store, guard=lambda: {leader: b"me"}, on_foreign=lambda reason: None)
    journal.start()
    for turn in range(3):
        for number in range(250):
            journal.put(prefix + b"%03d" % number, b"%d" % turn)
        await asyncio.sleep(0)
    journal.put(prefix + b"007", None)
    assert await journal.flushed(5)
    written = await store.get_prefix(prefix)
    assert len(written) == 249 and set(written.values()) == {b"2"} and len(journal) == 0
    await journal.stop()
    await store.close()


async def test_a_right_that_lapsed_for_a_moment_is_told_to_be_back(monkeypatch: Any) -> None:
    """Whoever could not go on in that moment (a takeover, say) waits for it."""
    now_s, resumed = 100.0, asyncio.Event()

    class SlowStore:
        async def refresh(self, lease: int) -> float:
            nonlocal now_s
            now_s += 1.5  # longer than what is left
            await asyncio.sleep(0)
            return 1.0 if resumed.is_set() else 2.0

    monkeypatch.setattr("tokenrelay.ledger.reign.clock_s", lambda: now_s)
    reign = Reign(SlowStore(), prefix=b"", address=lambda: "", incarnation="1", lease_s=1)  # type: ignore[arg-type]
    reign._lease, reign._granted_s = 1, 0.1
    reign._extend(now_s, 1.0)
    reign.on_resume = resumed.set
    holding = asyncio.create_task(reign._hold())
    await asyncio.wait_for(resumed.wait(), 2)
    holding.cancel()
    await asyncio.gather(holding, return_exceptions=True)


async def test_the_right_to_decide_ends_by_this_process_own_clock(etcd: EtcdServer, monkeypatch: Any) -> None:
    store = EtcdStore([etcd.endpoint], timeout_s=0.5)
    reign = Reign(store, prefix=b"/clock/", address=lambda: "here", incarnation="1", lease_s=2)
    began = asyncio.Event()

    async def begin(continued: bool) -> None:
        began.set()

    reign.on_begin = begin
    assert code(reign.refusal()) is Code.UNAVAILABLE
    reign.start()
    await asyncio.wait_for(began.wait(), 5)
    assert reign.refusal() is None
    for step_s in (-86_400, 86_400):  # the wall clock does not matter
        monkeypatch.setattr(time, "time", lambda step_s=step_s: 1e9 + step_s)
        assert reign.refusal() is None
    now_s = clock_s()
    monkeypatch.setattr("tokenrelay.ledger.reign.clock_s", lambda: now_s + 2.1)  # held up for longer than the lease
    assert code(reign.refusal()) is Code.UNAVAILABLE
    monkeypatch.undo()
    written = await store.get(b"/clock/leader")
    assert written is not None and Claim.decode(written) == Claim(1, "1", "here")
    assert json.loads(written)["term"] == 1
    await reign.stop(resign=True)
    assert await store.get(b"/clock/leader") is None
    await store.close()
