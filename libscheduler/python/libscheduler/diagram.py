"""The state machines for people: Mermaid diagrams and markdown tables, from the constexpr tables the compiler checked.

    tables = fsm_tables()
    print(mermaid(tables["request"]))
    print(markdown(tables["request"]))

`python -m tokenrelay.libscheduler.diagram FILE…` rewrites the generated parts of pages, between
`<!-- generated: diagram|table|states|events|mutations NAME -->` and `<!-- generated: end -->`; with `--check` it names
stale ones. `tokenrelay fsm show` prints `document`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenrelay.libscheduler._native import Table, fsm_tables
from tokenrelay.libscheduler.promela import MUTATIONS


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


def document(table: Table) -> str:
    """The diagram as a file of its own: titled, and what is rejected as comments with the reasons."""
    refusals = [
        f"    %% rejected: {row.event} in {row.state}: {row.reason}\n" for row in table.rows if row.next is None
    ]
    return f"---\ntitle: {table.name}\n---\n{mermaid(table)}{''.join(refusals)}"


def markdown(table: Table) -> str:
    """Every (state, event) pair: where it leads, or in words why it is rejected."""
    lines = ["| in state | event | leads to, or is rejected because |", "|---|---|---|"]
    for row in table.rows:
        answer = f"**{row.next}**" if row.next is not None else row.reason
        lines.append(f"| {row.state} | {row.event} | {answer} |")
    return "\n".join(lines) + "\n"


def states(table: Table) -> str:
    """Each state that holds something: whether a peer may touch it, its deadline, what is due then, and by whom."""
    lines = [
        "| state | a peer may touch the blocks | deadline for | then due | who sees to it |",
        "|---|---|---|---|---|",
    ]
    for name in table.states:
        facts = table.state_facts[name]
        if facts.duty is not None:
            touch = "**yes**" if facts.peer_may_touch else "no"
            lines.append(f"| {name} | {touch} | {facts.deadline} | {facts.duty} | {facts.actor} |")
    return "\n".join(lines) + "\n"


def events(table: Table) -> str:
    """Whose each event is, what else must hold, what it says about the peer's access, and where it is accepted."""
    lines = [
        "| event | whose | what must hold | nobody reads after it, because | accepted in |",
        "|---|---|---|---|---|",
    ]
    for name in table.events:
        facts = table.event_facts[name]
        accepted = ", ".join(row.state for row in table.rows if row.event == name and row.next is not None)
        whose = facts.party if facts.crosses else f"{facts.party}, in its process"
        guard, proof = (word.replace("_", " ") if word != "none" else "" for word in (facts.guard, facts.proof))
        lines.append(f"| {name} | {whose} | {guard} | {proof} | {accepted} |")
    return "\n".join(lines) + "\n"


def mutations(table: Table) -> str:
    """The guards that the model is searched without, and the law that then breaks (promela.py)."""
    lines = ["| guard that is taken away | law | search with `tools/model_check.py` |", "|---|---|---|"]
    for mutation in MUTATIONS:
        lines.append(f"| {mutation.without} | {mutation.law} | `{mutation.name}` |")
    return "\n".join(lines) + "\n"


def _diagram(table: Table) -> str:
    return f"```mermaid\n{mermaid(table)}```\n"


_PARTS: dict[str, Callable[[Table], str]] = {
    "diagram": _diagram,
    "table": markdown,
    "states": states,
    "events": events,
    "mutations": mutations,
}


def fill(page: str) -> str:
    """The page with its generated parts written anew. KeyError: it names a machine that does not exist."""
    tables = fsm_tables()

    def part(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        return f"<!-- generated: {kind} {name} -->\n{_PARTS[kind](tables[name])}<!-- generated: end -->"

    pattern = rf"<!-- generated: (?P<kind>{'|'.join(_PARTS)}) (?P<name>\w+) -->\n.*?<!-- generated: end -->"
    return re.sub(pattern, part, page, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages named on the command line; with --check compare them, and 1 when one is stale."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    stale = []
    for path in [Path(word) for word in words if word != "--check"]:
        page = path.read_text(encoding="utf-8")
        if (filled := fill(page)) == page:
            continue
        stale.append(str(path))
        if "--check" not in words:
            path.write_text(filled, encoding="utf-8")
    if stale and "--check" in words:
        print(f"stale: python -m tokenrelay.libscheduler.diagram {' '.join(stale)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
