"""Sequences, the block pool, the prefix index and the KV-ownership states, in C++. See docs/scheduler.md."""

from tokenrelay.libscheduler._native import (
    AbortAnswer,
    Config,
    Counts,
    EventFacts,
    Finish,
    Outcome,
    Plan,
    RejectReason,
    Row,
    Scheduler,
    StateFacts,
    Table,
    block_hashes,
    fsm_tables,
)

__all__ = [
    "AbortAnswer",
    "Config",
    "Counts",
    "EventFacts",
    "Finish",
    "Outcome",
    "Plan",
    "RejectReason",
    "Row",
    "Scheduler",
    "StateFacts",
    "Table",
    "block_hashes",
    "fsm_tables",
]
