"""The tables that the compiler checked are complete here too, and docs/scheduler.md shows what they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrelay.libscheduler import fsm_tables
from tokenrelay.libscheduler.diagram import fill, main, markdown, mermaid

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize("name", ["block", "copy", "host_slot", "kv_handle", "request"])
def test_every_pair_has_one_row_with_an_answer(name: str) -> None:
    table = fsm_tables()[name]
    assert table.name == name and table.initial in table.states
    pairs = [(row.state, row.event) for row in table.rows]
    assert sorted(pairs) == sorted((state, event) for state in table.states for event in table.events)
    for row in table.rows:
        assert (row.next in table.states) != bool(row.reason)


def test_every_state_is_reached_and_every_sequence_can_end() -> None:
    for name, table in fsm_tables().items():
        reached = {table.initial}
        for _ in table.states:
            reached |= {row.next for row in table.rows if row.next is not None and row.state in reached}
        assert reached == set(table.states), name
    edges = [(row.state, row.next) for row in fsm_tables()["request"].rows if row.next is not None]
    ends = {"Ended"}
    for _ in range(len(edges)):
        ends |= {state for state, after in edges if after in ends}
    assert ends == set(fsm_tables()["request"].states)


@pytest.mark.parametrize(("name", "parts"), [("scheduler.md", 8), ("kv-ownership.md", 4), ("model-checking.md", 1)])
def test_the_pages_show_the_tables_as_they_are(name: str, parts: int) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page.count("<!-- generated: end -->") == parts
    assert fill(page) == page, f"stale: python -m tokenrelay.libscheduler.diagram docs/{name}"


def test_a_stale_page_is_named_and_written_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- generated: diagram block -->\nold\n<!-- generated: end -->\nafter\n")
    assert main(["--check", str(page)]) == 1
    assert f"stale: python -m tokenrelay.libscheduler.diagram {page}" in capsys.readouterr().err
    assert "old" in page.read_text(), "a check changes nothing"
    assert main([str(page)]) == 0 and main(["--check", str(page)]) == 0
    assert page.read_text().startswith("before\n") and page.read_text().endswith("<!-- generated: end -->\nafter\n")


def test_handles_have_facts_and_the_other_machines_have_none() -> None:
    tables = fsm_tables()
    handle = tables["kv_handle"]
    assert set(handle.state_facts) == set(handle.states) and set(handle.event_facts) == set(handle.events)
    assert not any(tables[name].state_facts or tables[name].event_facts for name in ("block", "copy", "request"))
    claimed, expire = handle.state_facts["Claimed"], handle.event_facts["Expire"]
    assert claimed.peer_may_touch and (claimed.deadline, claimed.duty, claimed.actor) == ("start", "Expire", "ledger")
    assert (expire.party, expire.guard, expire.proof, expire.crosses) == ("ledger", "overdue", "none", True)
    assert handle.state_facts["Released"].duty is None and not handle.event_facts["Fill"].crosses


def test_a_diagram_has_every_transition() -> None:
    table = fsm_tables()["request"]
    diagram = mermaid(table)
    assert diagram.startswith("stateDiagram-v2\n    [*] --> Waiting\n")
    assert "    Preempting --> Waiting: Settle\n" in diagram
    assert diagram.endswith("    Ended --> [*]\n")
    arrows = [line.strip() for line in diagram.splitlines() if ": " in line]
    assert sum(len(line.split(": ")[1].split(", ")) for line in arrows) == sum(
        row.next is not None for row in table.rows
    )
    assert "| Ended | Abort | it ended already |" in markdown(table)
