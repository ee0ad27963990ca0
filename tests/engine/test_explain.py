"""Asking the engine why requests are where they are, from another thread, while it works and while it ends."""

from __future__ import annotations

from typing import Any

import pytest
from flaky import Flaky
from harness import Harness, prompt_of

from tokenrelay.base.errors import Overloaded, TokenRelayError, Unavailable
from tokenrelay.runtime import explain as explain_module
from tokenrelay.runtime.requests import SamplingParams


def test_what_runs_and_what_waits_is_told_while_a_step_hangs(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky, slots=1) as harness:
        flaky.gate.clear()
        harness.submit(prompt_of(1, 20), 5, request_id="one", sampling=SamplingParams(choice=3))
        assert flaky.entered.wait(60)
        harness.submit(prompt_of(2, 20), 5, request_id="two")
        (one,) = harness.engine.explain("one").result(5).sequences
        assert (one.request_id, one.choice, one.explanation["state"]) == ("one", 3, "Decoding")
        (two,) = harness.engine.explain("two").result(5).sequences
        assert two.explanation["slots_free"] == 0 and "no slot is free" in two.explanation["text"]
        both = harness.engine.explain().result(5)
        assert [each.request_id for each in both.sequences] == ["one", "two"] and both.left_out == 0
        assert harness.engine.explain("three").result(5).sequences == ()
        flaky.gate.set()
        harness.wait()
        assert harness.engine.explain().result(5).sequences == (), "what ended is known no more"
        harness.assert_quiet()


def test_an_answer_is_bounded(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explain_module, "SEQUENCES_MAX", 2)
    flaky = Flaky(qwen)
    with Harness(flaky, slots=1) as harness:
        flaky.gate.clear()
        for n in range(5):
            harness.submit(prompt_of(n, 8), 2, request_id="many")
        answer = harness.engine.explain("many").result(5)
        assert (len(answer.sequences), answer.left_out) == (2, 3)
        flaky.gate.set()
        harness.wait()
        harness.assert_quiet()


def test_questions_are_bounded_and_all_get_an_answer_when_the_engine_ends(qwen: Any) -> None:
    harness = Harness(qwen)  # the loop is not started: nobody takes them
    waiting = [harness.engine.explain() for _ in range(explain_module.QUESTIONS_MAX)]
    with pytest.raises(Overloaded, match="64 questions wait"):
        harness.engine.explain()
    assert waiting[0].cancel(), "who asked has gone"
    harness.engine.start()
    assert all(future.result(10).sequences == () for future in waiting[1:])
    harness.engine.close()
    with pytest.raises(Unavailable, match="closed"):
        harness.engine.explain()


def test_a_loop_that_fails_answers_questions_too(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(qwen)

    def broken(*_: Any) -> None:
        raise RuntimeError("no books")

    monkeypatch.setattr(harness.engine, "_next_commands", broken)
    future = harness.engine.explain()
    harness.engine.start()
    with pytest.raises(TokenRelayError, match="no books"):
        future.result(10)
    harness.engine.close()
