"""Whether rank processes are gone."""

from __future__ import annotations

import time
from pathlib import Path


def gone(pid: int) -> bool:
    """Whether the process ended; a zombie that nobody waited for yet has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pids: list[int]) -> None:
    end = time.monotonic() + 60
    while not all(map(gone, pids)):
        assert time.monotonic() < end, "a rank outlived its group"
        time.sleep(0.05)
