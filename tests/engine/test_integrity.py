"""The check of the scheduler's books while idle: when it runs, what it costs nobody, and what a broken book does."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from harness import Harness, prompt_of

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.runtime import integrity
from tokenrelay.runtime.integrity import Books, IntegrityError
from tokenrelay.runtime.requests import EngineRequest


class Watched:
    """A scheduler whose check is counted, and fails once it is told that a book is broken."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.checks: list[float] = []
        self.broken: str | None = None
        self.gate = threading.Event()
        self.gate.set()

    def check(self) -> None:
        self.checks.append(time.monotonic())
        assert self.gate.wait(30)
        self.scheduler.check()
        if self.broken:
            raise AssertionError(self.broken)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.scheduler, name)


def watch(harness: Harness) -> Watched:
    """Put a watched scheduler in the engine's hands, before it starts."""
    watched = Watched(harness.engine._scheduler)
    harness.engine._scheduler = watched  # type: ignore[assignment]
    harness.engine._books = Books(watched.check)
    return watched


def test_it_runs_once_when_the_engine_became_idle(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "INTERVAL_S", 1.0)  # time enough for three runs on a busy machine
    harness = Harness(qwen)
    watched = watch(harness)
    with harness:
        time.sleep(0.1)
        assert not watched.checks, "nothing happened yet"
        harness.run(prompt_of(1, 20), tokens_max=4)
        _until(lambda: harness.engine.stats.integrity_checks == 1)
        first = watched.checks[0]
        for n in range(3):  # busy and idle again and again: one check in each interval, not one a pause
            harness.run(prompt_of(n, 20), tokens_max=2)
            time.sleep(0.02)
        _until(lambda: len(watched.checks) == 2)
        assert watched.checks[1] - first >= 0.99
        time.sleep(1.5)
        assert len(watched.checks) == 2, "idle for ever: nothing changed, nothing is checked"
        stats = harness.engine.stats
        assert stats.integrity_failures == 0 and stats.integrity_check_us > 0
        harness.assert_quiet()


def test_it_does_not_run_while_there_is_work(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integrity, "INTERVAL_S", 0.0)
    harness = Harness(qwen)
    watched = watch(harness)
    with harness:
        sequence = harness.submit(prompt_of(1, 20), 200)
        harness.wait_for(lambda: len(harness.transcripts[sequence].token_ids) > 20, "some tokens")
        assert not watched.checks
        harness.wait(sequence)
        _until(lambda: bool(watched.checks))


def test_others_go_on_while_it_looks(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """submit and abort are answered at once, whatever the check takes; the request runs after it."""
    harness = Harness(qwen)
    watched = watch(harness)
    with harness:
        watched.gate.clear()
        harness.run(prompt_of(1, 10), tokens_max=2)
        _until(lambda: bool(watched.checks))
        began = time.monotonic()
        sequence = harness.submit(prompt_of(2, 10), 3)
        assert time.monotonic() - began < 10
        watched.gate.set()
        harness.wait(sequence)
        harness.assert_quiet()


def test_a_broken_book_ends_the_engine(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(qwen)
    watched = watch(harness)
    with harness:
        watched.broken = "block 3 has two owners"
        harness.run(prompt_of(1, 20), tokens_max=4)
        _until(lambda: bool(harness.fatal))
        (fatal,) = harness.fatal
        assert isinstance(fatal, IntegrityError) and "block 3 has two owners" in fatal.message
        assert harness.stats[-1].integrity_failures == 1, "told before the end"
        with pytest.raises(TokenRelayError, match="two owners"):
            harness.engine.submit(EngineRequest(77, np.array([5], np.uint32), 1, 1))
        assert len(watched.checks) == 1


def test_when_a_check_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    done: list[float] = []
    books = Books(lambda: done.append(now[0]), lambda: now[0])
    assert books.due_s() is None
    books.touched()
    assert books.due_s() == 0.0
    books.check()
    assert books.due_s() is None and done == [100.0] and (books.checks, books.failures) == (1, 0)
    books.touched()
    now[0] += 4
    assert books.due_s() == pytest.approx(integrity.INTERVAL_S - 4)
    now[0] += 100
    assert books.due_s() == 0.0


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
