"""Who is alive: members with leases. A programmer's part of the ledger host; one thread, no timer of its own."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from tokenrelay.ledger.api import Code, Member, Rejection
from tokenrelay.ledger.ledger import Actor

# Fields that must be equal for KV of one member to be read by another.
PAIRED = ("model_identity", "dtype", "block_tokens", "layout", "width", "protocol")
ROLES = ("prefill", "decode", "colocated", "router")
TEXT_MAX = 512  # characters of a name, an address, a layout


@dataclass(slots=True)
class _Lease:
    member: Member
    lease_s: float
    ends_s: float  # on the roster's clock


class Roster:
    """Members by name, each in its present life, `members_max` of them."""

    def __init__(self, *, clock: Callable[[], float], members_max: int = 4096) -> None:
        self._clock = clock
        self._members_max = members_max
        self._leases: dict[str, _Lease] = {}
        self._ends: list[tuple[float, str, str]] = []  # heap of (instant, name, incarnation); may be out of date

    def refuse(self, member: Member, lease_s: float) -> Rejection | None:
        """Why this member may not join, or None. Names both sides of every difference."""
        invalid = _invalid(member, lease_s)
        if invalid is not None:
            return Rejection(Code.INVALID, invalid)
        if member.name not in self._leases and len(self._leases) >= self._members_max:
            return Rejection(Code.FULL, f"the fleet has {self._members_max} members already")
        if not member.model_identity:
            return None
        for lease in self._leases.values():
            other = lease.member
            if other.name == member.name or not other.model_identity:
                continue
            differences = [
                f"{field}: {member.name} has {_show(mine)}, {other.name} has {_show(theirs)}"
                for field in PAIRED
                if (mine := getattr(member, field)) != (theirs := getattr(other, field))
            ]
            if differences:
                return Rejection(
                    Code.INCOMPATIBLE, f"{member.name} and {other.name} do not pair: {'; '.join(differences)}"
                )
        return None

    def add(self, member: Member, lease_s: float) -> None:
        """Alive from now on, for `lease_s` at first. Takes the place of a former life."""
        self._leases[member.name] = _Lease(member, lease_s, 0.0)
        self.touch(member.actor)

    def touch(self, actor: Actor) -> bool:
        """The lease counts anew. False: this life is over."""
        lease = self._leases.get(actor.name)
        if lease is None or lease.member.incarnation != actor.incarnation:
            return False
        fresh = lease.ends_s == 0.0
        lease.ends_s = self._clock() + lease.lease_s
        if fresh:  # else its entry in the heap is looked at again when it comes up
            heapq.heappush(self._ends, (lease.ends_s, *actor))
        return True

    def touch_all(self) -> None:
        """Everybody's lease counts anew: nobody could be heard for a while."""
        for lease in self._leases.values():
            self.touch(lease.member.actor)

    def remove(self, actor: Actor) -> Member | None:
        """Over. None: it was over already."""
        if not self.alive(actor):
            return None
        return self._leases.pop(actor.name).member

    def alive(self, actor: Actor) -> bool:
        """Whether this is the present life of its name."""
        lease = self._leases.get(actor.name)
        return lease is not None and lease.member.incarnation == actor.incarnation

    def lease_s(self, actor: Actor) -> float:
        """What was granted; 0 for nobody."""
        return self._leases[actor.name].lease_s if self.alive(actor) else 0.0

    def shortest_s(self) -> float:
        """The shortest lease; 0 when nobody is there."""
        return min((lease.lease_s for lease in self._leases.values()), default=0.0)

    def find(self, name: str) -> Member | None:
        """The present life of this name."""
        lease = self._leases.get(name)
        return None if lease is None else lease.member

    def members(self) -> tuple[Member, ...]:
        """Everybody alive."""
        return tuple(lease.member for lease in self._leases.values())

    def next_end_s(self) -> float | None:
        """Seconds until the next lease ends, if nothing is heard; at least 0. None: nobody is there."""
        while self._ends:
            at_s, name, incarnation = self._ends[0]
            lease = self._leases.get(name)
            if lease is None or lease.member.incarnation != incarnation:
                heapq.heappop(self._ends)
            elif lease.ends_s > at_s:
                heapq.heapreplace(self._ends, (lease.ends_s, name, incarnation))
            else:
                return max(0.0, at_s - self._clock())
        return None

    def lapsed(self) -> list[Actor]:
        """Whose lease is over. They stay until they are removed."""
        now_s = self._clock()
        return [lease.member.actor for lease in self._leases.values() if lease.ends_s <= now_s]


def _invalid(member: Member, lease_s: float) -> str | None:
    if not member.name or not member.incarnation:
        return "a member needs a name and an incarnation"
    for field in ("name", "incarnation", "address", "dtype", "layout"):
        if len(getattr(member, field)) > TEXT_MAX:
            return f"{field} has {len(getattr(member, field))} characters, at most {TEXT_MAX} are expected"
    if member.role not in ROLES:
        return f"role is {member.role!r}, expected one of {', '.join(ROLES)}"
    if len(member.model_identity) not in (0, 16):
        return f"model_identity has {len(member.model_identity)} bytes, expected 16 (or none: it holds no KV)"
    if not 0.05 <= lease_s <= 3600:
        return f"lease_s is {lease_s}, expected 0.05 to 3600 seconds"
    return None


def _show(value: object) -> str:
    return value.hex() if isinstance(value, bytes) else repr(value)
