"""The state machines for people: Mermaid diagrams and markdown tables, from the constexpr tables the compiler checked.

tables = fsm_tables()
print(mermaid(tables["request"]))
print(markdown(tables["request"]))
"""

from __future__ import annotations

from tokenrelay.libscheduler._native import Table


def mermaid(table: Table) -> str:
    """A Mermaid `stateDiagram-v2` of the transitions; events that lead the same way share an arrow."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in table.rows:
        if row.next is not None:
            arrows.setdefault((row.state, row.next), []).append(row.event)
    lines = ["stateDiagram-v2", f"    [*] --> {table.initial}"]
    lines += [f"    {state} --> {next_state}: {', '.join(events)}" for (state, next_state), events in arrows.items()]
    left = {state for state, _ in arrows}
    lines += [f"    {state} --> [*]" for state in table.states if state not in left]
    return "\n".join(lines) + "\n"


def markdown(table: Table) -> str:
    """Every (state, event) pair: where it leads, or in words why it is rejected."""
    lines = ["| in state | event | leads to, or is rejected because |", "|---|---|---|"]
    for row in table.rows:
        answer = f"**{row.next}**" if row.next is not None else row.reason
        lines.append(f"| {row.state} | {row.event} | {answer} |")
    return "\n".join(lines) + "\n"
