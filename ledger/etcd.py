"""etcd (3.4, 3.5) through aetcd, as little of it as the kvstore needs, and whole: every wait has an end.

    store = EtcdStore(["127.0.0.1:2379"], timeout_s=1)
    lease = await store.grant(10)
    won = await store.swap({b"leader": None}, puts={b"leader": b"me"}, lease=lease)
    async for value in store.follow(b"leader"): …           # goes on over restarts of etcd

aetcd reports a lost server in several ways, and its watch ends at the first; here all of that is StoreError, and
`follow` watches again from the revision after the last it saw. API: etcd.io/docs/v3.5/learning/api.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import aetcd
import aetcd.exceptions

from tokenrelay.base.logging import get_logger

log = get_logger("etcd")

MESSAGE_BYTES_MAX = 64 << 20  # all handles of a fleet in one answer
OPERATIONS_MAX = 100  # of one transaction; etcd's own bound is 128
REWATCH_MIN_S, REWATCH_MAX_S = 0.05, 2.0
Answer = TypeVar("Answer")


class StoreError(Exception):
    """etcd did not do it, or nobody knows whether it did."""


class LeaseGone(StoreError):
    """The lease is over, and every key bound to it gone."""


class EtcdStore:
    """A connection to one of several endpoints; another one after each failure. One event loop."""

    def __init__(self, endpoints: Sequence[str], *, timeout_s: float) -> None:
        self._endpoints = list(endpoints)
        random.shuffle(self._endpoints)
        self._timeout_s = timeout_s
        self._client: Any = None
        self._used = 0
        self.errors = 0  # requests that failed, ever

    async def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            await _quietly(client.close(), self._timeout_s)

    # -- requests -----------------------------------------------------------------------------------------------------
    async def get(self, key: bytes) -> bytes | None:
        """Its value, None where there is none. Raises StoreError."""
        found = await self._try(lambda client: client.get(key))
        return None if found is None else bytes(found.value)

    async def get_prefix(self, prefix: bytes) -> dict[bytes, bytes]:
        """Every key that begins so. Raises StoreError."""
        found = await self._try(lambda client: client.get_prefix(prefix))
        return {bytes(pair.key): bytes(pair.value) for pair in found}

    async def swap(
        self,
        expected: Mapping[bytes, bytes | None],
        *,
        puts: Mapping[bytes, bytes],
        deletes: Sequence[bytes] = (),
        leased: Mapping[bytes, int] | None = None,
    ) -> bool:
        """Write if every expected key has that value (None: is not there): all or nothing. `leased`: key -> lease.

        At most OPERATIONS_MAX writes. Raises StoreError: nobody knows whether it was done.
        """

        def transaction(client: Any) -> Any:
            make = client.transactions
            compare = [
                make.version(key) == 0 if value is None else make.value(key) == value for key, value in expected.items()
            ]
            writes = [make.put(key, value, (leased or {}).get(key)) for key, value in puts.items()]
            writes += [make.delete(key) for key in deletes]
            return client.transaction(compare=compare, success=writes, failure=[])

        succeeded, _ = await self._try(transaction)
        return bool(succeeded)

    async def grant(self, ttl_s: int) -> tuple[int, float]:
        """(id, seconds granted) of a new lease. Raises StoreError."""
        lease = await self._try(lambda client: client.lease(ttl_s))
        return int(lease.id), float(lease.ttl)

    async def refresh(self, lease: int) -> float:
        """Seconds it counts from now on. Raises LeaseGone, StoreError."""
        reply = await self._try(lambda client: client.refresh_lease(lease))
        if reply is None or reply.TTL <= 0:
            raise LeaseGone("the lease is over")
        return float(reply.TTL)

    async def revoke(self, lease: int) -> None:
        """End a lease and its keys. Raises StoreError."""
        await self._try(lambda client: client.revoke_lease(lease))

    # -- watching -----------------------------------------------------------------------------------------------------
    async def follow(self, key: bytes) -> AsyncIterator[bytes | None]:
        """The key's value now (None: it is not there), then each new one, over lost connections, until cancelled.

        After a lost connection it goes on from the revision after the last one seen; where etcd has compacted that
        away, it begins with the value as it is now.
        """
        pause_s, revision = REWATCH_MIN_S, 0
        while True:
            watch: Any = None
            try:
                if not revision:
                    yield await self.get(key)
                start = revision + 1 if revision else None
                client = await self._connected()
                async with asyncio.timeout(self._timeout_s):
                    watch = await client.watch(key, start_revision=start)
                if not revision:
                    yield await self.get(key)  # what changed between the first look and the watch
                async for event in watch:
                    pause_s = REWATCH_MIN_S
                    revision = event.kv.mod_revision
                    yield bytes(event.kv.value) if event.kind == aetcd.EventKind.PUT else None
            except aetcd.exceptions.RevisionCompactedError:
                log.info("the history is compacted: beginning with the present value", key=key)
                revision = 0
                continue
            except Exception as error:  # as above
                log.warning("watching again", key=key, error=repr(error))
            finally:
                if watch is not None:
                    await _quietly(watch.cancel(), self._timeout_s)
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(2 * pause_s, REWATCH_MAX_S)

    # -- the connection -----------------------------------------------------------------------------------------------
    async def _connected(self) -> Any:
        if self._client is None:
            host, _, port = self._endpoints[self._used % len(self._endpoints)].rpartition(":")
            self._client = aetcd.Client(
                host.strip("[]"),
                int(port),
                timeout=self._timeout_s,
                options={
                    "grpc.max_receive_message_length": MESSAGE_BYTES_MAX,
                    "grpc.use_local_subchannel_pool": 1,
                    "grpc.enable_http_proxy": 0,
                    "grpc.initial_reconnect_backoff_ms": 100,
                    "grpc.min_reconnect_backoff_ms": 100,
                    "grpc.max_reconnect_backoff_ms": 1000,
                },
            )
            await self._client.connect()
        return self._client

    async def _try(self, request: Callable[[Any], Awaitable[Answer]]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await request(await self._connected())
        except Exception as error:  # aetcd's and grpc's, and what a client that is closed meanwhile raises
            self.errors += 1
            self._used += 1
            if len(self._endpoints) > 1:
                await self.close()  # the next one
            raise StoreError(f"etcd at {', '.join(self._endpoints)}: {error!r}") from error


async def _quietly(work: Awaitable[Any], timeout_s: float) -> None:
    """Clean up after something that broke: that it cannot be cleaned up is no news."""
    try:
        async with asyncio.timeout(timeout_s):
            await work
    except Exception as error:
        log.debug("closing", error=repr(error))


async def end_task(task: asyncio.Task[None] | None) -> None:
    """Cancel it until it is over: aetcd waits in ways that can swallow a cancellation (asyncio.wait_for of 3.11)."""
    while task is not None and not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
