"""The transition tables as Promela macros, for the model that SPIN explores (libscheduler/model/handover.pml).

    text = preamble()           # to be put before the model
    #define H_Offered 2
    #define NEXT_Claim(s) ((s) == H_Offered -> H_Claimed : NOWHERE)

`NEXT_<Event>(state)` is where the constexpr table of a handle leads, `BNEXT_<Event>(state)` where that of a block does;
NOWHERE is a rejection. A mutation takes one guard away: from a table here, or from a process in the model; each must
make SPIN find a counter-example. It is chosen when the model is run (MODEL_MUTATION), so that one program serves all.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenrelay.libscheduler._native import Table, fsm_tables


@dataclass(frozen=True)
class Change:
    """One answer of a table replaced: `event` in `state` leads to `next` (None: it is rejected)."""

    machine: str
    state: str
    event: str
    next: str | None


@dataclass(frozen=True)
class Mutation:
    """A guard that is taken away, and the law that breaks without it."""

    name: str  # as the model says MUTATED(NAME)
    law: int  # the one that breaks
    without: str  # what is missing, for a person
    changes: tuple[Change, ...] = ()  # to the tables; none: the model itself has it
    decodes: int = 1  # how many it takes to show
    requests: int = 2
    faults: int = 1


def _handle(state: str, event: str, after: str | None) -> Change:
    return Change("kv_handle", state, event, after)


MUTATIONS = (
    Mutation(
        "NO_QUARANTINE",
        2,
        "the quarantine: an expired claim is reclaimed",
        tuple(_handle(state, "Expire", "Reclaimed") for state in ("Claimed", "Transferring")),
    ),
    Mutation(
        "RECLAIM_UNDER_A_READER",
        2,
        "the refusal to reclaim while a peer may read",
        tuple(_handle(state, "Reclaim", "Reclaimed") for state in ("Claimed", "Transferring")),
    ),
    Mutation(
        "RECLAIM_FROM_QUARANTINE",
        2,
        "the wait for an answer or a fence",
        (_handle("Quarantined", "Reclaim", "Reclaimed"),),
    ),
    Mutation(
        "NOBODY_FENCES", 5, "the fence: a quarantine has no end but an answer", (_handle("Quarantined", "Fence", None),)
    ),
    Mutation(
        "NOBODY_EXPIRES",
        5,
        "the deadline of a claim, and the owner's quarantine",
        tuple(
            _handle(state, event, None)
            for state in ("Claimed", "Transferring")
            for event in ("Expire", "Quarantine", "Fence")
        ),
    ),
    Mutation(
        "NO_LANDING_QUARANTINE",
        2,
        "the quarantine of a block that a transfer writes",
        (Change("block", "InFlight", "Abandon", "Free"),),
    ),
    Mutation("FENCE_WITHOUT_CUTTING", 2, "the cutting off before the fence"),
    Mutation("ANSWER_WHILE_READING", 2, "the wait for its own transfer before the claimant answers"),
    Mutation("NO_VALIDATION", 4, "the validation after the read"),
    Mutation("VALIDATE_WITHOUT_LIFE", 4, "the owner's incarnation in the validation"),
    Mutation("READ_UNSEALED", 4, "the wait for the seal"),
    Mutation("ADOPT_UNSEALED", 4, "the ledger's check that all extents are sealed"),
    Mutation("FREE_WHEN_LOST", 2, "the new life of an owner that was declared dead"),
    Mutation("NO_CUT_WHEN_FORGOTTEN", 2, "the cutting off when the kvstore has forgotten a handle"),
    Mutation("NO_GENERATION_CHECK", 2, "the generation in the handle's name", requests=3),
    Mutation("NO_TERM_CHECK", 2, "the term in the handle's name", requests=3),
    Mutation("NO_CLAIMANT_CHECK", 2, "the check that it is the claimant who answers", decodes=2),
    Mutation("NO_INTERVIEWS", 2, "the interviews of a new reign: what was written down is taken for the truth"),
    Mutation("FORGET_ADOPTIONS", 5, "what a decode says of its adoptions to a new reign", decodes=2),
    Mutation("NO_CUT_OF_THE_DEAD", 2, "the cutting off of a life that was declared over", faults=2),
    Mutation("OLD_KVSTORE_ANSWERS", 2, "the end of a reign on its own clock: a deposed kvstore still answers"),
)


def number(mutation: Mutation) -> int:
    """Its number in the model; 0 is the protocol as it is."""
    return MUTATIONS.index(mutation) + 1


def _next_macros(table: Table, prefix: str, macro: str) -> list[str]:
    changes: dict[str, list[tuple[int, Change]]] = {}
    for mutation in MUTATIONS:
        for change in mutation.changes:
            if change.machine == table.name:
                assert change.state in table.states and change.event in table.events, change
                changes.setdefault(change.event, []).append((number(mutation), change))
    lines = []
    for event in table.events:
        answer = "NOWHERE"
        for row in reversed(table.rows):
            if row.event == event and row.next is not None:
                answer = f"((s) == {prefix}_{row.state} -> {prefix}_{row.next} : {answer})"
        for mutant, change in changes.get(event, []):
            after = "NOWHERE" if change.next is None else f"{prefix}_{change.next}"
            answer = f"(mutation == {mutant} && (s) == {prefix}_{change.state} -> {after} : {answer})"
        lines.append(f"#define {macro}_{event}(s) {answer}")
    return lines


def preamble() -> str:
    """States, transitions and mutations as macros."""
    tables = fsm_tables()
    handle, block = tables["kv_handle"], tables["block"]
    lines = ["/* Generated from libscheduler's constexpr tables by tokenrelay/libscheduler/promela.py. */"]
    lines += [f"#define {mutation.name} {number(mutation)}" for mutation in MUTATIONS]
    for table, prefix, macro in ((handle, "H", "NEXT"), (block, "B", "BNEXT")):
        lines += [f"#define {prefix}_{state} {index}" for index, state in enumerate(table.states)]
        lines += _next_macros(table, prefix, macro)
    left = {row.state for row in handle.rows if row.next not in (None, row.state)}
    ends = " || ".join(f"(s) == H_{state}" for state in handle.states if state not in left)
    lines.append(f"#define H_ENDS(s) ({ends})")
    touched = " || ".join(f"(s) == H_{name}" for name, facts in handle.state_facts.items() if facts.peer_may_touch)
    lines.append(f"#define H_TOUCHED(s) ({touched})")
    return "\n".join(lines) + "\n"
