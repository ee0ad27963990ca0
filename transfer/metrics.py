"""Counters of transfers, and their Prometheus lines (`tokenrelay_transfer_*`). One set per process, all transports.

A pull ends as `ok`, `expired` (its deadline passed), `cancelled`, or `failed_<reason>` (TransferFailed.reason: the
transport or the peer broke): an expiry says that time was short, a failure that something is.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Iterator, Mapping

from tokenrelay.base.errors import DeadlineExceeded, TokenRelayError, TransferFailed


class Metrics:
    """Plain numbers; may be read from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in _HELP}

    def count(self, name: str, labels: str, amount: float = 1) -> None:
        """Add to a counter of `_HELP`; `labels` as Prometheus writes them."""
        with self._lock:
            self._counts[name][labels] += amount  # type: ignore[assignment]

    @contextlib.contextmanager
    def outcome(self, kind: str) -> Iterator[None]:
        """Count how the pull inside ended."""
        outcome = "error"
        try:
            yield
            outcome = "ok"
        except DeadlineExceeded:
            outcome = "expired"
            raise
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except TransferFailed as error:
            outcome = f"failed_{error.reason}"
            raise
        except TokenRelayError as error:
            outcome = error.code
            raise
        finally:
            self.count("transfer_pulls_total", f'transport="{kind}",outcome="{outcome}"')

    def moved(self, kind: str, moved_bytes: int, runs: int, blocks: int, seconds: float) -> None:
        """A pull that came."""
        label = f'transport="{kind}"'
        for name, amount in (("bytes", moved_bytes), ("runs", runs), ("extents", blocks), ("seconds", seconds)):
            self.count(f"transfer_{name}_total", label, amount)

    def stale(self, kind: str) -> None:
        """A read that was not adopted."""
        self.count("transfer_stale_total", f'transport="{kind}"')

    def fenced(self, kind: str, proof: str) -> None:
        """A fence that holds."""
        self.count("transfer_fences_total", f'transport="{kind}",proof="{proof}"')

    def refused(self, kind: str, reason: str) -> None:
        """A peer that was not let in, or a message that no peer of ours sends."""
        self.count("transfer_refused_total", f'transport="{kind}",reason="{reason}"')

    def samples(self) -> list[tuple[str, str, str, Mapping[str, float]]]:
        """(name without its prefix, kind, help, labels -> value), as services/chassis/metrics.py takes them."""
        with self._lock:
            return [(name, "counter", _HELP[name], dict(counts)) for name, counts in self._counts.items() if counts]

    def value(self, name: str, labels: str) -> float:
        """One counter; 0 when nothing was counted."""
        with self._lock:
            return self._counts[name][labels]


_HELP = {
    "transfer_pulls_total": "pulls by how they ended; expired is time, failed_* is the transport or the peer",
    "transfer_bytes_total": "bytes of KV pulled",
    "transfer_runs_total": "descriptors pulled, after coalescing",
    "transfer_extents_total": "extents (a block of a layer) pulled",
    "transfer_seconds_total": "time that successful pulls took",
    "transfer_stale_total": "reads whose generation had changed, thrown away",
    "transfer_fences_total": "peers cut off, by how that is known",
    "transfer_refused_total": "peers and messages refused, by reason",
}
