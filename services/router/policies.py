"""Which worker a sequence goes to, and why: the policies of `router.policy`.

    pick = choose("cache-aware", workers, Wish(preferred=client, key=b"…"), memory)
    pick.worker                # the one
    str(pick)                  # "cache-aware: unix:/run/w1.sock has 4,096 of the prompt's tokens and 3 open sequences"

All of them choose among workers that take sequences now. `cache-aware` is for agents, whose turns begin as the last one
did; the others know nothing of caches, but for `consistent-hash`, which sends what begins alike (or one session) to one
worker without looking anything up. It is rendezvous hashing (Thaler and Ravishankar, 1998): a worker that comes or goes
moves its own share and no other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, Literal, Protocol, TypeVar

Policy = Literal["cache-aware", "power-of-two", "least-load", "round-robin", "consistent-hash"]

# A worker that has the prompt's beginning may have so many times the open sequences of the least busy one, and so many
# more: a prompt that is computed again costs more than a place in a batch.
AFFINITY_FACTOR: Final = 2
AFFINITY_SLACK: Final = 4
HASH_BYTES: Final = 1024  # of a prompt's beginning (256 tokens): system prompts differ there


class Worker(Protocol):
    """As far as a policy looks at it."""

    target: str

    @property
    def open_count(self) -> int:
        """How many sequences it has open."""


WorkerT = TypeVar("WorkerT", bound=Worker)


@dataclass(frozen=True, slots=True)
class Wish(Generic[WorkerT]):
    """What is known of a request: who has its beginning in its cache and why one thinks so, and what names its kind."""

    preferred: WorkerT | None = None
    because: str = ""
    key: bytes = b""  # for consistent-hash: the session, or the prompt's beginning


@dataclass(frozen=True, slots=True)
class Pick(Generic[WorkerT]):
    """The worker, and what it was chosen by: put into words only when somebody asks."""

    worker: WorkerT
    policy: str
    reason: str
    others: int  # workers it was chosen among
    open_count: int
    least: int  # open sequences of the least busy one

    def __str__(self) -> str:
        return (
            f"{self.policy}: {self.worker.target} of {self.others}: {self.reason}; "
            f"it had {self.open_count} open sequences, the least busy one {self.least}"
        )


class Chooser(Generic[WorkerT]):
    """One router's policy, with what it remembers: whose turn it is. Event loop only."""

    def __init__(self, policy: Policy, seed: int | None = None) -> None:
        self.policy = policy
        self._random = random.Random(seed)
        self._choices = 0
        self._chosen: dict[str, int] = {}  # target -> when it was chosen last, in choices

    def forget(self, target: str) -> None:
        """A worker is gone."""
        self._chosen.pop(target, None)

    def choose(self, workers: Sequence[WorkerT], wish: Wish[WorkerT]) -> Pick[WorkerT]:
        """One of these; there is one at least."""
        if len(workers) == 1:
            only = workers[0]
            return Pick(only, self.policy, "the only one", 1, only.open_count, only.open_count)
        match self.policy:
            case "cache-aware":
                return self._cache_aware(workers, wish)
            case "power-of-two":
                pair = self._random.sample(workers, 2)
                return self._pick(min(pair, key=_load), "the less busy of two that were drawn", workers)
            case "least-load":
                return self._pick(min(workers, key=self._turn), "the least busy", workers)
            case "round-robin":
                return self._pick(min(workers, key=self._last), "its turn", workers)
            case "consistent-hash":
                chosen = max(workers, key=lambda worker: _score(wish.key, worker.target))
                return self._pick(chosen, "the hash of the session or of the prompt's beginning", workers)

    def _cache_aware(self, workers: Sequence[WorkerT], wish: Wish[WorkerT]) -> Pick[WorkerT]:
        least = min(workers, key=self._turn)
        preferred = wish.preferred
        if preferred is None or preferred not in workers:
            return self._pick(least, "nobody usable is known to have its beginning; the least busy", workers)
        if preferred.open_count > AFFINITY_FACTOR * least.open_count + AFFINITY_SLACK:
            return self._pick(least, f"{preferred.target} {wish.because}, but is far busier", workers)
        return self._pick(preferred, f"it {wish.because}", workers)

    def _pick(self, worker: WorkerT, reason: str, workers: Sequence[WorkerT]) -> Pick[WorkerT]:
        self._choices += 1
        self._chosen[worker.target] = self._choices
        least = min(worker.open_count for worker in workers)
        return Pick(worker, self.policy, reason, len(workers), worker.open_count, least)

    def _last(self, worker: WorkerT) -> int:
        return self._chosen.get(worker.target, 0)

    def _turn(self, worker: WorkerT) -> tuple[int, int]:
        """Among equals, the one that was not chosen for the longest time."""
        return worker.open_count, self._last(worker)


def _load(worker: Worker) -> int:
    return worker.open_count


def _score(key: bytes, target: str) -> bytes:
    return hashlib.blake2b(target.encode(), digest_size=8, key=key[:64]).digest()
