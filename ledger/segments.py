"""Which blocks to keep: a segmented LRU, bounded in bytes.

A new key is on probation; one that was asked for again is protected, up to a share of the bytes. The least useful, the
oldest on probation, goes first: one pass over long unique prompts does not sweep out system prompts that many share
(Karedla, Love, Wherry: Caching strategies to improve disk system performance, 1994).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
PROTECTED_SHARE = 0.8


class Segments(Generic[Key]):
    """Keys and their sizes. O(1) per call, evictions aside."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._protected_bytes = 0
        self._probation: OrderedDict[Key, int] = OrderedDict()  # oldest first
        self._protected: OrderedDict[Key, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, key: Key) -> bool:
        return key in self._probation or key in self._protected

    def touch(self, key: Key) -> bool:
        """It was asked for. False: it is not here."""
        size = self._probation.pop(key, None)
        if size is None:
            if key not in self._protected:
                return False
            self._protected.move_to_end(key)
            return True
        self._protected[key] = size
        self._protected_bytes += size
        while self._protected_bytes > self.bytes_max * PROTECTED_SHARE and len(self._protected) > 1:
            demoted, demoted_size = self._protected.popitem(last=False)
            self._protected_bytes -= demoted_size
            self._probation[demoted] = demoted_size
        return True

    def add(self, key: Key, size: int) -> list[Key]:
        """Keep it; the keys that must go for it. Only for a size of at most `bytes_max`."""
        assert size <= self.bytes_max
        if key in self:
            self.remove(key)
        evicted = []
        while self.bytes + size > self.bytes_max:
            evicted.append(self._least_useful())
            self.remove(evicted[-1])
        self._probation[key] = size
        self.bytes += size
        return evicted

    def remove(self, key: Key) -> bool:
        """Forget it. False: it is not here."""
        size = self._probation.pop(key, None)
        if size is None:
            size = self._protected.pop(key, None)
            if size is None:
                return False
            self._protected_bytes -= size
        self.bytes -= size
        return True

    def _least_useful(self) -> Key:
        return next(iter(self._probation or self._protected))

    def keys(self) -> Iterator[Key]:
        """Least useful first."""
        yield from self._probation
        yield from self._protected
