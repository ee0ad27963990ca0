"""The fleet's directory over the wire: gaps, restarts of routers and kvstores, followers that lag; and memberships."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
from kv_fleet import Fleet, member

from tokenrelay.base.errors import HandshakeRefused, Unavailable
from tokenrelay.ledger import directory_host
from tokenrelay.ledger.api import Actor, Applied, Code, HolderEnded, Holding, Joined, Rejection
from tokenrelay.ledger.directory import PrefixDirectory
from tokenrelay.ledger.directory_host import DirectoryHost, apply_notice, follow_into
from tokenrelay.ledger.feed import DirectoryFeed
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.local import LocalLedger
from tokenrelay.ledger.membership import Membership

W1, W2 = member("w1"), member("w2")


def h(number: int) -> bytes:
    return number.to_bytes(16, "big")


def sealed(*numbers: int) -> list[tuple[str, bytes]]:
    return [("sealed", h(n)) for n in numbers]


def evicted(*numbers: int) -> list[tuple[str, bytes]]:
    return [("evicted", h(n)) for n in numbers]


async def until(wanted: Callable[[], Any], timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not wanted():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


class Router:
    """What a router knows, followed from the kvstore."""

    def __init__(self, source: Any) -> None:
        self.directory = PrefixDirectory()
        self.task = asyncio.create_task(follow_into(self.directory, source))

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


async def test_workers_publish_and_routers_follow_over_gaps_and_restarts(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client, at_router = await empty_fleet.kvstore_client(), await empty_fleet.kvstore_client()
    router = Router(at_router)
    for who in (W1, W2):
        assert isinstance(await client.join(who, lease_s=30), Joined)
    assert await client.publish(W1.actor, 1, sealed(1, 2, 3)) is Applied.APPLIED
    assert await client.publish(W2.actor, 1, [*sealed(1, 9), *evicted(9)]) is Applied.APPLIED
    await until(lambda: router.directory.match([h(1), h(2), h(3)]) == {"w1": 3, "w2": 1})
    assert await client.publish(W1.actor, 1, evicted(1)) is Applied.REPEATED, "an old one changes nothing"
    assert await client.publish(W1.actor, 3, sealed(7)) is Applied.RESYNC, "one was missed"
    await until(lambda: router.directory.match([h(1)]) == {"w2": 1})
    many = [h(number) for number in range(10_000)]  # several pages
    assert await client.resync(W1.actor, 3, many) is None
    await until(lambda: router.directory.match(many) == {"w1": 10_000})
    assert await client.publish(W1.actor, 4, evicted(5000)) is Applied.APPLIED
    await until(lambda: router.directory.match(many) == {"w1": 5000})
    again = Router(await empty_fleet.kvstore_client())  # a router that restarts knows the same
    await until(lambda: again.directory.match(many) == {"w1": 5000} and again.directory.knows("w2"))
    assert await client.leave(W2.actor) is None
    await until(lambda: not router.directory.knows("w2") and not again.directory.knows("w2"))
    stale = await client.publish(W2.actor, 2, sealed(1))
    assert isinstance(stale, Rejection) and stale.code is Code.STALE_INCARNATION
    assert service.store.directory.resyncs == 1
    for one in (router, again):
        await one.close()


async def test_a_kvstore_that_restarts_is_told_everything_again(empty_fleet: Fleet) -> None:
    service = await empty_fleet.start_service()
    client = await empty_fleet.kvstore_client()
    router = Router(await empty_fleet.kvstore_client())
    await client.join(W1, lease_s=30)
    feed = DirectoryFeed(client, W1.actor)
    client.on_renewed.append(feed.renew)
    feed.start()
    feed.publish(sealed(*range(50)))
    feed.publish(evicted(7))
    prompt = [h(number) for number in range(50)]
    await until(lambda: router.directory.match(prompt) == {"w1": 7})
    await service.stop()
    empty_fleet.services.clear()
    feed.publish(evicted(3))  # nobody hears it
    await empty_fleet.start_service()
    await until(lambda: router.directory.match(prompt) == {"w1": 3}, 15)
    await asyncio.wait_for(feed.settled(), 5)
    assert feed.resyncs >= 1
    await feed.stop()
    await router.close()


async def test_pages_of_a_resync_that_do_not_fit_change_nothing() -> None:
    host = DirectoryHost()
    actor = Actor("w1", "1")
    assert host.resync_page(actor, 5, 1, False, [h(1)]) is not None, "it begins with page 0"
    assert host.resync_page(actor, 5, 0, False, [h(1)]) is None
    assert host.resync_page(actor, 6, 1, True, [h(2)]) is not None, "of another resync"
    assert host.resync_page(actor, 5, 1, True, [h(2)]) is not None, "the first one is given up"
    assert len(host.directory) == 0
    assert host.resync_page(actor, 7, 0, False, [h(1)]) is None
    assert host.resync_page(actor, 7, 1, True, [h(2)]) is None
    assert host.directory.match([h(1), h(2)]) == {"w1": 2}


async def test_a_follower_that_lags_begins_anew_and_ends_up_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory_host, "FOLLOWER_EVENTS_MAX", 8)
    host, copy, rng = DirectoryHost(), PrefixDirectory(), random.Random(4)
    stream = host.follow()
    feeds = {name: DirectoryFeed(host, Actor(name, "1")) for name in ("a", "b", "c")}
    for feed in feeds.values():
        feed.start()
    for turn in range(200):
        feed = feeds[rng.choice("abc")]
        numbers = {rng.randrange(12) for _ in range(3)}
        feed.publish([("evicted" if h(n) in feed.held else "sealed", h(n)) for n in numbers])
        await feed.settled()
        if rng.random() < 0.05:
            host.remove("c")
        if turn % 40 == 39:  # reads only now and then: it lags
            for _ in range(60):
                try:
                    async with asyncio.timeout(0.01):
                        apply_notice(copy, await anext(stream))
                except TimeoutError:
                    stream = host.follow()  # its connection broke
                    for name in copy.names():
                        copy.remove(name)
    notices: list[Holding | HolderEnded] = []

    async def read() -> None:
        async for notice in host.follow():
            notices.append(notice)

    copy = PrefixDirectory()
    task = asyncio.create_task(read())
    await asyncio.sleep(0.01)
    for number in range(30):  # more than a follower may leave unread, in one go
        feeds["a"].publish([*sealed(100 + number)])
        host.apply(Actor("b", "1"), 10_000 + number, [])  # gaps
    await feeds["a"].settled()
    await asyncio.sleep(0.05)
    task.cancel()
    for notice in notices:
        apply_notice(copy, notice)
    assert {(n, frozenset(x)) for n, _, _, x in copy.holders()} == {
        (n, frozenset(x)) for n, _, _, x in host.directory.holders()
    }
    for feed in feeds.values():
        await feed.stop()


# -- memberships ------------------------------------------------------------------------------------------------------
async def test_a_membership_keeps_alive_and_tells_when_it_is_over() -> None:
    host = LedgerHost()
    ledger, reasons = LocalLedger(host), []
    membership = Membership(ledger, W1, lease_s=0.3, on_ended=reasons.append)
    assert membership.lapsed
    await membership.begin(1)
    await asyncio.sleep(0.7)
    assert host.roster.alive(W1.actor) and not membership.lapsed and not reasons
    host.suspend("etcd is away")
    await asyncio.sleep(0.5)
    assert membership.lapsed and not reasons, "nobody's life ends because the ledger cannot decide"
    host.resume(1)
    await asyncio.sleep(0.2)
    assert not membership.lapsed
    other = Membership(ledger, member("w1", "2"), lease_s=0.3, on_ended=reasons.append)
    await other.begin(1)
    await until(lambda: reasons)
    assert membership.lapsed and not other.lapsed
    with pytest.raises(HandshakeRefused, match="refuses w1"):
        await membership.begin(1)
    with pytest.raises(HandshakeRefused, match="w3 and w1 do not pair"):
        await Membership(ledger, member("w3", dtype="float16"), lease_s=1, on_ended=reasons.append).begin(1)
    await other.leave()
    assert host.roster.members() == ()
    host.close()
    with pytest.raises(Unavailable, match="w2 did not join within"):
        await Membership(ledger, W2, lease_s=1, on_ended=reasons.append).begin(0.3)
