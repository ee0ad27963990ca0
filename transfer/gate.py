"""A lock that the kernel keeps between an owner and one reader of its machine: it lets a paused reader be fenced.

The owner gives each reader a page of its own. Before it touches the owner's memory the reader takes the page's lock
shared (flock(2)) and looks whether the gate is shut; it lets the lock go when its read has ended, every few
milliseconds. The owner fences by shutting the gate and then taking the lock exclusively, for good: once it has it, no
read is under way and none will begin, even if the reader is stopped at this instant. A dead reader's lock is let go by
the kernel.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading

from tokenrelay.base.errors import TransferFailed
from tokenrelay.transfer.memory import F_SEAL_FUTURE_WRITE

PAGE_BYTES = 4096


class OwnerGate:
    """The owner's end."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("tokenrelay-gate", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self._fd, PAGE_BYTES)
        self._page = mmap.mmap(self._fd, PAGE_BYTES, mmap.MAP_SHARED)
        fcntl.fcntl(self._fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | F_SEAL_FUTURE_WRITE)

    def reader_fd(self) -> int:
        """A descriptor for the reader: its own open file, so that its lock is its own. The caller closes it."""
        return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)

    def shut(self) -> None:
        """From now on no read begins."""
        self._page[0] = 1

    def held(self) -> bool:
        """After `shut`: whether the lock is ours, which it then stays."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Only when the reader is known to be gone."""
        self._page.close()
        os.close(self._fd)


class ReaderGate:
    """The reader's end; `with gate:` around each read, from any thread."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor over. Raises TransferFailed when it is no gate."""
        self._fd = fd
        self._lock = threading.Lock()
        self._readers = 0
        if os.fstat(fd).st_size != PAGE_BYTES:
            raise TransferFailed("the peer's gate is no gate", reason="corrupt")
        self._page = mmap.mmap(fd, PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)

    def __enter__(self) -> None:
        """Raises TransferFailed with reason `fenced`."""
        with self._lock:
            if not self._readers:
                try:
                    fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _fenced() from None
            self._readers += 1
        if self._page[0]:
            self.__exit__()
            raise _fenced()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if not self._readers:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        """No read may be under way."""
        self._page.close()
        os.close(self._fd)


def _fenced() -> TransferFailed:
    return TransferFailed("the owner of the memory has fenced this process", reason="fenced")
