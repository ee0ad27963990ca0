"""What the engine tells the scheduler of requests: that one has tools, its other hints, and the policy of eviction."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flaky import Flaky
from harness import Harness, prompt_of

from tokenrelay.base.deadlines import Deadline
from tokenrelay.proto import worker_pb2
from tokenrelay.services.prefill.convert import engine_request


def test_the_hint_of_tools_reaches_the_scheduler(qwen: Any) -> None:
    harness = Harness(qwen)
    with harness:
        harness.wait(harness.submit(prompt_of(1, 100), 2, tools=True))
        harness.wait(harness.submit(prompt_of(2, 100), 2))
        harness.assert_quiet()
    watched = {row.origin for row in harness.built.scheduler.reuse() if row.watched}
    assert watched == {"tool_turn", "prompt", "output"}, "the last one: the end of the second text"


def test_the_policy_is_the_workers(qwen: Any) -> None:
    for policy in ("reuse", "lru"):
        with Harness(qwen, eviction=policy) as harness:
            harness.wait(harness.submit(prompt_of(1, 100), 2, tools=True))
        learned = any(row.watched for row in harness.built.scheduler.reuse())
        assert learned == (policy == "reuse")


def test_other_hints_reach_the_scheduler(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky) as harness:
        flaky.gate.clear()
        harness.submit(prompt_of(1, 20), 9, request_id="one", tps_floor=120, expected_tokens=7)
        assert flaky.entered.wait(60)
        (one,) = harness.engine.explain("one").result(5).sequences
        assert (one.explanation["tps_floor"], one.explanation["expected_tokens"]) == (120, 7)
        flaky.gate.set()
        harness.wait()
        harness.assert_quiet()


@pytest.mark.parametrize("tools", [False, True])
def test_the_hint_of_tools_comes_over_the_wire(tools: bool) -> None:
    submit = worker_pb2.Submit(token_ids=np.arange(3, dtype="<u4").tobytes(), output_start=3, tokens_max=1, tools=tools)
    received = worker_pb2.Submit.FromString(submit.SerializeToString())
    assert engine_request(1, received, (), Deadline.never()).tools is tools
