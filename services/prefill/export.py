"""One handle of a source: what can be read, who may be reading, how the scheduler's copy follows the ledger."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from tokenrelay.base.errors import Unavailable
from tokenrelay.ledger.api import Actor, Code, Handle, State
from tokenrelay.proto import peer_pb2, worker_pb2
from tokenrelay.runtime.handover import HandleEvent
from tokenrelay.services.chassis.channel import encode_error

# What the scheduler's copy of a handle goes through to get where the ledger has it; what it has behind it is refused.
PATHS: dict[State, tuple[HandleEvent, ...]] = {
    State.OFFERED: (HandleEvent.OFFER,),
    State.CLAIMED: (HandleEvent.OFFER, HandleEvent.CLAIM),
    State.TRANSFERRING: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.TRANSFER),
    State.ADOPTED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.ADOPT),
    State.QUARANTINED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.EXPIRE),
    State.RETURNED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.DECLINE, HandleEvent.ACKNOWLEDGE),
    State.RELEASED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.ADOPT, HandleEvent.RELEASE),
    State.RECLAIMED: (HandleEvent.OFFER, HandleEvent.DECLINE, HandleEvent.RECLAIM),
    State.FENCED: (HandleEvent.OFFER, HandleEvent.CLAIM, HandleEvent.FENCE),
}
# Where the pins go back. Lost is none of them: then this life is over, whoever reads was not told to stop, and the
# process ends with its blocks as they are.
ENDS = (State.RELEASED, State.RECLAIMED, State.FENCED)
ANSWERED = (State.RETURNED, State.ADOPTED)  # its claimant said that it reads no more
FORGOTTEN = (Code.UNKNOWN_HANDLE, Code.STALE_GENERATION, Code.STALE_TERM)  # the ledger does not know the handle


@dataclass
class Export:
    """One handle of this service, from its reservation to its end."""

    sequence_id: int
    handle: Handle
    blocks: list[int] = field(default_factory=list)
    generations: list[int] = field(default_factory=list)
    first_token: int | None = None  # with it all blocks are there and sealed in the ledger
    gone: str | None = None  # why there will be nothing to adopt
    ended: bool = False  # the engine has answered: nothing of it is computed any more
    unwanted: bool = False  # the client gave up; the engine may have ended it just before it heard so
    state: State = State.RESERVED  # as the ledger last said
    claimant: Actor | None = None  # as the ledger named it; a handle is claimed once
    readers: set[Actor] = field(default_factory=set)  # who claimed it or was told of its blocks, and has not answered
    closed: bool = False  # nobody is told of its blocks any more
    ending: bool = False  # its pins go back as soon as nobody reads
    offered: bool = False  # the router has the offer; what came before that waits in `held`
    held: list[worker_pb2.SequenceOutput] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    followers: int = 0

    def tell(self) -> None:
        """Wake whoever follows."""
        self.changed.set()
        self.changed = asyncio.Event()

    def close(self) -> None:
        """Tell nobody of its blocks any more."""
        self.closed = True
        if self.gone is None and self.first_token is None:
            self.gone = encode_error(Unavailable("the handle is over"))
        self.tell()

    async def progress(self) -> AsyncIterator[peer_pb2.Progress]:
        """For one follower, to the end of the handle or the completion of its KV."""
        told = 0
        while True:
            changed = self.changed
            if self.gone is not None:
                yield peer_pb2.Progress(gone=peer_pb2.Gone(error=self.gone))
                return
            if self.closed:  # whoever has adopted it knows all there is
                return
            if told < len(self.blocks):
                extents = peer_pb2.Extents(first=told, blocks=self.blocks[told:], generations=self.generations[told:])
                told = len(self.blocks)
                yield peer_pb2.Progress(extents=extents)
            elif self.first_token is not None:
                yield peer_pb2.Progress(complete=peer_pb2.Complete(first_token=self.first_token))
                return
            else:
                await changed.wait()
