"""The engine's bell: no ring is lost, and none that was answered wakes anybody."""

from __future__ import annotations

import threading
import time
from collections import deque

from tokenrelay.runtime.bell import Bell


def slept_s(bell: Bell, timeout_s: float) -> float:
    began_s = time.monotonic()
    bell.wait(timeout_s)
    return time.monotonic() - began_s


def test_a_ring_before_the_wait_is_heard_once() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    assert slept_s(bell, 10.0) < 5.0
    assert slept_s(bell, 0.05) >= 0.05


def test_what_was_looked_at_does_not_ring_any_more() -> None:
    bell = Bell()
    bell.ring()
    bell.quiet()
    assert slept_s(bell, 0.05) >= 0.05
    bell.ring()
    assert slept_s(bell, 10.0) < 5.0


def test_no_ring_is_lost() -> None:
    """Several threads write things down and ring; the sleeper finds all of them without a timeout that helps it."""
    bell, lock, things = Bell(), threading.Lock(), deque[int]()
    writers, each, found, slow = 4, 2_000, 0, 0

    def write() -> None:
        for i in range(each):
            with lock:
                things.append(i)
                bell.ring()

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    while found < writers * each and not slow:
        with lock:
            bell.quiet()
            found += len(things)
            empty = not things
            things.clear()
        if empty:
            slow += slept_s(bell, 20.0) >= 20.0
    for thread in threads:
        thread.join()
    assert found == writers * each and not slow
