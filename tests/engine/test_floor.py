"""The TPS floor in a real engine: what it measures reaches the counters, and a floor that is not held is said."""

from __future__ import annotations

from typing import Any

import pytest
from harness import Harness

from tokenrelay.runtime import floor_watch
from tokenrelay.runtime.floor_watch import FloorWatch
from tokenrelay.runtime.requests import FloorStats


def test_an_engine_measures_its_batch_1_rate_and_sets_the_floor_by_it(qwen: Any) -> None:
    with Harness(qwen, tps_floor=1e5, tps_fraction=0.25) as harness:
        harness.run([1, 2, 3], tokens_max=24)
        floor = harness.engine.stats.floor
        assert floor.configured == 1e5
        assert floor.batch_1 > 1
        assert floor.in_force == pytest.approx(0.25 * floor.batch_1)
        assert floor.tokens > 0
        model = harness.built.scheduler.cost_model()
        assert model.observations == harness.engine.stats.steps
        run_us = harness.engine.stats.step_time_us
        assert 0 < model.predict_us(decode_rows=1, decode_context=10) < run_us
        harness.assert_quiet()


def test_everybody_is_served_under_a_floor_that_cannot_hold(qwen: Any) -> None:
    """More users than the floor allows, and no time to wait for: nobody is lost, and every answer is whole."""
    alone = []
    with Harness(qwen) as harness:
        alone = harness.run(*[[7, i] for i in range(12)], tokens_max=12)
    with Harness(qwen, tps_floor=1e5, tps_fraction=1.0, floor_wait_s=0.01) as harness:
        assert harness.run(*[[7, i] for i in range(12)], tokens_max=12) == alone
        harness.assert_quiet()


class Log:
    """Stands in for the module's logger."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def warning(self, message: str, **facts: Any) -> None:
        self.lines.append((message, facts))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(floor_watch, "log", log)
    return log


def test_a_floor_that_is_not_held_is_said_at_a_bounded_rate(log: Log) -> None:
    now_s = [100.0]
    watch = FloorWatch(lambda: now_s[0])
    for step in range(1, 1000):
        watch.look(FloorStats(70.0, 70.0, 200.0, 3, tokens=10 * step, tokens_late=5 * step), running=9)
        now_s[0] += 0.1
    assert [message for message, _ in log.lines] == ["the TPS floor is not held"] * 4
    facts = log.lines[1][1]
    assert facts["configured_tps"] == 70.0 and facts["running"] == 9
    assert facts["tokens_late"] == facts["tokens"] // 2 > 1000


def test_a_device_that_is_too_slow_is_said_once(log: Log) -> None:
    now_s = [0.0]
    watch = FloorWatch(lambda: now_s[0])
    for step in range(1000):
        watch.look(FloorStats(70.0, 12.5, 25.0, tokens=step), running=1)
        now_s[0] += 1
    assert len(log.lines) == 1 and "too slow at batch 1" in log.lines[0][0]
    assert log.lines[0][1]["in_force_tps"] == 12.5


def test_a_floor_that_is_held_is_not_talked_about(log: Log) -> None:
    now_s = [0.0]
    watch = FloorWatch(lambda: now_s[0])
    for step in range(1000):
        watch.look(FloorStats(70.0, 70.0, 200.0, tokens=100 * step, tokens_late=step), running=8)
        now_s[0] += 1
    assert log.lines == []
