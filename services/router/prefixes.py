"""Which worker has how much of a prompt in its cache: this router's copy of the fleet's prefix directory.

    prefixes.cached_tokens(prompt.packed, salt)      # {"unix:/run/decode-0.sock": 4096}; targets, tokens
    prefixes.nearest(prompt.packed, salt, usable)    # the one of these workers with the most of it

A look-up is a hash and a few dictionary look-ups in this process: no call, no wait. Prompts are hashed by libscheduler,
as the workers' schedulers do it, with the fleet's key and the tenant's salt in the root, so that tenants with different
salts never see each other's prefixes. What is said here is a hint: the worker knows.

The copy follows the kvstore's stream. It is told everything when a stream begins, so a router that restarts knows the
same as before, and while no kvstore answers the last copy stays in use.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Protocol, TypeVar

import numpy as np

from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.api import Directory, Member
from tokenrelay.ledger.directory import PrefixDirectory
from tokenrelay.ledger.directory_host import follow_into
from tokenrelay.libscheduler import block_hashes

log = get_logger("router")

LOOKUP_TOKENS_MAX = 1 << 17  # of a longer prompt only the beginning is looked up: the event loop goes on within a ms
AGAIN_S = 1.0


class Target(Protocol):
    """A worker, as far as this file is concerned."""

    target: str

    @property
    def open_count(self) -> int:
        """How many sequences it has open."""


WorkerT = TypeVar("WorkerT", bound=Target)


class Prefixes:
    """Empty, and asked for nothing, where there is no kvstore. Event loop only."""

    def __init__(self) -> None:
        self.directory = PrefixDirectory()
        self.lookups = 0  # that found a worker, ever
        self.hash_key = b""
        self._members: dict[str, Member] = {}  # workers that live, by name

    def join(self, hash_key: bytes) -> None:
        """The fleet's key of block hashes: 16 bytes."""
        self.hash_key = hash_key

    def learn(self, member: Member) -> None:
        """A worker lives."""
        self._members[member.name] = member

    def forget(self, name: str) -> None:
        """It does not any more: what it had is gone with it. Its next life may have told of itself already."""
        member = self._members.pop(name, None)
        if member is not None and self.directory.life(name) == member.incarnation:
            self.directory.remove(name)

    async def follow(self, source: Directory) -> None:
        """Keep the copy the same as the fleet's, until cancelled."""
        while True:
            await follow_into(self.directory, source)
            log.warning("the directory's stream ended; the copy stays as it is")
            await asyncio.sleep(AGAIN_S)

    def cached_tokens(self, packed: bytes, salt: bytes = b"") -> dict[str, int]:
        """How many tokens of a prompt each worker has, by target; workers that have none are not named.

        `packed`: token ids, little-endian uint32.
        """
        member = next(iter(self._members.values()), None)  # one model in a fleet: they are all alike
        if member is None or not len(self.directory) or not self.hash_key or member.block_tokens <= 0:
            return {}
        block_tokens = member.block_tokens
        token_ids = np.frombuffer(packed, dtype="<u4", count=min(len(packed) // 4, LOOKUP_TOKENS_MAX))
        found: dict[str, int] = {}
        for tokens in (block_tokens, token_ids.size):  # most prompts that nobody has are told by their first block
            hashes = block_hashes(
                token_ids[:tokens],
                block_tokens=block_tokens,
                hash_key=self.hash_key,
                model_identity=member.model_identity,
                salt=salt,
            )
            found = self.directory.match(hashes)
            if not found:
                return {}
        held: dict[str, int] = {}
        for name, blocks in found.items():
            holder = self._members.get(name)
            if holder is not None and self.directory.life(name) == holder.incarnation:  # law 6
                held[holder.address] = blocks * block_tokens
        return held

    def nearest(self, packed: bytes, salt: bytes, workers: Iterable[WorkerT]) -> WorkerT | None:
        """The one of these that has the most of the prompt, of equals the least busy one; None: none has any of it."""
        held = self.cached_tokens(packed, salt)
        holders = [worker for worker in workers if worker.target in held]
        if not holders:
            return None
        self.lookups += 1
        return max(holders, key=lambda worker: (held[worker.target], -worker.open_count))
