"""What the engine tells of itself: the scheduler's counters and its own, as one value.

stats = count(scheduler, books, steps=…, step_time_us=…, tps_floor=…, block_bytes=…)
"""

from __future__ import annotations

from tokenrelay.libscheduler import FloorCounts, HostCounts, Scheduler
from tokenrelay.runtime.integrity import Books
from tokenrelay.runtime.requests import DraftStats, EngineStats, FloorStats, HostStats


def count(
    scheduler: Scheduler,
    books: Books,
    *,
    steps: int,
    step_time_us: int,
    tps_floor: float,
    block_bytes: int,
    proposer: str = "",
) -> EngineStats:
    """A snapshot. `tps_floor`: the configured one. `block_bytes`: of a block of the host tier, 0 without one.

    `proposer`: where drafts come from; empty: nobody drafts.
    """
    counts = scheduler.counts()
    return EngineStats(
        blocks_free=counts.blocks_free,
        blocks_cached=counts.blocks_cached,
        blocks_active=counts.blocks_active,
        blocks_writable=counts.blocks_writable,
        blocks_in_flight=counts.blocks_in_flight,
        blocks_quarantined=counts.blocks_quarantined,
        blocks_sealed=counts.blocks_sealed,
        sequences_waiting=counts.sequences_waiting,
        sequences_running=counts.sequences_running,
        steps=steps,
        prompt_tokens=counts.prompt_tokens,
        cached_tokens=counts.cached_tokens,
        output_tokens=counts.output_tokens,
        preemptions=counts.preemptions,
        aborts=counts.aborts,
        step_time_us=step_time_us,
        integrity_checks=books.checks,
        integrity_failures=books.failures,
        integrity_check_us=books.check_us,
        floor=_floor(counts.floor, tps_floor),
        host=_host(counts.host, block_bytes),
        drafts=DraftStats(counts.drafts.drafts, counts.drafts.tokens, counts.drafts.accepted, proposer),
    )


_NO_HOST = HostStats()


def _floor(counts: FloorCounts, configured: float) -> FloorStats:
    return FloorStats(
        configured=configured,
        in_force=counts.tps_in_force,
        batch_1=counts.tps_batch_1,
        users_below=counts.users_below,
        tokens=counts.tokens,
        tokens_late=counts.tokens_late,
        overrides=counts.overrides,
    )


def _host(counts: HostCounts, block_bytes: int) -> HostStats:
    if not counts.blocks and not block_bytes:
        return _NO_HOST
    return HostStats(
        block_bytes=block_bytes,
        blocks=counts.blocks,
        blocks_used=counts.blocks_used,
        copies_late=counts.copies_late,
        blocks_stored=counts.blocks_stored,
        blocks_loaded=counts.blocks_loaded,
        loads=counts.loads,
        tokens_loaded=counts.tokens_loaded,
        copies_failed=counts.copies_failed,
        copies_expired=counts.copies_expired,
    )
