"""A child process for the supervisor's tests: reports on the status descriptor, then behaves as told.

fake_child.py STATUS_FD FOLDER NAME BEHAVIOUR...   (each life takes the next behaviour; the last one repeats)

Behaviours: `ready`, `fail:MESSAGE`, `exit:CODE`, `silent`, `noise` (lines that are no status, then ready),
`die:SECONDS` (ready, then SIGKILL itself), `stubborn` (ready, ignores SIGTERM), `drain:SECONDS` (ready, drains so
long).
Every life appends its pid to FOLDER/NAME.pids, every SIGTERM a line to FOLDER/NAME.terms.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from tokenrelay.base.errors import CheckpointError
from tokenrelay.base.parent import die_with_parent
from tokenrelay.base.status import StatusPipe


def main() -> None:
    die_with_parent()
    fd, folder, name, *behaviours = sys.argv[1:]
    pids = Path(folder) / f"{name}.pids"
    with pids.open("a") as file:
        file.write(f"{os.getpid()}\n")
    lives = len(pids.read_text().splitlines())
    verb, _, argument = behaviours[min(lives, len(behaviours)) - 1].partition(":")
    terms = Path(folder) / f"{name}.terms"
    terms_seen = 0

    def on_term(number: int, frame: FrameType | None) -> None:
        nonlocal terms_seen
        terms_seen += 1
        with terms.open("a") as file:
            file.write(f"{time.monotonic()}\n")
        if verb == "stubborn":
            return
        if verb == "drain" and terms_seen == 1:
            time.sleep(float(argument))  # a second signal interrupts it, by way of the nested handler
        os._exit(0)

    signal.signal(signal.SIGTERM, on_term)
    signal.signal(signal.SIGUSR1, on_term)
    status = StatusPipe(int(fd))
    if verb == "fail":
        status.failed(CheckpointError(argument))
        sys.exit(1)
    if verb == "exit":
        sys.exit(int(argument))
    if verb == "silent":
        time.sleep(60)
    if verb == "noise":
        os.write(int(fd), b"not a status\n" + b"[1]\n" + b"x" * 100_000 + b"\n")
    status.progress("weights", done=1, total=2)
    status.progress("weights", done=2, total=2)
    status.ready(name=name, life=lives)
    if verb == "die":
        time.sleep(float(argument))
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        signal.pause()


main()
