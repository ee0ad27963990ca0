"""What goes wrong: steps that raise, abort storms, deadlines, drains, a loop that dies. Every sequence is answered."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import pytest
import torch
from flaky import Flaky
from harness import WAIT_S, Harness, plain_greedy, prompt_of

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.errors import DeadlineExceeded, Overloaded, TokenRelayError, Unavailable
from tokenrelay.runtime import engine as engine_module
from tokenrelay.runtime.requests import EngineRequest, Finish, Reject, SamplingParams


def test_a_step_that_raises_ends_its_sequences_and_nothing_it_wrote_is_read(model: Any) -> None:
    flaky = Flaky(model)
    prompts = [prompt_of(seed, 50) for seed in range(3)]
    expected = [plain_greedy(model, prompt, 8) for prompt in prompts]
    with Harness(flaky, chunk_tokens=16, step_tokens=32) as harness:
        flaky.break_next.set()
        ids = [harness.submit(prompt, 8) for prompt in prompts]
        harness.wait(*ids)
        finishes = [harness.transcripts[i].finish for i in ids]
        assert Finish.ERROR in finishes
        for i in ids:
            (terminal,) = harness.transcripts[i].terminals
            if terminal.finish is Finish.ERROR:
                assert terminal.error is not None and "fell off the bus" in terminal.error.message
        assert harness.run(*prompts, tokens_max=8) == expected, "the same prompts, after the failure"
        harness.assert_quiet()


def test_failures_amid_running_sequences_leave_the_books_in_order(model: Any) -> None:
    flaky, rng = Flaky(model), random.Random(3)
    prompts = {seed: prompt_of(seed, 20 + seed) for seed in range(6)}
    expected = {seed: plain_greedy(model, prompt, 12) for seed, prompt in prompts.items()}
    with Harness(flaky, slots=4, blocks=24) as harness:
        errors = 0
        for _ in range(12):
            seeds = [rng.choice(list(prompts)) for _ in range(4)]
            ids = [harness.submit(prompts[seed], 12) for seed in seeds]
            time.sleep(rng.random() * 0.01)
            flaky.break_next.set()
            for seed, transcript in zip(seeds, harness.wait(*ids), strict=True):
                errors += transcript.finish is Finish.ERROR
                assert transcript.token_ids == expected[seed][: len(transcript.token_ids)]
                assert transcript.finish is Finish.ERROR or transcript.token_ids == expected[seed]
        assert errors
        flaky.break_next.clear()
        harness.assert_quiet()


def test_an_abort_storm_leaks_nothing_and_harms_nobody(model: Any) -> None:
    rng = random.Random(1)
    shared = prompt_of(99, 40)
    with Harness(model, slots=6, blocks=40, chunk_tokens=16) as harness:
        kept, aborted = [], []
        for n in range(90):
            prompt = shared[: rng.choice((0, 16, 40))] + prompt_of(n, rng.randrange(1, 40))
            aborts = rng.random() < 0.4
            tokens_max = 500 if aborts else rng.randrange(1, 20)  # 500: a busy machine may be late with the abort
            sequence = harness.submit(prompt, tokens_max, sampling=SamplingParams(temperature=1.0, seed=n))
            if aborts:
                aborted.append(sequence)
                if rng.random() < 0.5:
                    time.sleep(rng.random() * 0.01)
                harness.engine.abort(sequence)
                harness.engine.abort(sequence)
            else:
                kept.append(sequence)
        harness.wait()
        assert {harness.transcripts[i].finish for i in kept} <= {Finish.LENGTH}
        assert {harness.transcripts[i].finish for i in aborted} <= {Finish.ABORT, Finish.LENGTH}
        assert sum(harness.transcripts[i].finish is Finish.ABORT for i in aborted) > len(aborted) // 2
        harness.assert_quiet()


def test_an_abort_is_answered_while_a_step_runs(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky) as harness:
        flaky.gate.clear()
        sequence = harness.submit(prompt_of(1, 10), 5)
        assert flaky.entered.wait(WAIT_S)
        harness.engine.abort(sequence)
        (transcript,) = harness.wait(sequence)  # the step still hangs
        assert transcript.finish is Finish.ABORT
        flaky.gate.set()
        harness.assert_quiet()


def test_a_deadline_ends_what_waits_and_what_runs(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky, slots=1) as harness:
        flaky.gate.clear()
        running = harness.submit(prompt_of(1, 10), 50, deadline=Deadline.after(0.2))
        waiting = harness.submit(prompt_of(2, 10), 50, deadline=Deadline.after(0.1))
        patient = harness.submit(prompt_of(3, 10), 5, deadline=Deadline.after(60))
        began = time.monotonic()
        harness.wait(running, waiting)
        assert 0.2 <= time.monotonic() - began < 5
        for sequence in (running, waiting):
            (terminal,) = harness.transcripts[sequence].terminals
            assert terminal.finish is Finish.ERROR and isinstance(terminal.error, DeadlineExceeded)
        flaky.gate.set()
        assert harness.wait(patient)[0].finish is Finish.LENGTH
        harness.assert_quiet()


def test_drain_refuses_new_ones_and_waits_for_the_open_ones(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky) as harness:
        flaky.gate.clear()
        sequence = harness.submit(prompt_of(1, 10), 5)
        assert not harness.engine.drain(Deadline.after(0.05))
        with pytest.raises(Unavailable):
            harness.submit(prompt_of(2, 10), 5)
        harness.transcripts.pop(2)
        flaky.gate.set()
        assert harness.engine.drain(Deadline.after(WAIT_S))
        assert harness.transcripts[sequence].finish is Finish.LENGTH
        harness.assert_quiet()


def test_closing_answers_everything_that_is_open(qwen: Any) -> None:
    with Harness(qwen, slots=2) as harness:
        ids = [harness.submit(prompt_of(n, 10), 500) for n in range(5)]
        harness.wait_for(lambda: harness.transcripts[ids[0]].token_ids, "it runs")
        harness.engine.close()
        for i in ids:
            (terminal,) = harness.transcripts[i].terminals
            assert terminal.finish is Finish.ERROR and isinstance(terminal.error, Unavailable)
        harness.assert_quiet()


def test_the_command_queue_is_bounded(qwen: Any) -> None:
    harness = Harness(qwen)
    bound = engine_module.EngineOptions().commands_max  # the loop is not started: nobody takes them
    request = [EngineRequest(n, np.array([5], np.uint32), 1, 1) for n in range(bound + 1)]
    for one in request[:bound]:
        harness.engine.submit(one)
    with pytest.raises(Overloaded):
        harness.engine.submit(request[bound])
    harness.engine.close()


def test_a_full_waiting_queue_refuses_by_name(qwen: Any) -> None:
    flaky = Flaky(qwen)
    with Harness(flaky, slots=1, waiting_max=3) as harness:
        flaky.gate.clear()
        harness.submit(prompt_of(0, 5), 3)
        assert flaky.entered.wait(WAIT_S)
        ids = [harness.submit(prompt_of(n, 5), 3) for n in range(1, 7)]
        harness.wait_for(lambda: sum(len(harness.transcripts[i].terminals) for i in ids) == 3, "three refusals")
        flaky.gate.set()
        harness.wait()
        rejects = [harness.transcripts[i].terminals[0].reject for i in ids]
        assert rejects == [Reject.NONE] * 3 + [Reject.QUEUE_FULL] * 3
        harness.assert_quiet()


def test_a_loop_that_fails_answers_everything_and_tells(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with Harness(qwen) as harness:
        ids = [harness.submit(prompt_of(n, 10), 500) for n in range(3)]
        harness.wait_for(lambda: harness.transcripts[ids[0]].token_ids, "it runs")

        def broken(*_: Any) -> None:
            raise AssertionError("the books do not balance")

        monkeypatch.setattr(harness.engine, "_launch_next", broken)
        harness.wait_for(lambda: all(harness.transcripts[i].terminals for i in ids), "answers")
        assert [harness.transcripts[i].finish for i in ids] == [Finish.ERROR] * 3
        assert len(harness.fatal) == 1 and "books" in str(harness.fatal[0])
        with pytest.raises(TokenRelayError):
            harness.engine.submit(EngineRequest(77, np.array([5], np.uint32), 1, 1))


def test_a_step_that_hangs_is_given_up(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "STEP_MAX_S", 0.2)
    flaky = Flaky(qwen)
    with Harness(flaky) as harness:
        flaky.gate.clear()
        sequence = harness.submit(prompt_of(1, 10), 5)
        harness.wait_for(lambda: harness.transcripts[sequence].terminals, "an answer")
        assert harness.transcripts[sequence].finish is Finish.ERROR
        assert "did not end" in str(harness.fatal[0])
        flaky.gate.set()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_end_their_request_alone(model: Any, value: float) -> None:
    """The other one of the same step goes on, and so does the engine."""

    class Broken(Flaky):
        def __call__(self, token_ids: torch.Tensor, batch: Any, caches: list[torch.Tensor], rows: torch.Tensor) -> Any:
            logits = super().__call__(token_ids, batch, caches, rows)
            long = batch.starts[-len(rows) :] + batch.lengths[-len(rows) :] > 40  # the longer one's fourth token
            logits[long, 5] = value
            return logits

    short, long = prompt_of(1, 12), prompt_of(2, 37)
    expected = plain_greedy(model, short, 8)
    with Harness(Broken(model), slots=2) as harness:
        ids = [harness.submit(prompt, 8) for prompt in (short, long)]
        harness.wait(*ids)
        assert harness.transcripts[ids[0]].token_ids == expected
        broken = harness.transcripts[ids[1]]
        assert broken.finish is Finish.ERROR and len(broken.token_ids) == 4
        assert "logits are not finite" in str(broken.terminals[0].error)
        again = harness.submit(short, 8)
        harness.wait(again)
        assert harness.transcripts[again].token_ids == expected
