"""What a process asks of a ledger, wherever it runs: in this process, or in a kvstore across the network.

    ledger: Ledger = LocalLedger()                     # or KvstoreClient("kvstore:7000", …)
    joined = await ledger.join(member, lease_s=10)     # keep it alive: Membership (membership.py) does it
    handle = await ledger.reserve(member.actor, extents=24, deadline_s=30)
    if isinstance(handle, Rejection): …                # an expected refusal is a value, never an exception
    async for notice in ledger.watch(member.actor): …

Every refusal is a `Rejection` whose code is typed. `Code.UNAVAILABLE` is the one that says nothing about the handle:
nobody can decide just now (no kvstore, its lease is over, a takeover is under way). Whoever gets it works colocated, or
tries again within its own deadline. A transition whose answer was lost on the way may be sent again: a client numbers
what it sends, and a repeated number gets the first answer again.

Deadlines are durations left, in seconds; instants of one clock never reach another process.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenrelay.ledger.directory import Applied, CacheEvent
from tokenrelay.ledger.ledger import Actor, Code, Duty, Handle, HandleView, Rejection
from tokenrelay.ledger.states import Event, State

__all__ = [
    "PROTOCOL",
    "Actor",
    "Applied",
    "Block",
    "CacheEvent",
    "Code",
    "Directory",
    "DirectoryNotice",
    "Duty",
    "DutyDue",
    "Event",
    "Handle",
    "HandleChanged",
    "HandleView",
    "HolderEnded",
    "Holding",
    "Joined",
    "Ledger",
    "Member",
    "MemberEnded",
    "MemberJoined",
    "Notice",
    "Rejection",
    "Snapshot",
    "State",
    "Suspended",
    "Tier",
]

PROTOCOL = 1  # of the handover: transitions, descriptors, transports. Members with different ones do not pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A process that takes part, in one of its lives. The fields from `model_identity` on must be equal in a fleet."""

    name: str  # stays the same over restarts; a second life under it ends the first
    incarnation: str
    role: str  # "prefill", "decode", "colocated", "router"
    address: str = ""  # where its peers reach it
    model_identity: bytes = b""  # 16 bytes; empty for who holds no KV (a router): it pairs with everybody
    dtype: str = ""
    block_tokens: int = 0
    layout: str = ""  # how KV lies in memory, in the words of kernels/layout.py
    width: int = 1  # tensor-parallel ranks
    protocol: int = PROTOCOL

    @property
    def actor(self) -> Actor:
        """Name and life: what transitions are made under."""
        return Actor(self.name, self.incarnation)


@dataclass(frozen=True, slots=True)
class Joined:
    """The answer to a join."""

    term: int  # the kvstore's reign
    lease_s: float  # keep alive within; what the kvstore granted may be less than what was asked
    hash_key: bytes  # 16 bytes, the fleet's key of block hashes


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that concerns the watcher, as of now. Replaces whatever it knew; the first notice, and after every gap.

    A handle that is missing here is over. Its owner cuts every member off that is not named alive here, and whoever may
    have claimed the handle, before it uses the blocks again.
    """

    term: int
    members: tuple[Member, ...]  # alive, the watcher among them
    handles: tuple[HandleView, ...]  # open, owned or claimed by the watcher


@dataclass(frozen=True, slots=True)
class HandleChanged:
    """Somebody else moved a handle that the watcher owns or claimed. A terminal state is the last one told."""

    view: HandleView


@dataclass(frozen=True, slots=True)
class MemberJoined:
    """A new life, which can be offered to."""

    member: Member


@dataclass(frozen=True, slots=True)
class MemberEnded:
    """A life is over: it left, its lease ran out, or its name joined again.

    It may still be running (a paused process). An owner cuts it off from its memory before it uses the blocks of a
    handle again that this life had claimed.
    """

    actor: Actor
    reason: str


@dataclass(frozen=True, slots=True)
class DutyDue:
    """A handle is past its deadline and the watcher must act; told again, with growing pauses, until somebody did.

    RECLAIM and RELEASE: the owner makes that transition. FENCE: the owner cuts the claimant off, then calls `fence`.
    EXPIRE is never told: the ledger does it itself, and tells both that the handle is quarantined.
    """

    handle: Handle
    duty: Duty


@dataclass(frozen=True, slots=True)
class Suspended:
    """Transitions are refused (`Code.UNAVAILABLE`) until the next Snapshot: work colocated meanwhile."""

    reason: str


Notice = Snapshot | HandleChanged | MemberJoined | MemberEnded | DutyDue | Suspended


class Ledger(Protocol):
    """Members, handles, notices. Every call is one transition, decided in one place; all of one event loop."""

    # -- members ------------------------------------------------------------------------------------------------------
    async def join(self, member: Member, *, lease_s: float) -> Joined | Rejection:
        """Begin a life. INCOMPATIBLE names both members and every field that differs; a former life ends."""

    async def keepalive(self, actor: Actor) -> Rejection | None:
        """The lease counts anew from now. STALE_INCARNATION: this life is over, whatever the caller believes."""

    async def leave(self, actor: Actor) -> Rejection | None:
        """End a life in good order: what it owns is lost, what it claimed is fenced."""

    # -- transitions (docs/kv-ownership.md) ---------------------------------------------------------------------------
    async def reserve(self, owner: Actor, *, extents: int, deadline_s: float) -> Handle | Rejection:
        """A name for a sequence whose KV has `extents` parts; to be offered or reclaimed in `deadline_s`."""

    async def offer(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """Claimable from now on."""

    async def seal(self, handle: Handle, owner: Actor, *, extents: int) -> Rejection | None:
        """`extents` of them, counted from the start and not added, can be read now."""

    async def claim(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The claimant has room, and may read what is sealed until the deadline."""

    async def transfer(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The claimant has begun to read, or goes on reading: its lease counts anew."""

    async def decline(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """The claimant reads no more and has given up its room; for another peer the owner reserves another handle."""

    async def adopt(self, handle: Handle, claimant: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The claimant read and validated everything: it goes on alone."""

    async def release(self, handle: Handle, owner: Actor) -> Rejection | None:
        """The owner gives its pins back after the adoption."""

    async def reclaim(self, handle: Handle, owner: Actor) -> Rejection | None:
        """The owner takes the blocks back; refused while somebody may touch them."""

    async def quarantine(self, handle: Handle, owner: Actor, *, deadline_s: float | None = None) -> Rejection | None:
        """The owner wants its blocks back while somebody may read: the claimant is told, and has `deadline_s`."""

    async def fence(self, handle: Handle, owner: Actor) -> Rejection | None:
        """The owner has cut the claimant off from its memory."""

    async def acknowledge(self, handle: Handle, claimant: Actor) -> Rejection | None:
        """The claimant, told to stop, touches the blocks no more: the owner may take them back."""

    # -- what happens, and how things stand ---------------------------------------------------------------------------
    def watch(self, actor: Actor) -> AsyncIterator[Notice]:
        """What concerns this member from now on: a Snapshot, then changes. Ends when its life does.

        Bounded: a watcher that lags gets a new Snapshot instead of what it missed.
        """

    async def view(self, handle: Handle) -> HandleView | Rejection:
        """One handle as it stands, open ones and the last one of each number."""

    async def views(self, actor: Actor | None = None) -> list[HandleView] | Rejection:
        """Every open handle, or those that `actor` owns or claimed."""

    async def members(self) -> list[Member] | Rejection:
        """Everybody alive."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What one worker holds, or what changed of it: a page of the directory's stream to a router."""

    actor: Actor
    sequence: int  # the worker's last batch contained in this
    events: Sequence[CacheEvent]
    replaces: bool  # the first page of a whole set: forget what was known of this worker


@dataclass(frozen=True, slots=True)
class HolderEnded:
    """Nothing is known of this worker any more."""

    name: str


DirectoryNotice = Holding | HolderEnded


class Directory(Protocol):
    """Who holds which prefix. Workers publish, routers follow; a hint, checked by whoever uses it."""

    async def publish(self, actor: Actor, sequence: int, events: Sequence[CacheEvent]) -> Applied | Rejection:
        """Batch number `sequence` (from 1) of a life; RESYNC: something was missed, call `resync`."""

    async def resync(self, actor: Actor, sequence: int, block_hashes: Sequence[bytes]) -> Rejection | None:
        """Everything the worker holds as of its batch `sequence`; travels in bounded pages."""

    def follow(self) -> AsyncIterator[DirectoryNotice]:
        """Everything known, then every change. Goes on by itself after a lost connection, beginning anew."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of the tier: its bytes are valid only for the same layout identity."""

    block_hash: bytes
    layout: str  # dtype, layout, width and block size, as one word: members with another one never see it
    payload: bytes


class Tier(Protocol):
    """Blocks in host memory and on disk that outlive their worker. A cache: it may forget at any time."""

    async def put(self, block: Block) -> Rejection | None:
        """Keep it, if there is room. FULL: refused and counted; nothing waits for a disk."""

    async def get(self, block_hash: bytes, layout: str) -> Block | None:
        """The block, checksum verified, or None."""

    async def contains(self, block_hashes: Sequence[bytes], layout: str) -> int:
        """How many of them, from the start on, are there now."""
