"""The stream between a client and a kvstore: repeated and malformed calls, broken connections, who may connect."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import grpc
import pytest
import trustme
from kv_fleet import FAST, Fleet, Watcher, member, named
from raw_session import PREFILL, RawSession, join_call, reserve_call

from tokenrelay.base.errors import ConfigError
from tokenrelay.ledger.api import Code, Handle, Joined, Rejection, Snapshot, State, Suspended
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.connection import ConnectionOptions
from tokenrelay.ledger.wire import pack_actor
from tokenrelay.proto import kvstore_pb2 as pb
from tokenrelay.services.chassis.security import Security, SecurityConfig

DECODE = member("decode")


async def test_a_repeated_call_is_done_once(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    session = RawSession(service.address)
    assert not (await session.hello()).resumed
    await session.ask(join_call(1))
    first, second = await session.ask(reserve_call(2), reserve_call(2))
    assert first.handle == second.handle and service.store.host.books.open_count == 1
    again = RawSession(service.address)
    assert (await again.hello()).resumed
    (third,) = await again.ask(reserve_call(2))
    assert third.handle == first.handle and service.store.host.books.open_count == 1
    assert await session.status() is not None, "the former session of the same client is over"
    await session.close()
    await again.close()


async def test_what_no_client_sends_is_refused_and_counted(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    session = RawSession(service.address)
    await session.hello()
    await session.ask(join_call(1))
    actor = pack_actor(PREFILL.actor)
    bad = [
        pb.KvCall(number=2),
        pb.KvCall(number=3, move=pb.KvMove(event="explode", actor=actor)),
        pb.KvCall(number=4, move=pb.KvMove(event="lose", actor=actor)),
        pb.KvCall(number=5, publish=pb.KvPublish(actor=actor, sequence=1, kinds=b"\1\1", block_hashes=bytes(16))),
        pb.KvCall(number=6, publish=pb.KvPublish(actor=actor, sequence=1, kinds=b"\7", block_hashes=bytes(16))),
        pb.KvCall(number=7, resync=pb.KvResync(actor=actor, sequence=1, block_hashes=b"half a hash")),
        pb.KvCall(number=8, join=pb.KvJoin()),
        pb.KvCall(number=9, reserve=pb.KvReserve(owner=actor, extents=1)),
        pb.KvCall(number=10, attach=pb.KvAttach(handles=[pb.KvHandleView(state="?")])),
    ]
    replies = await session.ask(*bad)
    assert {reply.rejection.code for reply in replies} <= {"invalid", "not_yours", "unknown_handle", "wrong_state"}
    assert sum(service.store.malformed.values()) == 6, service.store.malformed
    assert service.store.host.books.open_count == 0
    await session.send(pb.KvCalls(calls=[reserve_call(100 + number) for number in range(5000)]))
    assert await session.status() is grpc.StatusCode.UNAVAILABLE
    await session.close()
    for what in (b"\xff\xff\xff truncated", pb.KvCalls(hello=pb.KvHello(client="x")).SerializeToString()[:-1]):
        broken = RawSession(service.address)
        await broken.call.write(what)
        assert await broken.status() is not grpc.StatusCode.OK
        await broken.close()
    assert service.store.malformed["hello"] == 2
    broken = RawSession(service.address)
    await broken.hello("broken")
    await broken.call.write(pb.KvCalls(calls=[reserve_call(1)]).SerializeToString()[:-3])
    assert await broken.status() is grpc.StatusCode.UNAVAILABLE
    assert service.store.malformed["unreadable"] == 1
    await broken.close()
    oversize = RawSession(service.address)
    await oversize.hello("oversize")
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        await oversize.call.write(bytes(65 << 20))
    assert await oversize.status() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await oversize.close()
    silent = RawSession(service.address)
    await silent.send(pb.KvCalls())
    assert await silent.status() is grpc.StatusCode.INVALID_ARGUMENT
    await silent.close()
    assert isinstance(await (await empty_fleet.client()).join(PREFILL, lease_s=1), Joined), "it still serves"


async def test_a_broken_connection_loses_no_call(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    await client.join(PREFILL, lease_s=30)
    handles: list[Handle] = []

    async def work() -> None:
        for _ in range(20):
            handle = named(await client.reserve(PREFILL.actor, extents=1, deadline_s=30))
            assert await client.offer(handle, PREFILL.actor) is None
            handles.append(handle)

    workers = [asyncio.create_task(work()) for _ in range(8)]
    for _ in range(5):
        await asyncio.sleep(0.02)
        service.servicer.end_sessions("to see what happens")
    await asyncio.gather(*workers)
    assert client.connection.connections > 1
    assert len(set(handles)) == 160 == service.store.host.books.open_count


@pytest.mark.parametrize("failure", [asyncio.InvalidStateError, grpc.aio.UsageError, asyncio.CancelledError, KeyError])
async def test_whatever_ends_a_connection_another_one_begins(
    empty_fleet: Fleet, failure: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    write, failures = client.connection._write, iter([failure])

    async def failing(call: object) -> None:
        if (once := next(failures, None)) is not None:
            raise once
        await write(call)

    monkeypatch.setattr(client.connection, "_write", failing)
    client.connection._stalled.set()  # leave the present one
    async with asyncio.timeout(5):
        while client.connection.connections < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert isinstance(await client.join(PREFILL, lease_s=5), Joined)


async def test_members_go_on_when_a_kvstore_without_a_backend_is_restarted(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    await client.join(PREFILL, lease_s=30)
    watcher = Watcher(client, PREFILL)
    await watcher.until(lambda n: isinstance(n, Snapshot))
    handle = named(await client.reserve(PREFILL.actor, extents=1, deadline_s=30))
    term = service.store.host.term
    await service.stop()
    empty_fleet.services.clear()
    await watcher.until(lambda n: isinstance(n, Suspended))
    again = await empty_fleet.start_service()
    snapshot = await watcher.until(lambda n: isinstance(n, Snapshot) and n.term > term)
    assert isinstance(snapshot, Snapshot) and snapshot.handles == () and snapshot.members == (PREFILL,)
    new = named(await client.reserve(PREFILL.actor, extents=1, deadline_s=30))
    assert new[:2] == handle[:2] and new.term > handle.term, "the term alone tells them apart"
    stale = await client.offer(handle, PREFILL.actor)
    assert isinstance(stale, Rejection) and stale.code is Code.STALE_TERM
    assert again.store.host.books.state(new) is State.RESERVED


async def test_without_a_kvstore_calls_fail_in_time_and_the_queue_is_bounded(tmp_path: Path) -> None:
    options = ConnectionOptions(call_timeout_s=0.2, calls_max=4, backoff_max_s=0.1)
    client = KvstoreClient([f"unix:{tmp_path}/nobody.sock"], options=options)
    client.start()
    answers = await asyncio.gather(*(client.reserve(PREFILL.actor, extents=1, deadline_s=1) for _ in range(6)))
    assert all(isinstance(answer, Rejection) and answer.code is Code.UNAVAILABLE for answer in answers)
    assert sum("open already" in answer.reason for answer in answers if isinstance(answer, Rejection)) == 2
    assert client.connection.open_count == 0
    await client.close()


async def test_a_kvstore_that_hangs_is_left_for_another_one(empty_fleet: Fleet) -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    hung = await asyncio.start_server(hang, "127.0.0.1", 0)
    service = await empty_fleet.start_service()
    targets = [f"127.0.0.1:{hung.sockets[0].getsockname()[1]}", service.address]
    client = await empty_fleet.kvstore_client(*targets, options=FAST)
    assert isinstance(await client.join(PREFILL, lease_s=5), Joined) and client.connection.target == service.address
    hung.close()


async def test_a_late_answer_leaves_no_handle_behind(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    await client.join(PREFILL, lease_s=30)
    given_up = asyncio.create_task(client.reserve(PREFILL.actor, extents=1, deadline_s=30))
    for _ in range(3):
        await asyncio.sleep(0)  # it is on its way
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    async with asyncio.timeout(3):
        while service.store.host.transitions.total() == 0 or service.store.host.books.open_count:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_the_token_is_asked_for(empty_fleet: Fleet) -> None:
    security = Security(token="a-token-of-the-fleet")
    service = await empty_fleet.start_service(security=security)
    good = await empty_fleet.kvstore_client(metadata=security.metadata)
    assert isinstance(await good.join(PREFILL, lease_s=5), Joined)
    for metadata in ((), (("authorization", "Bearer wrong-token-of-fleet"),)):
        stranger = KvstoreClient([service.address], metadata=metadata, options=FAST)
        stranger.start()
        assert not await stranger.wait_ready(0.5)
        assert "token is missing or wrong" in str(stranger.connection.last_error)
        await stranger.close()
    assert security.refused >= 2


async def test_mutual_tls_lets_only_the_fleet_in(empty_fleet: Fleet, tmp_path: Path) -> None:
    authority, foreign = trustme.CA(), trustme.CA()

    def files(issuer: trustme.CA, name: str) -> SecurityConfig:
        certificate = issuer.issue_cert("tokenrelay")
        paths = {part: str(tmp_path / f"{name}-{part}.pem") for part in ("certificate", "key", "authority")}
        Path(paths["certificate"]).write_bytes(b"".join(part.bytes() for part in certificate.cert_chain_pems))
        Path(paths["key"]).write_bytes(certificate.private_key_pem.bytes())
        Path(paths["authority"]).write_bytes(authority.cert_pem.bytes())
        return SecurityConfig(**paths)

    fleet_security = Security.of(files(authority, "fleet"))
    service = await empty_fleet.start_service(address="127.0.0.1:0", security=fleet_security)
    inside = await empty_fleet.kvstore_client(open_channel=fleet_security.open_channel)
    assert isinstance(await inside.join(PREFILL, lease_s=5), Joined)
    for outside in (Security.of(files(foreign, "foreign")), Security()):
        stranger = KvstoreClient([service.address], open_channel=outside.open_channel, options=FAST)
        stranger.start()
        assert not await stranger.wait_ready(0.5)
        await stranger.close()


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"token": "short"}, "security.token has 5 bytes"),
        ({"token": "with spaces in the middle"}, "security.token must be ASCII"),
        ({"token": "a" * 20, "token_file": "/x"}, "both give the token"),
        ({"certificate": "/x"}, "security.key, security.authority missing"),
        ({"certificate": "/nowhere", "key": "/nowhere", "authority": "/nowhere"}, "cannot read /nowhere"),
    ],
)
def test_bad_security_settings_are_named(fields: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Security.of(SecurityConfig(**fields))


async def test_health_ready_and_metrics(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    await client.join(PREFILL, lease_s=30)
    handle = named(await client.reserve(PREFILL.actor, extents=1, deadline_s=30))
    await client.claim(handle, DECODE.actor)

    async def get(path: str) -> tuple[int, str]:
        url = f"http://127.0.0.1:{service.admin_port}{path}"
        async with aiohttp.ClientSession() as http, http.get(url) as reply:
            return reply.status, await reply.text()

    assert (await get("/health"))[0] == 200 and (await get("/ready"))[0] == 200
    _, page = await get("/metrics")
    for line in (
        'tokenrelay_kvstore_role{role="active"} 1',
        'tokenrelay_kvstore_handles{state="reserved"} 1',
        'tokenrelay_kvstore_refusals_total{code="stale_incarnation"} 1',
        "tokenrelay_kvstore_members 1",
    ):
        assert line in page.splitlines()
    await service.drain()
    assert (await get("/ready")) == (503, "draining\n")
