"""A member's life at a ledger: join, keep alive, know when it is over.

    membership = Membership(ledger, member, lease_s=10, on_ended=stop_serving)
    joined = await membership.begin(timeout_s=60)       # raises HandshakeRefused, Unavailable
    ...
    await membership.leave()

A life that the ledger ended does not come back: the process begins a new one (another incarnation) or ends. A ledger
that cannot be reached ends nobody's life by itself; `lapsed` says that the lease may be over by now, and whoever serves
others' reads or reads others' memory stops until it is False again.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import HandshakeRefused, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Code, Joined, Ledger, Member

log = get_logger("membership")

RETRY_MIN_S, RETRY_MAX_S = 0.1, 2.0
KEEPALIVES = 3  # within a lease


class Membership:
    """One member in one life. Event loop only."""

    def __init__(self, ledger: Ledger, member: Member, *, lease_s: float, on_ended: Callable[[str], None]) -> None:
        """`on_ended(reason)` is called once, when the ledger has ended this life."""
        self.member = member
        self.joined: Joined | None = None
        self._ledger = ledger
        self._lease_s = lease_s
        self._on_ended = on_ended
        self._heard_s = 0.0  # when the last keepalive that was answered was sent; monotonic
        self._task: asyncio.Task[None] | None = None

    @property
    def lapsed(self) -> bool:
        """Whether the lease may be over, as far as this process can know."""
        return self.joined is None or time.monotonic() - self._heard_s > self.joined.lease_s

    async def begin(self, timeout_s: float) -> Joined:
        """Join, trying again while there is no ledger.

        Raises HandshakeRefused for a member that does not fit or is malformed, Unavailable when there was no ledger
        within `timeout_s`, or it is full.
        """
        deadline, pause_s = Deadline.after(timeout_s), RETRY_MIN_S
        while True:
            sent_s = time.monotonic()
            answer = await self._ledger.join(self.member, lease_s=self._lease_s)
            if isinstance(answer, Joined):
                self.joined, self._heard_s = answer, sent_s
                self._task = asyncio.create_task(self._keep_alive(answer.lease_s), name=f"member {self.member.name}")
                return answer
            if answer.code in (Code.INCOMPATIBLE, Code.INVALID, Code.STALE_INCARNATION):
                raise HandshakeRefused(f"the ledger refuses {self.member.name}: {answer.reason}")
            if deadline.left_s() < pause_s:
                raise Unavailable(f"{self.member.name} did not join within {timeout_s:g} s: {answer.reason}")
            await asyncio.sleep(pause_s * (0.5 + random.random()))
            pause_s = min(2 * pause_s, RETRY_MAX_S)

    async def leave(self) -> None:
        """End this life in good order; nothing more is called."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if self.joined is not None:
            self.joined = None
            refusal = await self._ledger.leave(self.member.actor)
            if refusal is not None:
                log.warning("not told that it left", member=self.member.name, reason=refusal.reason)

    async def _keep_alive(self, lease_s: float) -> None:
        while True:
            await asyncio.sleep(lease_s / KEEPALIVES * (0.8 + 0.2 * random.random()))
            sent_s = time.monotonic()
            refusal = await self._ledger.keepalive(self.member.actor)
            if refusal is None:
                self._heard_s = sent_s
            elif refusal.code is Code.STALE_INCARNATION:
                log.error("the ledger has ended this life", member=self.member.name, reason=refusal.reason)
                self.joined = None
                self._on_ended(refusal.reason)
                return
