"""Who decides: the election of the one active kvstore, by compare-and-swap on a key bound to an etcd lease.

    reign = Reign(store, prefix=b"/tokenrelay/default/", me="kvstore-a:7000", incarnation=…, lease_s=10)
    reign.on_begin, reign.on_end, reign.on_pause, reign.on_resume = …
    reign.start()
    reign.refusal()         # None: may decide. Asked before every decision; reads a clock and nothing else

The right to decide ends by this process's own clock, a margin before etcd's lease can end, whether or not anybody
could be asked: a process that was paused finds its time over before it decides anything. The clock counts through a
suspended machine. While etcd is away the right lasts until then; afterwards everything is refused until etcd answers.
If nobody reigned in between the same memory goes on, under a higher term for what is new.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Code, Rejection
from tokenrelay.ledger.etcd import EtcdStore, LeaseGone, StoreError, end_task

log = get_logger("reign")

MARGIN = 0.1  # of the lease, for clocks that run at different rates and for an answer on its way
RETRY_MIN_S, RETRY_MAX_S = 0.05, 2.0


def clock_s() -> float:
    """Monotonic, and going on while the machine is suspended (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@dataclass(frozen=True, slots=True)
class Claim:
    """What the leader's key says; unique to one reign."""

    term: int
    incarnation: str
    address: str

    def encode(self) -> bytes:
        """For etcd."""
        return json.dumps({"term": self.term, "incarnation": self.incarnation, "address": self.address}).encode()

    @staticmethod
    def decode(value: bytes) -> Claim:
        """From etcd. Raises StoreError."""
        try:
            fields = json.loads(value)
            return Claim(int(fields["term"]), str(fields["incarnation"]), str(fields["address"]))
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"the leader's key says {value!r}") from error


async def _nothing() -> None:
    return None


class Reign:
    """One process's part in the election. Event loop only."""

    def __init__(
        self, store: EtcdStore, *, prefix: bytes, address: Callable[[], str], incarnation: str, lease_s: float
    ) -> None:
        self.term = 0  # of the present or last reign of this process
        self.leader: Claim | None = None  # whoever reigns, as far as is known
        self.on_begin: Callable[[bool], Awaitable[None]] = lambda continued: _nothing()  # True: nobody reigned since
        self.on_end: Callable[[str], None] = lambda reason: None
        self.on_pause: Callable[[str], None] = lambda reason: None
        self.on_resume: Callable[[], None] = lambda: None
        self._store = store
        self._leader_key, self._term_key = prefix + b"leader", prefix + b"term"
        self._address = address
        self._incarnation = incarnation
        self._lease_s = max(1, math.ceil(lease_s))
        self._granted_s = lease_s
        self._until_s = 0.0  # on clock_s
        self._claimed = b""  # the leader's key as this reign wrote it
        self._remembered = 0  # the last term whose state is in this process's memory
        self._lease: int | None = None
        self._lost = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    # -- what others ask ----------------------------------------------------------------------------------------------
    def refusal(self) -> Rejection | None:
        """Why this process may not decide now, or None."""
        left_s = self._until_s - clock_s()
        if left_s > 0:
            return None
        if self._until_s == 0.0:
            return Rejection(Code.UNAVAILABLE, "this kvstore is not the active one")
        return Rejection(Code.UNAVAILABLE, f"etcd has not been heard from, and the lease is over since {-left_s:.1f} s")

    @property
    def guard(self) -> dict[bytes, bytes | None]:
        """What every write of this reign expects: that it is still the one."""
        return {self._leader_key: self._claimed}

    def lost(self, reason: str) -> None:
        """A write found that another one reigns."""
        log.error("another kvstore reigns", reason=reason)
        self._until_s = 0.0
        self._lost.set()

    # -- life ---------------------------------------------------------------------------------------------------------
    def start(self) -> None:
        """Stand by, and reign when it is our turn, for ever."""
        self._task = asyncio.create_task(self._run(), name="reign")

    async def stop(self, resign: bool) -> None:
        """No more; `resign` lets another one begin at once."""
        task, self._task = self._task, None
        await end_task(task)
        self._until_s = 0.0
        lease, self._lease = self._lease, None
        if resign and lease is not None:
            try:
                await self._store.revoke(lease)
            except StoreError as error:
                log.warning("the lease was not given back; it runs out", error=str(error))

    async def _run(self) -> None:
        pause_s = RETRY_MIN_S
        while True:
            try:
                await self._stand_by()
                if await self._claim():
                    await self._reign()
                    pause_s = RETRY_MIN_S
            except StoreError as error:
                log.warning("etcd", error=str(error))
            except Exception:  # a bug, and no reason to leave the fleet without a standby
                log.exception("the reign failed")
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def _reign(self) -> None:
        """From the election to the end. Raises StoreError when what is written down cannot be read."""
        reason = "what is written down could not be read"
        try:
            continued = self._remembered != 0 and self.term == self._remembered + 1
            log.info("reigning", term=self.term, continued=continued)
            await self.on_begin(continued)
            self._remembered = self.term
            reason = await self._hold()
        finally:
            lease, self._lease, self._until_s = self._lease, None, 0.0
            self.on_end(reason)
            if lease is not None and not self._lost.is_set():
                await self._store.revoke(lease)

    async def _stand_by(self) -> None:
        """Until nobody reigns."""
        async for value in self._store.follow(self._leader_key):
            if value is None:
                self.leader = None
                return
            self.leader = Claim.decode(value)
            if self.leader.incarnation == self._incarnation:
                return  # a claim of ours whose answer was lost

    async def _claim(self) -> bool:
        """Whether this process reigns now. Raises StoreError: nobody knows."""
        began_s = clock_s()
        lease, granted_s = await self._store.grant(self._lease_s)
        written = await self._store.get(self._term_key)
        term = 1 + (0 if written is None else int(written))
        claim = Claim(term, self._incarnation, self._address())
        held = await self._store.get(self._leader_key)
        if held is not None and Claim.decode(held).incarnation != self._incarnation:
            await self._store.revoke(lease)
            return False
        won = await self._store.swap(
            {self._leader_key: held, self._term_key: written},
            puts={self._leader_key: claim.encode(), self._term_key: str(term).encode()},
            leased={self._leader_key: lease},
        )
        if not won:
            await self._store.revoke(lease)
            return False
        self._lease, self._granted_s, self.term, self.leader = lease, granted_s, term, claim
        self._claimed = claim.encode()
        self._lost.clear()
        self._extend(began_s, granted_s)
        return True

    def _extend(self, from_s: float, granted_s: float) -> None:
        """etcd's lease ends `granted_s` after it got our request at the earliest, so after we sent it."""
        self._until_s = from_s + granted_s * (1 - MARGIN)

    async def _hold(self) -> str:
        """Renew until the reign is over; why it is."""
        paused = False
        assert self._lease is not None
        while True:
            if paused:
                wait_s = min(RETRY_MAX_S, self._granted_s / 10) * (0.5 + random.random())
            else:
                wait_s = min(self._granted_s / 3 * (0.9 + 0.2 * random.random()), self._until_s - clock_s())
            if await self._lost_within(wait_s):
                return "another kvstore took over"
            refusal = self.refusal()
            if refusal is not None and not paused:
                paused = True
                self.on_pause(refusal.reason)
            sent_s, until_s = clock_s(), self._until_s
            try:
                self._extend(sent_s, await self._store.refresh(self._lease))
            except LeaseGone:
                self._lease = None
                return "the lease is over"
            except StoreError as error:
                left_s = round(self._until_s - clock_s(), 2)
                log.warning("the lease was not renewed", left_s=left_s, error=str(error))
                if not paused:  # try again well before it is over
                    await self._lost_within(min(RETRY_MAX_S, self._granted_s / 10) * (0.5 + random.random()))
            lapsed = paused or (until_s <= clock_s() and until_s < self._until_s)  # however briefly: somebody may wait
            if lapsed and self.refusal() is None:
                paused = False
                log.info("etcd is back", term=self.term)
                self.on_resume()

    async def _lost_within(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._lost.wait(), max(0.0, seconds))
        except TimeoutError:
            return False
        return True
