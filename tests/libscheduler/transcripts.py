"""Transcripts written inside a test, and the small configuration of the tests here. See docs/transcripts.md."""

from __future__ import annotations

import textwrap

from tokenrelay.libscheduler import Config
from tokenrelay.libscheduler.transcript import KEY, make_config, parse
from tokenrelay.libscheduler.transcript_player import Player

__all__ = ["KEY", "check_transcript", "make_config"]


def check_transcript(config: Config, text: str) -> None:
    """Play the commands on a scheduler of this configuration and compare all answers."""
    wanted = parse("A transcript inside a test.\n" + textwrap.dedent(text).strip() + "\n")
    player = Player(config)
    for entry in wanted.entries:
        if entry.command is not None:
            assert player.answer(entry.command) == entry.answers, entry.command
    player.finish()
