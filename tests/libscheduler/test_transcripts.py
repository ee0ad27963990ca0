"""Every transcript in scenarios/ is what the scheduler answers, and the format refuses what it cannot mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from tokenrelay.libscheduler.transcript import FORMS, TranscriptError, difference, main, parse, play
from tokenrelay.libscheduler.transcript_player import Player

SCENARIOS = Path(__file__).parent / "scenarios"
FILES = sorted(SCENARIOS.rglob("*.txt"))
SMALL = "One request.\n\nsubmit 1 A20\n  accepted\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_scheduler_answers_as_written(file: Path) -> None:
    name = file.relative_to(Path(__file__).parents[2])
    changed = difference(parse(file.read_text(encoding="utf-8"), str(name)))
    again = f"python -m tokenrelay.libscheduler.transcript --update {name}"
    assert not changed, f"\n{changed}\nIs the new answer right? Then: {again}"


def test_there_are_enough_and_each_says_something_of_its_own() -> None:
    transcripts = [parse(file.read_text(encoding="utf-8"), file.name) for file in FILES]
    assert len(transcripts) >= 70
    assert len({transcript.proves for transcript in transcripts}) == len(transcripts)
    assert all(
        entry.answers or entry.command.name == "wait" for t in transcripts for entry in t.entries if entry.command
    )
    used = {entry.command.name for t in transcripts for entry in t.entries if entry.command}
    assert used == set(FORMS), "a command that no scenario uses is not tested"


def test_every_transition_of_a_request_is_in_some_transcript() -> None:
    """All states but those of a handover are seen, by the scheduler's own word for it."""
    seen = set()
    for file in FILES:
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):
                seen.add(line.strip().split(":")[0])
    assert {
        "Waiting",
        "Held",
        "Prefilling",
        "Decoding",
        "Loading",
        "Drafted",
        "Verifying",
        "Preempting",
        "Finishing",
        "Aborting",
        "Ended",
    } <= seen


def test_the_page_shows_a_transcript_that_holds() -> None:
    page = (Path(__file__).parents[2] / "docs" / "transcripts.md").read_text(encoding="utf-8")
    assert difference(parse(page.split("```")[1].lstrip("\n"), "docs/transcripts.md")) == ""
    table = page.split("## Commands")[1]
    assert all(f"`{name}" in table for name in FORMS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("submit 1 A20\n", "t:1: the first line says in a sentence what the transcript proves"),
        ("Proof.\n", "t: there is no command in it"),
        ("Proof.\n  accepted\n", r"t:2: an answer \(it is indented\) without a command above it"),
        ("Proof.\nplan\n   nothing\n", "t:3: an answer is indented by 2 spaces"),
        ("Proof.\nplan\n\tnothing\n", "t:3: a tab"),
        ("Proof.\nplan \n", "t:2: spaces at the end"),
        ("Proof.\nsubmitt 1 A20\n", "t:2: 'submitt' is no command; there are submit, abort"),
        ("Proof.\nsubmit 1\n", r"t:2: 1 words after 'submit'; expected: submit ID PROMPT \[max=…\]"),
        ("Proof.\nabort 1 2\n", "t:2: 2 words after 'abort'; expected: abort ID"),
        ("Proof.\nsubmit 1 A20 maximum=3\n", "t:2: 'maximum=3' is no option here"),
        ("Proof.\nsubmit 1 A20 max=1 max=2\n", "t:2: 'max=2' is no option here"),
        ("Proof.\nconfig block=16\nplan\n", "t:2: 'block=16' sets no field of the configuration; block_tokens, blocks"),
        ("Proof.\nconfig blocks=x\nplan\n", "t:2: blocks is 'x', expected a number"),
        ("Proof.\nconfig blocks=1\nplan\n", "t:2: blocks is 1|t:2: context_tokens is 256"),
        ("Proof.\nconfig blocks=64 blocks=64\nplan\n", "t:2: blocks is set twice"),
        ("Proof.\nplan\nconfig blocks=64\n", "t:3: the configuration comes once, before the first command"),
        ("Proof.\nconfig blocks=64.5\nplan\n", "t:2: "),
    ],
)
def test_a_line_that_cannot_be_understood_is_named(text: str, message: str) -> None:
    with pytest.raises(TranscriptError, match=message):
        parse(text, "t")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("submit x A20", "t:2: ID is 'x', expected a whole number"),
        ("submit 1 a20", "t:2: the prompt has the piece 'a20', expected such as A40, or @1"),
        ("submit 1 @7+A20", "t:2: the prompt has the piece '@7'"),
        ("submit 1 A20 max=few", "t:2: max is 'few', expected a whole number"),
        ("commit -1", "t:2: TOKEN is '-1', expected a whole number"),
        ("wait 5", "t:2: the time is '5', expected such as 250us, 10ms or 2s"),
        ("run 0 7", "t:2: STEPS is 0, expected 1 to 1000"),
        ("run 3 7 show=some", "t:2: show is 'some', expected all or last"),
        ("table 4 1", "t:2: SLOT is 4, expected 0 to 3"),
    ],
)
def test_a_command_that_cannot_be_meant_is_named(command: str, message: str) -> None:
    with pytest.raises(TranscriptError, match=message):
        play(parse(f"Proof.\n{command}\n", "t"))


def test_update_writes_answers_and_keeps_everything_else(tmp_path: Path) -> None:
    file, said = tmp_path / "new.txt", []
    file.write_text("One request.\n\nconfig slots=2\n\n# It is short.\nsubmit 1 A20\nplan\n  wrong\n\ncommit 7\n")
    assert main([str(file)], said.append) == 1
    assert "-  wrong" in said[0] and "+  step 1: 1 prefills [0, 20) and samples, admitted to slot 0" in said[0]
    assert main(["--update", str(file)], said.append) == 0
    assert file.read_text() == (
        "One request.\n\nconfig slots=2\n\n# It is short.\nsubmit 1 A20\n  accepted\nplan\n"
        "  step 1: 1 prefills [0, 20) and samples, admitted to slot 0 with 0 cached\n\n"
        "commit 7\n  1 gives 7 (length) first, 0 cached\n"
    )
    assert main([str(file)], said.append) == 0
    assert main([], said.append) == 2 and main([str(tmp_path / "none.txt")], said.append) == 2


def test_a_transcript_ends_with_nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is open at the end is aborted; the books must be empty then. Here one is left out."""
    transcript = parse(SMALL + "plan\n")
    play(transcript)
    monkeypatch.setattr(Player, "_submit", _submit_and_forget)
    with pytest.raises(AssertionError, match="left at the end"):
        play(transcript)


def _submit_and_forget(player: Player, command: object) -> list[str]:
    import numpy as np

    player.scheduler.submit(9, np.arange(5, dtype=np.uint32), output_start=5, tokens_max=3, now_us=0)
    return ["accepted"]
