"""Workers found through the kvstore: the router is a member of the fleet, and is told who joins and who is gone.

    members = Members(pool, config, security)
    await members.start()            # in the background, for ever
    await members.close()

What is known stays in use while no kvstore answers: requests go on. A member whose lease ran out keeps what its
connection to this router still carries, and is forgotten when that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

from tokenrelay.base.ids import incarnation as new_incarnation
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Code, Member, MemberEnded, MemberJoined, Notice, Rejection, Snapshot, Suspended
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.workers import WorkerPool

log = get_logger("router")

WORKER_ROLES = frozenset({"colocated", "prefill", "decode"})
LEASE_S = 10.0
RETRY_S = 1.0
LEAVE_S = 1.0


class Members:
    """Keeps the pool's workers equal to the fleet's. Event loop only."""

    def __init__(self, pool: WorkerPool, config: RouterConfig, security: Security) -> None:
        self._pool = pool
        self._client = KvstoreClient(config.kvstore, open_channel=security.open_channel, metadata=security.metadata)
        self._member: Member | None = None
        self._addresses: dict[str, str] = {}  # of living members, by name
        self._lives: dict[str, str] = {}  # their incarnations
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Begin to look, in the background."""
        self._client.start()
        self._tasks = [
            asyncio.create_task(self._run(), name="members"),
            asyncio.create_task(self._pool.prefixes.follow(self._client), name="prefixes"),
        ]

    async def close(self) -> None:
        """Leave the fleet."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._member is not None:
            with contextlib.suppress(TimeoutError):  # then its lease runs out
                async with asyncio.timeout(LEAVE_S):
                    await self._client.leave(self._member.actor)
        await self._client.close()

    async def _run(self) -> None:
        """One life after the other: a router that was fenced (paused for longer than its lease) joins anew."""
        while True:
            life = new_incarnation()
            self._member = Member(name=f"router-{life}", incarnation=life, role="router")
            joined = await self._client.join(self._member, lease_s=LEASE_S)
            if isinstance(joined, Rejection):
                if joined.code is not Code.UNAVAILABLE:
                    log.error("the fleet refuses this router", reason=joined.reason)
                await asyncio.sleep(RETRY_S * (0.5 + random.random()))
                continue
            self._pool.prefixes.join(joined.hash_key)
            log.info("in the fleet", term=joined.term, lease_s=joined.lease_s)
            alive = asyncio.create_task(self._keep_alive(joined.lease_s))
            try:
                async for notice in self._client.watch(self._member.actor):
                    self._take(notice)
            finally:
                alive.cancel()
                await asyncio.gather(alive, return_exceptions=True)
            log.warning("this router's life in the fleet is over; joining anew")

    async def _keep_alive(self, lease_s: float) -> None:
        assert self._member is not None
        while True:
            await asyncio.sleep(lease_s / 3)
            await self._client.keepalive(self._member.actor)

    def _take(self, notice: Notice) -> None:
        match notice:
            case Snapshot(members=members):
                self._pool.handovers.suspended = ""
                living = {member.name: member for member in members if _is_worker(member)}
                for name in [name for name in self._addresses if name not in living]:
                    self._forget(name)
                for member in living.values():
                    self._learn(member)
            case MemberJoined(member=member) if _is_worker(member):
                self._learn(member)
            case MemberEnded(actor=actor) if self._lives.get(actor.name) == actor.incarnation:
                self._forget(actor.name)
            case Suspended(reason=reason):
                self._pool.handovers.suspended = reason or "its connection is lost"
                log.warning("no kvstore; going on with the workers that are known", reason=reason)
            case _:
                pass

    def _learn(self, member: Member) -> None:
        name, address = member.name, member.address
        known = self._addresses.get(name)
        if known is not None and known != address:
            self._forget(name)
        self._addresses[name] = address
        self._lives[name] = member.incarnation
        self._pool.prefixes.learn(member)
        self._pool.add(address)

    def _forget(self, name: str) -> None:
        address = self._addresses.pop(name, None)
        self._lives.pop(name, None)
        self._pool.prefixes.forget(name)
        if address is not None and address not in self._addresses.values():
            self._pool.retire(address)


def _is_worker(member: Member) -> bool:
    return member.role in WORKER_ROLES and bool(member.address)
