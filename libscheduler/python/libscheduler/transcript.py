"""Transcripts: what goes into a scheduler and what it answers, as text that a person reads, writes and diffs.

    One of two takes what the other computed.

    config steps_in_flight=1

    submit 1 A40
      accepted
    plan
      step 1: 1 prefills [0, 40) and samples, admitted to slot 0 with 0 cached
    commit 7
      1 gives 7 (length) first, 0 cached

The first line says what the transcript proves; what is indented is the answer to the command above it.
docs/transcripts.md has the words. `python -m tokenrelay.libscheduler.transcript FILE…` compares, `--update` writes the
answers anew.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tokenrelay.libscheduler._native import Config

INDENT = "  "
COMMANDS_MAX = 2000  # a longer one is nothing that a person reads


class TranscriptError(ValueError):
    """A line that cannot be understood: `file:line: what is wrong, and what was expected`."""


@dataclass(frozen=True)
class Form:
    """How a command is written: its words, more words of the last kind, its options (name=value)."""

    words: tuple[str, ...] = ()
    more: bool = False
    options: tuple[str, ...] = ()

    def usage(self, name: str) -> str:
        """The command as one would write it."""
        words = [f"{word}…" if self.more and word == self.words[-1] else word for word in self.words]
        return " ".join([name, *words, *(f"[{option}=…]" for option in self.options)])


FORMS: dict[str, Form] = {
    "submit": Form(
        ("ID", "PROMPT"),
        options=(
            "max",
            "stop",
            "priority",
            "salt",
            "tenant",
            "output_start",
            "parent",
            "parent_tokens",
            "expected",
            "floor",
        ),
    ),
    "abort": Form(("ID",)),
    "draft": Form(("ID", "TOKEN"), more=True),
    "plan": Form(),
    "commit": Form(("TOKEN",), more=True, options=("step", "run")),
    "run": Form(("STEPS", "TOKEN"), options=("each", "show")),
    "wait": Form(("TIME",)),
    "copied": Form(("COPY",), more=True),
    "copy_failed": Form(("COPY",), more=True),
    "host": Form(),
    "counts": Form(),
    "usage": Form(),
    "floor": Form(),
    "drafts": Form(),
    "events": Form(),
    "tokens": Form(("ID",)),
    "explain": Form(("ID",)),
    "why": Form(("ID",)),
    "table": Form(("SLOT", "BLOCKS")),
}
_OPTIONAL_WORDS = {"commit"}  # a step may sample nothing
CONFIG_DEFAULTS: dict[str, int | float] = {"block_tokens": 16, "blocks": 32, "slots": 4, "context_tokens": 256}
CONFIG_FIELDS = tuple(name for name in dir(Config) if not name.startswith("_"))


@dataclass(frozen=True)
class Command:
    """One command, and where it stands."""

    where: str  # file:line, for errors
    name: str
    words: tuple[str, ...]
    options: Mapping[str, str]

    def error(self, message: str) -> TranscriptError:
        """An error that names the line."""
        return TranscriptError(f"{self.where}: {message}")

    def number(self, value: str, what: str) -> int:
        """A whole number, not negative unless it is a priority."""
        if not re.fullmatch(r"-?\d+" if what == "priority" else r"\d+", value):
            raise self.error(f"{what} is {value!r}, expected a whole number")
        return int(value)

    def option(self, name: str, default: int) -> int:
        """A numeric option, or what it is when it is left out."""
        return self.number(self.options[name], name) if name in self.options else default


@dataclass
class Entry:
    """A line that is no answer: a command with its answers, or a comment, an empty line, the configuration."""

    text: str
    command: Command | None = None
    answers: list[str] = field(default_factory=list)


@dataclass
class Transcript:
    """A file, taken apart. `render` gives it back."""

    name: str
    config: dict[str, int | float]
    entries: list[Entry]

    @property
    def proves(self) -> str:
        """The first line."""
        return self.entries[0].text

    def make_config(self) -> Config:
        """Small, but for what the transcript says: 16 tokens a block, 4 slots, 32 blocks, 256 tokens of context."""
        return make_config(**self.config)

    def render(self) -> str:
        """The text, with the answers that the entries have now."""
        lines = []
        for entry in self.entries:
            lines += [entry.text, *(INDENT + answer for answer in entry.answers)]
        return "\n".join(lines) + "\n"


KEY = bytes(range(16))


def make_config(**fields: int | float) -> Config:
    """The configuration of a transcript; ValueError names a field that is out of its bounds."""
    values: dict[str, int | float] = {**CONFIG_DEFAULTS, **fields}
    return Config(hash_key=KEY, model_identity=bytes(16), **values)  # type: ignore[arg-type]


def parse(text: str, name: str = "transcript") -> Transcript:
    """Take a transcript apart. Raises TranscriptError with the line of what cannot be understood."""
    transcript = Transcript(name, {}, [])
    configured = commands = 0
    for number, line in enumerate(text.splitlines(), start=1):
        where = f"{name}:{number}"
        if "\t" in line:
            raise TranscriptError(f"{where}: a tab; indent answers by two spaces")
        if line != line.rstrip():
            raise TranscriptError(f"{where}: spaces at the end of the line")
        if line.startswith(" "):
            _answer(transcript, line, where)
            continue
        entry = Entry(line)
        transcript.entries.append(entry)
        if number == 1:
            if not line or line.split()[0] in (*FORMS, "config") or line.startswith("#"):
                raise TranscriptError(f"{where}: the first line says in a sentence what the transcript proves")
        elif line.startswith("config"):
            configured += 1
            if commands or configured > 1:
                raise TranscriptError(f"{where}: the configuration comes once, before the first command")
            transcript.config = _parse_config(line, where)
        elif line and not line.startswith("#"):
            entry.command = parse_command(line, where)
            commands += 1
    if not commands:
        raise TranscriptError(f"{name}: there is no command in it")
    if commands > COMMANDS_MAX:
        raise TranscriptError(f"{name}: {commands} commands, at most {COMMANDS_MAX}")
    return transcript


def _answer(transcript: Transcript, line: str, where: str) -> None:
    if not transcript.entries or transcript.entries[-1].command is None:
        raise TranscriptError(f"{where}: an answer (it is indented) without a command above it")
    if not line.startswith(INDENT) or line.startswith(INDENT + " "):
        raise TranscriptError(f"{where}: an answer is indented by {len(INDENT)} spaces")
    transcript.entries[-1].answers.append(line[len(INDENT) :])


def _parse_config(line: str, where: str) -> dict[str, int | float]:
    found: dict[str, int | float] = {}
    for word in line.split()[1:]:
        name, equals, value = word.partition("=")
        if not equals or name not in CONFIG_FIELDS:
            raise TranscriptError(f"{where}: {word!r} sets no field of the configuration; {', '.join(CONFIG_FIELDS)}")
        if name in found:
            raise TranscriptError(f"{where}: {name} is set twice")
        try:
            found[name] = float(value) if "." in value else int(value)
        except ValueError:
            raise TranscriptError(f"{where}: {name} is {value!r}, expected a number") from None
    try:
        make_config(**found)
    except (TypeError, ValueError) as error:
        raise TranscriptError(f"{where}: {str(error).splitlines()[0]}") from None
    return found


def parse_command(line: str, where: str) -> Command:
    """One command. Raises TranscriptError."""
    name, *rest = line.split()
    form = FORMS.get(name)
    if form is None:
        raise TranscriptError(f"{where}: {name!r} is no command; there are {', '.join(FORMS)}")
    words = tuple(word for word in rest if "=" not in word)
    options: dict[str, str] = {}
    for word in rest:
        option, equals, value = word.partition("=")
        if not equals:
            continue
        if option not in form.options or not value or option in options:
            raise TranscriptError(f"{where}: {word!r} is no option here; expected: {form.usage(name)}")
        options[option] = value
    fewest = 0 if name in _OPTIONAL_WORDS else len(form.words)
    if len(words) < fewest or (len(words) > len(form.words) and not form.more):
        raise TranscriptError(f"{where}: {len(words)} words after {name!r}; expected: {form.usage(name)}")
    return Command(where, name, words, options)


def prompt_tokens(command: Command, spec: str, known: Mapping[int, NDArray[np.uint32]]) -> NDArray[np.uint32]:
    """The tokens of `A40+B10` or `@1+C5`: 40 of text A, 10 of text B; all that sequence 1 had, then 5 of text C.

    A text's tokens are distinct for every letter and place. uint32 [tokens].
    """
    pieces = []
    for piece in spec.split("+"):
        if match := re.fullmatch(r"([A-Z])(\d{1,6})", piece):
            pieces.append(np.arange(int(match[2]), dtype=np.uint32) + np.uint32(10_000 * ord(match[1])))
        elif (match := re.fullmatch(r"@(\d+)", piece)) and int(match[1]) in known:
            pieces.append(known[int(match[1])])
        else:
            raise command.error(
                f"the prompt has the piece {piece!r}, expected such as A40, or @1 for what sequence 1 had"
            )
    return np.concatenate(pieces).astype(np.uint32)


def time_us(command: Command, word: str) -> int:
    """Microseconds of `250us`, `10ms` or `2s`."""
    match = re.fullmatch(r"(\d+)(us|ms|s)", word)
    if match is None:
        raise command.error(f"the time is {word!r}, expected such as 250us, 10ms or 2s")
    return int(match[1]) * {"us": 1, "ms": 1_000, "s": 1_000_000}[match[2]]


def play(transcript: Transcript) -> Transcript:
    """The same transcript with what the scheduler of this build answers. Raises AssertionError when its books break."""
    from tokenrelay.libscheduler.transcript_player import Player

    player = Player(transcript.make_config())
    entries = [Entry(e.text, e.command, player.answer(e.command) if e.command else []) for e in transcript.entries]
    player.finish()
    return Transcript(transcript.name, transcript.config, entries)


def difference(transcript: Transcript) -> str:
    """Empty when the scheduler answers as written, else a unified diff: `-` as written, `+` as answered."""
    written, answered = transcript.render(), play(transcript).render()
    lines = difflib.unified_diff(
        written.splitlines(), answered.splitlines(), f"{transcript.name} (written)", "answered", lineterm="", n=6
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    """Compare files with what the scheduler answers; `--update` writes the answers. 0: they agree, or were written."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    update = "--update" in words
    files = [Path(word) for word in words if word != "--update"]
    if not files or any(str(file).startswith("-") for file in files):
        say("usage: python -m tokenrelay.libscheduler.transcript [--update] FILE…")
        return 2
    wrong = 0
    for file in files:
        try:
            transcript = parse(file.read_text(encoding="utf-8"), str(file))
            if not (changed := difference(transcript)):
                continue
        except (OSError, TranscriptError) as error:
            say(str(error))
            return 2
        if update:
            file.write_text(play(transcript).render(), encoding="utf-8")
            say(f"{file}: written")
        else:
            wrong += 1
            say(changed)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
