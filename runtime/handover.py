"""KV that passes between engines, as one engine sees it: what of it can be read, where there is room, what ended.

The engine never moves a byte. It says which blocks of a source are sealed (`Sealed`) and which blocks of a destination
want to be written (`Room`); whoever moves them answers through the port, from any thread:

    engine.handover.move(sequence_id, HandleEvent.CLAIM)       # the handle of a source, in the scheduler
    engine.handover.imported(sequence_id, first_token)         # read and validated: it decodes from now on
    engine.handover.stopped(sequence_id, first_token=None)     # in vain: it computes its prompt itself

A destination that is aborted keeps its blocks until `imported` or `stopped` says that nobody writes them any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tokenrelay.base.logging import get_logger
from tokenrelay.libscheduler import HandleEvent, Handover, ImportAnswer, Scheduler, block_hashes

__all__ = [
    "AllocatePool",
    "HandleEvent",
    "Handover",
    "HandoverNotice",
    "HandoverPort",
    "ImportAnswer",
    "OnHandover",
    "PoolMemory",
    "Room",
    "Sealed",
    "block_hashes",
]

log = get_logger("engine")


@dataclass(frozen=True, slots=True)
class Sealed:
    """More blocks of a source can be read: its blocks [first, first + len(blocks)), in the order of its tokens."""

    sequence_id: int
    first: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]  # as they are while the handle keeps the blocks


@dataclass(frozen=True, slots=True)
class Room:
    """A destination is resident. `blocks` are those behind the `cached_tokens` that were found here: to be written."""

    sequence_id: int
    cached_tokens: int
    blocks: tuple[int, ...]


HandoverNotice = Sealed | Room
OnHandover = Callable[[list[HandoverNotice]], None]


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """Memory for a KV pool that somebody else allocated, so that a transport can share it."""

    layers: Sequence[memoryview]  # writable bytes, one per layer
    generations: npt.NDArray[np.uint64]  # [blocks], writable


AllocatePool = Callable[[Sequence[int], int], PoolMemory]  # (bytes of a block per layer, blocks)


class HandoverPort:
    """The handover side of one engine. `move`, `imported`, `stopped` are for any thread, the rest is the engine's."""

    def __init__(self, scheduler: Scheduler, post: Callable[[Callable[[], None]], None]) -> None:
        """`post` runs something in the engine's thread."""
        self._scheduler = scheduler
        self._post = post
        self._told: dict[int, int] = {}  # of open sources: how many of their blocks were told
        self._destinations = 0  # submitted and without room so far, at most
        self._touched: set[int] = set()  # sources with a row in a step that was planned or committed since

    # -- any thread ---------------------------------------------------------------------------------------------------
    def move(self, sequence_id: int, *events: HandleEvent, then: Callable[[str | None], None] | None = None) -> None:
        """Move a source's handle, event after event; `then` is told in the engine's thread why the last one failed."""

        def work() -> None:
            refusal: str | None = None
            for event in events:
                refusal = self._scheduler.handle(sequence_id, event)
            if then is not None:
                then(refusal)

        self._post(work)

    def imported(self, sequence_id: int, first_token: int, then: Callable[[ImportAnswer], None] | None = None) -> None:
        """All KV of a destination is there and was validated; `then` is told in the engine's thread what was found."""

        def work() -> None:
            answer = self._scheduler.imported(sequence_id, first_token)
            self._end(sequence_id, answer)
            if then is not None:
                then(answer)

        self._post(work)

    def stopped(self, sequence_id: int, first_token: int | None = None) -> None:
        """Nobody writes into a destination's blocks any more. `first_token`: the source's, if it is known."""
        self._post(lambda: self._end(sequence_id, self._scheduler.import_stopped(sequence_id, first_token)))

    def locate(self, block_hash: bytes, then: Callable[[int, int], None]) -> None:
        """`then(block, generation)`, in the engine's thread: where this content is, sealed; block -1: nowhere.

        Whoever reads the block compares the generation after the read: the block may be taken for others meanwhile.
        """

        def work() -> None:
            block = self._scheduler.sealed_block(block_hash)
            then(block, int(self._scheduler.generations[block]) if block >= 0 else 0)

        self._post(work)

    # -- engine's thread ----------------------------------------------------------------------------------------------
    def submitted(self, sequence_id: int, handover: Handover) -> None:
        """The scheduler has it."""
        if handover == Handover.SOURCE:
            self._told[sequence_id] = 0
        elif handover == Handover.DESTINATION:
            self._destinations += 1

    def touch(self, sequence_ids: Iterable[int]) -> None:
        """Something of these may have become readable."""
        if self._told:
            self._touched.update(i for i in sequence_ids if i in self._told)

    def notices(self, still_open: Callable[[int], bool]) -> list[HandoverNotice]:
        """What is new since the last call."""
        notices: list[HandoverNotice] = []
        if self._destinations:
            for sequence_id, cached in self._scheduler.take_reserved():
                self._destinations -= 1
                blocks = tuple(self._scheduler.import_blocks(sequence_id).tolist())
                notices.append(Room(sequence_id, cached, blocks))
        for sequence_id in self._touched:
            first = self._told[sequence_id]
            fresh = self._scheduler.readable(sequence_id, first)
            if len(fresh):
                generations = tuple(self._scheduler.generations[fresh].tolist())
                notices.append(Sealed(sequence_id, first, tuple(fresh.tolist()), generations))
                self._told[sequence_id] = first + len(fresh)
        self._touched.clear()
        for sequence_id in [i for i in self._told if not still_open(i)]:
            del self._told[sequence_id]
        return notices

    def _end(self, sequence_id: int, answer: ImportAnswer) -> None:
        if answer not in (ImportAnswer.DONE, ImportAnswer.UNKNOWN):  # unknown: it was aborted before it had room
            log.error("the end of a transfer found no transfer", sequence=sequence_id, answer=answer.name)
