"""Death, pauses and nonsense, at either end of a transfer."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from pools import Pool, layout
from processes import PeerError, PeerProcess
from transfer_stage import Stage

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, HandshakeRefused, TokenRelayError, TransferFailed
from tokenrelay.services.chassis.security import Security
from tokenrelay.transfer import control
from tokenrelay.transfer.memory import SharedPool
from tokenrelay.transfer.runs import Span
from tokenrelay.transfer.select import available
from tokenrelay.transfer.transport import Endpoint, Identity, Transport

BIG = 1 << 20  # bytes of a block: a pull of all takes long enough to be hit
BIG_BLOCKS = 48


def soon() -> Deadline:
    """Long enough for a loaded machine."""
    return Deadline.after(20)


async def reading_peer(stage: Stage, pool: Pool) -> tuple[PeerProcess, Transport, str]:
    """A process that pulls from this one's pool again and again: it, our transport, its incarnation."""
    transport = await stage.transport(pool, "prefill-0")
    peer = await stage.peer(BIG_BLOCKS, "decode-0", layout={"block_bytes": [BIG]})
    await peer.ask("connect", endpoint=transport.endpoint().hex())
    await peer.ask("pull_for_ever", blocks=list(range(BIG_BLOCKS)))
    await asyncio.sleep(0.1)
    return peer, transport, await peer.incarnation()


@pytest.fixture
def big() -> Pool:
    """48 MiB in one layer, filled."""
    return Pool(layout((BIG,)), BIG_BLOCKS)


async def test_a_reader_killed_in_a_pull_is_known_to_be_dead(stage: Stage, big: Pool) -> None:
    peer, transport, life = await reading_peer(stage, big)
    fence = asyncio.create_task(transport.fence(life, soon()))
    peer.signal(signal.SIGKILL)
    assert (await fence).value in {"gone", "dead", "revoked"}
    await peer.kill()
    deadline = soon()
    while transport.peers():
        assert not deadline.passed
        await asyncio.sleep(0.01)
    assert (await transport.fence(life, soon())).value == "absent"


async def test_a_live_reader_that_is_fenced_in_a_pull_stops(stage: Stage, big: Pool) -> None:
    peer, transport, life = await reading_peer(stage, big)
    assert (await transport.fence(life, soon())).value in {"acknowledged", "revoked", "gone"}
    assert await peer.ask("pull_outcome") == "transfer_failed fenced"


async def test_a_paused_reader_is_fenced_or_stays_quarantined(stage: Stage, big: Pool) -> None:
    """It cannot answer. Where it was stopped in the middle of a read, only its death is a proof; a timer is none."""
    peer, transport, life = await reading_peer(stage, big)
    peer.signal(signal.SIGSTOP)
    await asyncio.sleep(0.05)
    try:
        proof = await transport.fence(life, Deadline.after(0.3))
    except DeadlineExceeded:
        assert stage.kind != "stream", "the owner reads for it, so nothing has to be waited for"
        with pytest.raises(DeadlineExceeded, match="stay in quarantine"):
            await transport.fence(life, Deadline.after(0.2))
        assert (await transport.fence(life, soon(), kill=True)).value in {
            "dead",
            "gone",
            "revoked",
        }  # its lock goes too
        return
    assert proof.value == "revoked"
    peer.signal(signal.SIGCONT)  # when it goes on, it finds the door shut
    assert await peer.ask("pull_outcome") == "transfer_failed fenced"


async def test_a_paused_reader_that_reads_nothing_is_fenced(stage: Stage, big: Pool) -> None:
    transport = await stage.transport(big, "prefill-0")
    peer = await stage.peer(BIG_BLOCKS, "decode-0", layout={"block_bytes": [BIG]})
    await peer.ask("connect", endpoint=transport.endpoint().hex())
    life = await peer.incarnation()
    peer.signal(signal.SIGSTOP)
    assert (await transport.fence(life, Deadline.after(5))).value == "revoked"
    peer.signal(signal.SIGCONT)
    with pytest.raises(PeerError, match="transfer_failed"):
        await peer.ask("pull", blocks=[1])


async def test_an_owner_killed_in_a_pull_ends_it(stage: Stage, big: Pool) -> None:
    peer = await stage.peer(BIG_BLOCKS, layout={"block_bytes": [BIG]})
    transport = await stage.transport(big)
    connection = await transport.connect(await peer.endpoint(), soon())
    blocks = range(BIG_BLOCKS)

    async def pull() -> None:
        while True:
            await connection.pull([Span(0, 1, blocks, blocks)], soon())

    task = asyncio.create_task(pull())
    await asyncio.sleep(0.05)
    peer.signal(signal.SIGKILL)
    with pytest.raises(TransferFailed) as failed:
        await asyncio.wait_for(task, 30)
    assert failed.value.reason in {"peer_gone", "transport"}
    await asyncio.wait_for(connection.settled(), 10)


async def test_a_paused_owner_costs_a_deadline_not_the_connection(stage: Stage, big: Pool) -> None:
    peer = await stage.peer(BIG_BLOCKS, layout={"block_bytes": [BIG]})
    await peer.ask("fill", blocks=list(range(BIG_BLOCKS)))
    transport = await stage.transport(big)
    connection = await transport.connect(await peer.endpoint(), soon())
    spans = [Span(0, 1, range(BIG_BLOCKS), range(BIG_BLOCKS))]
    peer.signal(signal.SIGSTOP)
    try:
        await connection.pull(spans, Deadline.after(0.5))
    except DeadlineExceeded:
        assert stage.kind != "shared", "nobody is needed to read shared memory"
    peer.signal(signal.SIGCONT)
    await asyncio.wait_for(connection.settled(), 20)
    await connection.pull(spans, soon())
    assert all(big.holds(0, block, block, 0) for block in (0, 20, BIG_BLOCKS - 1))


async def test_after_a_cancelled_pull_nothing_is_written(stage: Stage, big: Pool) -> None:
    peer = await stage.peer(BIG_BLOCKS, layout={"block_bytes": [BIG]})
    await peer.ask("fill", blocks=list(range(BIG_BLOCKS)))
    transport = await stage.transport(big)
    connection = await transport.connect(await peer.endpoint(), soon())
    for pause_s in (0.0, 0.001, 0.01):
        task = asyncio.create_task(connection.pull([Span(0, 1, range(BIG_BLOCKS), range(BIG_BLOCKS))], soon()))
        await asyncio.sleep(pause_s)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await asyncio.wait_for(connection.settled(), 10)
        for block in range(BIG_BLOCKS):
            big.block(0, block)[:] = 255
        await asyncio.sleep(0.05)
        assert all((big.block(0, block) == 255).all() for block in range(0, BIG_BLOCKS, 5))
    await connection.pull([Span(0, 1, [1], [1])], soon())
    assert big.holds(0, 1, 1, 0)


async def test_idle_transports_do_nothing(stage: Stage, pool: Pool) -> None:
    """Connected, after a pull and with nothing to do, both ends use next to no processor time."""
    peer, transport = await stage.peer(), await stage.transport(pool)
    connection = await transport.connect(await peer.endpoint(), soon())
    await connection.pull([Span(0, 3, range(40), range(40))], soon())
    await asyncio.sleep(0.2)
    began_s, their_s = time.process_time(), await peer.ask("processor_s")
    await asyncio.sleep(1.5)
    ours_s, theirs_s = time.process_time() - began_s, await peer.ask("processor_s") - their_s
    assert ours_s < 0.1
    assert theirs_s < 0.1


async def test_a_silent_owner_costs_a_deadline(stage: Stage, pool: Pool, folder: str) -> None:
    transport = await stage.transport(pool)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(f"{folder}/silent")
        silent.listen()
        endpoint = msgspec.msgpack.encode(Endpoint(stage.kind, f"unix:{folder}/silent", Identity("prefill-0", "1")))
        with pytest.raises(DeadlineExceeded):
            await transport.connect(endpoint, Deadline.after(0.3))


async def test_nobody_at_the_address_is_a_failure(stage: Stage, pool: Pool, folder: str) -> None:
    transport = await stage.transport(pool)
    endpoint = msgspec.msgpack.encode(Endpoint(stage.kind, f"unix:{folder}/nobody", Identity("prefill-0", "1")))
    with pytest.raises(TransferFailed) as failed:
        await transport.connect(endpoint, soon())
    assert failed.value.reason == "peer_gone"


async def test_an_endpoint_of_another_kind_is_refused(stage: Stage, pool: Pool) -> None:
    transport = await stage.transport(pool)
    endpoint = msgspec.msgpack.encode(Endpoint("pigeon", "unix:/x", Identity("prefill-0", "1")))
    with pytest.raises(HandshakeRefused, match="prefill-0 offers pigeon, decode-0 has"):
        await transport.connect(endpoint, soon())


# What arrives at an owner's control connection.


@pytest.fixture(params=[kind for kind in available() if kind != "stream"])
async def controlled(request: pytest.FixtureRequest, folder: str, pool: Pool) -> AsyncIterator[Transport]:
    """An owner with a control connection."""
    stage = Stage(request.param, folder)
    yield await stage.transport(pool, "prefill-0")
    await stage.close()


def hello(transport: Transport, **fields: Any) -> control.Hello:
    """One that is let in."""
    given: dict[str, Any] = {
        "version": control.VERSION,
        "kind": transport.kind,
        "identity": Identity("decode-0", "1"),
        "layout": transport.memory.layout,
        **fields,
    }
    return control.Hello(**given)


async def stream_to(transport: Transport) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection to it."""
    path = Endpoint.decode(transport.endpoint()).address.removeprefix("unix:")
    return await asyncio.open_unix_connection(path)


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack("<I", 0xFFFFFFFF),
        struct.pack("<I", control.FRAME_BYTES_MAX + 1) + b"x",
        struct.pack("<I", 0),
        struct.pack("<I", 100) + b"cut short",
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        control.encode(control.Revoked()),
        control.encode(control.Refused("overloaded", "I am the owner")),
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=["huge", "oversize", "empty", "truncated", "garbage", "too early", "wrong way", "http"],
)
async def test_forged_frames_are_refused_and_counted(controlled: Transport, sent: bytes) -> None:
    reader, writer = await stream_to(controlled)
    writer.write(sent)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    labels = f'transport="{controlled.kind}",reason="corrupt"'
    assert controlled.metrics.value("transfer_refused_total", labels) == 1
    assert controlled.peers() == []


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"version": 2}, b"prefill-0 has"),
        ({"kind": "pigeon"}, b"pigeon"),
        ({"layout": layout(dtype="float32")}, b"do not fit"),
    ],
)
async def test_a_hello_that_does_not_fit_is_answered(
    controlled: Transport, fields: dict[str, Any], told: bytes
) -> None:
    reader, writer = await stream_to(controlled)
    writer.write(control.encode(hello(controlled, **fields)))
    frame = await asyncio.wait_for(control.read_frame(reader), 5)
    assert isinstance(frame, control.Refused)
    assert frame.code == "handshake_refused"
    assert told in frame.message.encode()
    writer.close()


async def test_a_reader_that_talks_nonsense_counts_as_reading_until_it_is_gone(controlled: Transport) -> None:
    """Its connection is of no more use, but it may hold the memory: it is a peer until its kernel says otherwise."""
    reader, writer = await stream_to(controlled)
    writer.write(control.encode(hello(controlled)))
    assert isinstance(await asyncio.wait_for(control.read_frame(reader), 5), control.Welcome)
    writer.write(control.encode(hello(controlled)))
    await asyncio.sleep(0.2)
    assert [peer.incarnation for peer in controlled.peers()] == ["1"]
    writer.close()
    deadline = soon()
    while controlled.peers():
        assert not deadline.passed
        await asyncio.sleep(0.01)


TOKEN = "a-token-of-the-whole-fleet"


async def test_the_fleets_token_is_asked_for(stage: Stage, pool: Pool) -> None:
    owner = await stage.transport(Pool(layout(), 4), "prefill-0", security=Security(token=TOKEN))
    for name, options in (("decode-0", {}), ("decode-1", {"token": TOKEN + "?"})):
        reader = await stage.transport(pool, name, **options)
        with pytest.raises(HandshakeRefused, match="token is missing or wrong"):
            await reader.connect(owner.endpoint(), soon())
    for name, options in (("decode-2", {"token": TOKEN}), ("decode-3", {"security": Security(token=TOKEN)})):
        reader = await stage.transport(pool, name, **options)
        await (await reader.connect(owner.endpoint(), soon())).pull([Span(0, 3, [1], [1])], soon())


# What an owner may answer.


async def forged_owner(folder: str, answer: bytes, fds: list[int]) -> asyncio.Server:
    """Answers every Hello with these bytes and descriptors."""

    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await control.read_frame(reader)
        with socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno())) as plain:
            socket.send_fds(plain, [answer], fds)
        await reader.read()
        writer.close()

    return await asyncio.start_unix_server(accepted, f"{folder}/forged")


def lying(exported: dict[str, Any], **fields: Any) -> control.Welcome:
    """An owner's answer with something else in it."""
    given: dict[str, Any] = {
        "blocks": 4,
        "addresses": (0, 16_384, 32_768),
        "strides": (4096, 4096, 1536),
        "generations": 40_960,
        "devices": (-1, -1, -1),
        **exported,
    }
    return control.Welcome(
        identity=Identity("prefill-0", "1"),
        layout=fields.pop("layout", layout()),
        exported=control.Exported(**given),
        fds=2,
    )


@pytest.mark.parametrize("kind", ["shared"])
@pytest.mark.parametrize(
    "answer",
    [
        lying({"blocks": 4000}),
        lying({"blocks": 0}),
        lying({"blocks": -4}),
        lying({"addresses": (0, 16_384, 1 << 40)}),
        lying({"addresses": (-4096, 16_384, 32_768)}),
        lying({"addresses": (0, 16_384)}),
        lying({"strides": (4096, 0, 1536)}),
        lying({"strides": (4096, -4096, 1536)}),
        lying({"generations": 1 << 40}),
        lying({"generations": -8}),
        lying({"generations": 40_961}),
        lying({}, layout=layout(dtype="float32")),
        control.Revoke(),
        control.Refused("unheard_of", "no"),
    ],
    ids=lambda answer: str(answer)[-150:],
)
async def test_a_lying_owner_of_shared_memory_is_found_out(
    kind: str, stage: Stage, pool: Pool, folder: str, answer: Any
) -> None:
    """Before anything is read: believing it would end in SIGBUS, or in somebody else's memory."""
    theirs, gate = SharedPool((4096, 4096, 1536), 4), SharedPool((1,), 1)
    server = await forged_owner(folder, control.encode(answer), [theirs.reader_fd(), gate.reader_fd()])
    transport = await stage.transport(pool)
    endpoint = msgspec.msgpack.encode(Endpoint("shared", f"unix:{folder}/forged", Identity("prefill-0", "1")))
    with pytest.raises(TokenRelayError) as failed:
        await transport.connect(endpoint, soon())
    assert isinstance(failed.value, TransferFailed | HandshakeRefused)
    server.close()


@pytest.mark.parametrize("kind", [kind for kind in available() if kind == "nixl"])
async def test_over_tcp_a_paused_reader_stays_quarantined(kind: str, stage: Stage, big: Pool) -> None:
    """Between machines there is no gate, and silence is no proof; the end of the connection is."""
    owner = await stage.transport(big, "prefill-0", listen="127.0.0.1:0")
    assert not Endpoint.decode(owner.endpoint()).address.endswith(":0")
    peer = await stage.peer(BIG_BLOCKS, "decode-0", layout={"block_bytes": [BIG]})
    await peer.ask("connect", endpoint=owner.endpoint().hex())
    await peer.ask("pull", blocks=[1, 2])
    life = await peer.incarnation()
    peer.signal(signal.SIGSTOP)
    with pytest.raises(DeadlineExceeded, match="stay in quarantine"):
        await owner.fence(life, Deadline.after(0.3))
    fence = asyncio.create_task(owner.fence(life, soon()))
    peer.signal(signal.SIGKILL)
    assert (await fence).value == "gone"


async def test_closing_ends_what_is_under_way(stage: Stage, big: Pool) -> None:
    """A pull that runs ends as closed, nothing is written after, and closing twice is closing once."""
    peer = await stage.peer(BIG_BLOCKS, layout={"block_bytes": [BIG]})
    transport = await stage.transport(big)
    connection = await transport.connect(await peer.endpoint(), soon())

    async def pull() -> None:
        while True:
            await connection.pull([Span(0, 1, range(BIG_BLOCKS), range(BIG_BLOCKS))], soon())

    task = asyncio.create_task(pull())
    await asyncio.sleep(0.05)
    await asyncio.wait_for(asyncio.gather(connection.close(), connection.close()), 10)
    big.block(0, 0)[:] = 255
    with pytest.raises(TransferFailed) as failed:
        await asyncio.wait_for(task, 10)
    assert failed.value.reason == "closed"
    assert (big.block(0, 0) == 255).all()
    await connection.close()
    deadline = soon()
    while await peer.ask("peers"):
        assert not deadline.passed
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", [kind for kind in available() if kind != "shared"])
async def test_peers_are_told_the_advertised_host(kind: str, stage: Stage, pool: Pool) -> None:
    owner = await stage.transport(Pool(layout(), 4), "prefill-0", listen="0.0.0.0:0", advertise="localhost")
    host, _, port = Endpoint.decode(owner.endpoint()).address.rpartition(":")
    assert host == "localhost"
    assert int(port) > 0
    reader = await stage.transport(pool)
    await (await reader.connect(owner.endpoint(), soon())).pull([Span(0, 3, [1], [1])], soon())


@pytest.mark.slow
async def test_a_connection_that_was_silent_for_long_is_still_there(stage: Stage, pool: Pool) -> None:
    """gRPC ends a connection whose keepalive the other end does not allow, after the third ping."""
    security = Security(token=TOKEN)
    owner = await stage.transport(Pool(layout(), 4), "prefill-0", security=security)
    connection = await (await stage.transport(pool, security=security)).connect(owner.endpoint(), soon())
    await asyncio.sleep(45)
    await connection.pull([Span(0, 3, [1], [1])], soon())
    await connection.validate([1], [0], soon())
