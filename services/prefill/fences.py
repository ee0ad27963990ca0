"""Who is cut off from this service's memory, and what is proven of it (laws 2 and 6).

A life that the fleet declared over is cut off at once and for ever, whether it has a claim here or not: it may be a
process that was paused and does not know. A peer that lives and lost one claim is let in again afterwards: its
connections are gone, so what it read through them cannot go on, and it learns the blocks of a handle only from
`Follow`, which answers for open handles alone.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Actor
from tokenrelay.transfer.transport import Transport

log = get_logger("prefill")

GRACE_S = 0.5  # for a read that is under way; after it a process of this machine is killed
FENCE_S = 5.0  # one attempt
AGAIN_FIRST_S, AGAIN_MAX_S = 0.5, 30.0  # between attempts, doubled each time
ENDED_MAX = 65_536  # lives remembered as over, as many as a transport remembers


class Fences:
    """Of every transport that serves one pool. Event loop only."""

    def __init__(self, transports: list[Transport]) -> None:
        self._transports = transports
        self._alive: set[Actor] = set()
        self._ended: OrderedDict[Actor, bool] = OrderedDict()  # whether it was said, and not concluded
        self._cutting: dict[Actor, asyncio.Task[bool]] = {}
        self._excluding: dict[Actor, asyncio.Task[None]] = {}
        self.proofs = 0  # cuttings that are proven, ever

    # -- who lives ----------------------------------------------------------------------------------------------------
    def joined(self, actor: Actor) -> None:
        """A life began. One that was there before its join was heard of, and so was cut off, is let in."""
        if self._ended.get(actor):
            return
        self._ended.pop(actor, None)
        self._alive.add(actor)
        self._readmit(actor)

    def only(self, alive: Iterable[Actor], known: Iterable[Actor]) -> None:
        """Nobody else is alive; `known` were told of blocks here."""
        named = set(alive)
        connected = {Actor(peer.name, peer.incarnation) for transport in self._transports for peer in transport.peers()}
        for actor in (self._alive | connected | set(known)) - named:
            self.ended(actor, said=False)
        for actor in named - self._alive:
            self.joined(actor)

    def ended(self, actor: Actor, *, said: bool = True) -> None:
        """A life is over: it is cut off from everything, until that is proven."""
        self._alive.discard(actor)
        if actor in self._ended:
            self._ended[actor] |= said
            return
        self._ended[actor] = said
        if len(self._ended) > ENDED_MAX:
            self._ended.popitem(last=False)
        task = asyncio.create_task(self.exclude(actor), name=f"exclude {actor.name}")
        self._excluding[actor] = task
        task.add_done_callback(lambda _: self._excluding.pop(actor, None))

    def is_over(self, actor: Actor) -> bool:
        """Whether this life was declared over."""
        return actor in self._ended

    # -- cutting off --------------------------------------------------------------------------------------------------
    async def exclude(self, actor: Actor) -> None:
        """Cut it off, trying again until it is proven."""
        pause_s = AGAIN_FIRST_S
        while not await self.cut(actor):
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, AGAIN_MAX_S)

    async def cut(self, actor: Actor) -> bool:
        """One attempt: whether nothing that was open for it until now can read any more. Callers at once share it."""
        task = self._cutting.get(actor)
        if task is None:
            task = self._cutting[actor] = asyncio.create_task(self._cut(actor), name=f"cut {actor.name}")
            task.add_done_callback(lambda _: self._cutting.pop(actor, None))
        return await asyncio.shield(task)

    async def _cut(self, actor: Actor) -> bool:
        for transport in self._transports:
            proof = await self._fence(transport, actor)
            if proof is None:
                return False
            log.info("a peer is cut off", peer=actor.name, kind=transport.kind, proof=proof)
        self.proofs += 1
        if actor in self._alive:
            self._readmit(actor)
        return True

    def _readmit(self, actor: Actor) -> None:
        for transport in self._transports:
            transport.readmit(actor.incarnation)

    async def _fence(self, transport: Transport, actor: Actor) -> str | None:
        error: Exception | None = None
        for within_s, kill in ((GRACE_S, False), (FENCE_S, True)):
            try:
                return (await transport.fence(actor.incarnation, Deadline.after(within_s), kill=kill)).value
            except TokenRelayError as failure:
                error = failure
        log.error("a peer could not be cut off", peer=actor.name, kind=transport.kind, error=str(error))
        return None

    async def close(self) -> None:
        """No attempt any more."""
        tasks = [*self._cutting.values(), *self._excluding.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
