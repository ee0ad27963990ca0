"""What the engine tells the scheduler of blocks that come back: that a request has tools, and the policy."""

from __future__ import annotations

from typing import Any

from harness import Harness
from test_engine import prompt_of


def test_the_hint_of_tools_reaches_the_scheduler(qwen: Any) -> None:
    harness = Harness(qwen)
    with harness:
        harness.wait(harness.submit(prompt_of(1, 100), 2, tools=True))
        harness.wait(harness.submit(prompt_of(2, 100), 2))
        harness.assert_quiet()
    watched = {row.origin for row in harness.built.scheduler.reuse() if row.watched}
    assert watched == {"tool_turn", "prompt"}


def test_the_policy_is_the_workers(qwen: Any) -> None:
    for policy in ("reuse", "lru"):
        with Harness(qwen, eviction=policy) as harness:
            harness.wait(harness.submit(prompt_of(1, 100), 2, tools=True))
        learned = any(row.watched for row in harness.built.scheduler.reuse())
        assert learned == (policy == "reuse")
