"""What the engine tells beside tokens: blocks by state, and how long a sequence waited for its first step."""

from __future__ import annotations

import time
from typing import Any

from flaky import Flaky
from harness import Harness, prompt_of


def test_blocks_are_told_by_state(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky, slots=1) as harness:
        flaky.gate.clear()
        first = harness.submit(prompt_of(1, 40), 40)
        assert flaky.entered.wait(60)
        for _ in range(6000):  # a turn without outputs tells nobody, so nobody can wait for it
            if harness.engine.stats.blocks_active:
                break
            time.sleep(0.01)
        during = harness.engine.stats
        assert during.blocks_in_flight > 0, "a launched step writes them"
        flaky.gate.set()
        harness.wait(first)
        for stats in harness.stats:
            told = (stats.blocks_writable, stats.blocks_in_flight, stats.blocks_quarantined, stats.blocks_sealed)
            assert min(told) >= 0 and sum(told) == stats.blocks_active
        assert any(stats.blocks_sealed for stats in harness.stats), "full blocks of a running sequence"
        harness.assert_quiet()
    assert harness.engine.stats.blocks_sealed == 0, "what nobody reads is cached"


def test_a_wait_is_told_with_the_first_token(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky, slots=1) as harness:
        flaky.gate.clear()
        first = harness.submit(prompt_of(1, 20), 4)
        assert flaky.entered.wait(60)
        second = harness.submit(prompt_of(2, 20), 4)
        time.sleep(0.15)
        flaky.gate.set()
        one, other = harness.wait(first, second)
        assert other.waited_us >= 150_000, "it waited for the only slot"
        assert 0 <= one.waited_us < other.waited_us
        aborted = harness.submit(prompt_of(3, 20), 4)
        harness.engine.abort(aborted)
        harness.wait(aborted)
        harness.assert_quiet()
        waits = harness.engine._waits
        assert not waits._since_s and not waits._waited_us, "nothing is kept of those that ended"
