"""Which worker holds which prefix: block_hash -> holders, fed by the workers' cache events.

    directory = PrefixDirectory(entries_max=1 << 20)
    directory.apply("worker-1", incarnation, sequence=1, events=[("sealed", block_hash), …])
    directory.match(block_hashes)       # {"worker-1": 12}: blocks of the prompt that it holds, from the start

Each batch of a worker's events has a number. A batch seen before changes nothing (an old event never undoes a newer
one); a gap means something was missed: what is known of that worker is forgotten and `apply` asks for a resync. A
directory is a hint: it may know too little, and what it says is checked by whoever uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

CacheEvent = tuple[str, bytes]  # ("sealed" | "evicted", block_hash)


class Applied(Enum):
    """What became of a batch."""

    APPLIED = "applied"
    REPEATED = "repeated"  # seen before, ignored
    RESYNC = "resync"  # something was missed: send a snapshot


@dataclass(slots=True)
class _Holder:
    """One worker in one life."""

    bit: int  # its place in the entries' masks
    incarnation: str
    sequence: int  # of the last batch applied
    hashes: set[bytes] = field(default_factory=set)  # entries that have its bit


class PrefixDirectory:
    """At most `entries_max` hashes and `holders_max` workers. One thread."""

    def __init__(self, *, entries_max: int = 1 << 20, holders_max: int = 1024) -> None:
        self._entries_max = entries_max
        self._holders_max = holders_max
        self._entries: dict[bytes, int] = {}  # block_hash -> mask of holders, never 0; oldest first
        self._holders: dict[str, _Holder] = {}
        self._bits: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def apply(self, name: str, incarnation: str, sequence: int, events: Iterable[CacheEvent]) -> Applied:
        """Batch number `sequence` (from 1) of a worker's life."""
        holder = self._holders.get(name)
        if holder is None or holder.incarnation != incarnation:
            self.remove(name)
            if sequence != 1:
                return Applied.RESYNC
            holder = self._add(name, incarnation, 0)
        if sequence <= holder.sequence:
            return Applied.REPEATED
        if sequence != holder.sequence + 1:
            self.remove(name)
            return Applied.RESYNC
        holder.sequence = sequence
        for kind, block_hash in events:
            if kind == "sealed":
                self._hold(holder, block_hash)
            else:
                self._drop(holder, block_hash)
        return Applied.APPLIED

    def resync(self, name: str, incarnation: str, sequence: int, block_hashes: Iterable[bytes]) -> None:
        """Everything a worker holds, as of its batch `sequence`."""
        self.remove(name)
        holder = self._add(name, incarnation, sequence)
        for block_hash in block_hashes:
            self._hold(holder, block_hash)

    def extend(self, name: str, incarnation: str, sequence: int, events: Iterable[CacheEvent]) -> None:
        """What a stream in order brings: no gap is possible, so none is looked for. Ignored for another life."""
        holder = self._holders.get(name)
        if holder is not None and holder.incarnation == incarnation:
            holder.sequence = sequence
            for kind, block_hash in events:
                (self._hold if kind == "sealed" else self._drop)(holder, block_hash)

    def knows(self, name: str) -> bool:
        """Whether anything is known of this worker."""
        return name in self._holders

    def life(self, name: str) -> str | None:
        """The incarnation of which something is known under this name."""
        holder = self._holders.get(name)
        return None if holder is None else holder.incarnation

    def names(self) -> set[str]:
        """The workers of which something is known."""
        return set(self._holders)

    def holders(self) -> list[tuple[str, str, int, list[bytes]]]:
        """(name, incarnation, sequence, block_hashes) of every worker."""
        return [(name, held.incarnation, held.sequence, list(held.hashes)) for name, held in self._holders.items()]

    def remove(self, name: str) -> None:
        """The worker is gone, or what is known of it is not reliable any more."""
        holder = self._holders.pop(name, None)
        if holder is not None:
            for block_hash in list(holder.hashes):
                self._drop(holder, block_hash)
            del self._bits[holder.bit]

    def match(self, block_hashes: Sequence[bytes]) -> dict[str, int]:
        """For each holder of the first block: how many blocks it holds from the start on."""
        found: dict[str, int] = {}
        alive = -1
        for length, block_hash in enumerate(block_hashes):
            holding = self._entries.get(block_hash, 0) & alive
            self._note(alive & ~holding, length, found)
            if not holding:
                return found
            alive = holding
        self._note(alive, len(block_hashes), found)
        return found

    def _note(self, mask: int, length: int, found: dict[str, int]) -> None:
        if length and mask > 0:
            for bit, name in self._bits.items():
                if mask >> bit & 1:
                    found[name] = length

    def _add(self, name: str, incarnation: str, sequence: int) -> _Holder:
        if len(self._holders) >= self._holders_max:
            self.remove(next(iter(self._holders)))  # the oldest; a hint that is missing does no harm
        bit = next(bit for bit in range(self._holders_max) if bit not in self._bits)
        holder = self._holders[name] = _Holder(bit, incarnation, sequence)
        self._bits[bit] = name
        return holder

    def _hold(self, holder: _Holder, block_hash: bytes) -> None:
        mask = self._entries.pop(block_hash, 0)  # put back as the newest
        if not mask and len(self._entries) >= self._entries_max:
            self._forget_oldest()
        self._entries[block_hash] = mask | 1 << holder.bit
        holder.hashes.add(block_hash)

    def _drop(self, holder: _Holder, block_hash: bytes) -> None:
        if block_hash in holder.hashes:
            holder.hashes.discard(block_hash)
            mask = self._entries[block_hash] & ~(1 << holder.bit)
            if mask:
                self._entries[block_hash] = mask
            else:
                del self._entries[block_hash]

    def _forget_oldest(self) -> None:
        block_hash, mask = next(iter(self._entries.items()))
        del self._entries[block_hash]
        for bit, name in self._bits.items():
            if mask >> bit & 1:
                self._holders[name].hashes.discard(block_hash)


class CacheFeed:
    """The worker's side: numbers its batches, and remembers what it holds, for a resync. Bounded by its pool."""

    def __init__(self, name: str, incarnation: str) -> None:
        self.name = name
        self.incarnation = incarnation
        self.sequence = 0
        self.held: set[bytes] = set()

    def publish(self, directory: PrefixDirectory, events: Sequence[CacheEvent]) -> None:
        """Send the next batch, or everything when the directory missed something.

        A batch that begins with "lost" (the scheduler dropped events) makes the feed start from nothing: it then tells
        too little, never what is not there.
        """
        self.sequence += 1
        lost = bool(events) and events[0][0] == "lost"
        if lost:
            self.held.clear()
        for kind, block_hash in events:
            if kind == "sealed":
                self.held.add(block_hash)
            else:
                self.held.discard(block_hash)
        if lost or directory.apply(self.name, self.incarnation, self.sequence, events) is Applied.RESYNC:
            directory.resync(self.name, self.incarnation, self.sequence, self.held)
