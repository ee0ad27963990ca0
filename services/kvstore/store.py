"""What one kvstore process knows: ledger, directory, tier, and who may decide. The servicer and the metrics read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from tokenrelay.ledger.api import Code, HandleView, Joined, Member, Rejection
from tokenrelay.ledger.directory_host import DirectoryHost
from tokenrelay.ledger.host import LedgerHost
from tokenrelay.ledger.tier import BlockTier


async def _at_once() -> bool:
    return True


def _unknown() -> str:
    return ""


@dataclass
class Store:
    """One kvstore's state. `active` says whether sessions are taken at all."""

    host: LedgerHost
    directory: DirectoryHost
    incarnation: str
    tier: BlockTier | None = None
    backend: str = "embedded"
    active: bool = True
    active_address: Callable[[], str] = _unknown  # of the active one, as far as is known
    malformed: Counter[str] = field(default_factory=Counter)  # messages refused, by what was wrong
    durable: Callable[[], Awaitable[bool]] = _at_once  # until all that was decided so far is written down
    remembers: bool = False  # lives that are not in the ledger are over (a backend keeps them over restarts)
    attach: Callable[[Member, float, list[HandleView]], Joined | Rejection] | None = None  # while recovering

    def __post_init__(self) -> None:
        self.host.on_member = self.member_changed

    def member_changed(self, member: Member, lease_s: float) -> None:
        """A life began, or ended (lease 0)."""
        if lease_s == 0.0:
            self.directory.remove(member.name)

    def reattach(
        self, member: Member, lease_s: float, handles: list[HandleView], hash_key: bytes = b""
    ) -> Joined | Rejection:
        """A life goes on after a broken connection, or under a new kvstore. `hash_key`: what it hashes blocks with."""
        if self.attach is not None:
            return self.attach(member, lease_s, handles)
        if self.host.roster.alive(member.actor):
            rejection = self.host.keepalive(member.actor)
            if rejection is not None:
                return rejection
            return Joined(self.host.term, self.host.roster.lease_s(member.actor), self.host.hash_key)
        if self.remembers or self.host.over(member.actor):
            return Rejection(Code.STALE_INCARNATION, "this life of the member is over")
        # This kvstore was restarted and remembers nothing.
        return self._other_key(member, hash_key) or self.host.join(member, lease_s)

    def _other_key(self, member: Member, hash_key: bytes) -> Rejection | None:
        """The fleet goes on with the key it has, unless somebody who holds KV was given the new one already."""
        if len(hash_key) != len(self.host.hash_key) or hash_key == self.host.hash_key:
            return None
        others = self.host.roster.members()
        holder = next((other for other in others if other.model_identity), None)
        if holder is not None:
            reason = f"{member.name} and {holder.name} do not pair: hash_key: they were given different ones"
            return Rejection(Code.INCOMPATIBLE, reason)
        self.host.hash_key = hash_key
        self.host.end([other.actor for other in others], "the fleet hashes with another key than it was given")
        return None

    def raise_term(self, term_seen: int) -> None:
        """A kvstore without a backend forgets its term: what clients have seen is below it all the same."""
        if not self.remembers and term_seen >= self.host.term:
            self.host.set_term(term_seen + 1)
