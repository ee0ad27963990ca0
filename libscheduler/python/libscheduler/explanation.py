"""What `Scheduler.explanation` answers."""

from __future__ import annotations

from typing import TypedDict


class Explanation(TypedDict):
    """What a person is told about a sequence; explain.hpp says what each number counts. Tokens, unless named so."""

    sequence_id: int
    text: str  # all of it in one line
    state: str
    why: str  # name of a Why
    why_words: str
    prompt_tokens: int
    output_tokens: int
    output_tokens_max: int
    expected_tokens: int  # of output, by its request; 0: it does not say
    cached_tokens: int  # at its first admission; -1: it was not admitted yet
    reused_tokens: int  # at its last admission
    computed_tokens: int
    priority: int
    submitted_us: int
    ahead: int  # that wait too and rank before it
    slots_free: int
    slots: int
    blocks_wanted: int
    blocks_available: int
    blocks_reserved: int
    overtaken: int
    overtaken_max: int
    tenant_ahead: float
    tps_in_force: float
    tps_floor: int  # of its own; 0: everybody's
    users: int
    held_block: int  # -1: none
    held_by: int  # the sequence that computes it
    holds: int
    holds_max: int
    slot: int  # -1: none
    steps_in_flight: int
    chunk_tokens: int
    drafted: int  # of its drafts, that steps computed
    accepted: int  # of those, that came true
    preempted: int
    preempted_why: str
    preempted_for: int
