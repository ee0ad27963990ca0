"""A folder of its own for each kvstore under one that several share: a standby on the same volume, for example.

    lock, folder = own_folder(Path("/var/lib/tokenrelay/tier"))     # .../tier/0, or the first that nobody has

The lock (flock(2)) is the process's: it ends with it, however it ends, and the next life finds the blocks again.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from tokenrelay.base.errors import ConfigError

FOLDERS_MAX = 64


def own_folder(parent: Path) -> tuple[int, Path]:
    """(the file descriptor that holds the lock, the folder). Raises ConfigError where none can be had."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for number in range(FOLDERS_MAX):
            lock = os.open(parent / f"{number}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            except OSError:
                os.close(lock)
                raise
            return lock, parent / str(number)
    except OSError as error:
        raise ConfigError(f"kvstore.tier_dir: {parent}: {error.strerror or error}") from error
    raise ConfigError(f"kvstore.tier_dir: {FOLDERS_MAX} kvstores use {parent} already")
