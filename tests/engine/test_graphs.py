"""Recorded decode steps in the engine, with a backend that only calls: sizes, padding, buffers, pipeline, failures."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from harness import Harness, plain_greedy
from torch import Tensor

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.runtime.executor.device import DeviceExecutor
from tokenrelay.runtime.executor.graphs import Eager, sizes_for
from tokenrelay.runtime.requests import Finish, SamplingParams


class Watched(Eager):
    """Poisons what it hands out, refuses to record when asked, and waits for a test before a step has ended."""

    def __init__(self) -> None:
        self.refuses = False
        self.gate = threading.Event()
        self.gate.set()
        self.marks = 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        if self.refuses:
            raise RuntimeError("operation not permitted when a stream is capturing")
        return super().capture(run)

    def host_bytes(self, count: int) -> Tensor:
        return torch.full((count,), 0xA5, dtype=torch.uint8)

    def mark(self) -> Callable[[], None]:
        self.marks += 1

        def wait() -> None:
            assert self.gate.wait(30)

        return wait


@pytest.fixture
def backend() -> Watched:
    return Watched()


def captures_of(harness: Harness) -> Any:
    executor = harness.engine._executor
    assert isinstance(executor, DeviceExecutor)
    return executor.captures


def prompts_of(model: Any, count: int, seed: int = 1) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 40))] for _ in range(count)]


def test_sizes_cover_every_number_of_rows_and_pad_little() -> None:
    for rows_max in (1, 5, 64, 100, 512, 600):
        sizes = sizes_for(rows_max)
        assert list(sizes) == sorted(set(sizes))
        assert sizes[-1] == rows_max
        for rows in range(1, rows_max + 1):
            size = next(s for s in sizes if s >= rows)
            assert size - rows <= max(1, size // 4)
    assert len(sizes_for(512)) < 50


def test_tokens_are_those_of_a_run_without(model: Any, backend: Watched) -> None:
    """Greedy and drawn, for batches of every size, while sequences come and go."""
    prompts = prompts_of(model, 7)
    drawn = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=11)
    with Harness(model) as plain:
        expected = plain.run(*prompts, tokens_max=9), plain.run(*prompts, tokens_max=9, sampling=drawn)
    with Harness(model, graphs=backend) as harness:
        greedy, sampled = harness.run(*prompts, tokens_max=9), harness.run(*prompts, tokens_max=9, sampling=drawn)
        stats = captures_of(harness).stats
        harness.assert_quiet()
    assert (greedy, sampled) == expected
    assert greedy[0] == plain_greedy(model, prompts[0], 9)
    assert stats.replays > 0
    assert {group_max for _, group_max in stats.recorded} == {1}
    assert len(stats.recorded) == len(set(stats.recorded))


def test_staggered_ends_use_several_sizes(qwen: Any, backend: Watched) -> None:
    prompts = prompts_of(qwen, 6, seed=3)
    with Harness(qwen, graphs=backend) as harness:
        ids = [harness.submit(prompt, 4 + 3 * i) for i, prompt in enumerate(prompts)]
        found = [transcript.token_ids for transcript in harness.wait(*ids)]
        rows = {rows for rows, _ in captures_of(harness).stats.recorded}
    assert found == [plain_greedy(qwen, prompt, 4 + 3 * i) for i, prompt in enumerate(prompts)]
    assert len(rows) >= 3


def test_penalties_masks_and_logprobs_run_beside_recorded_steps(model: Any, backend: Watched) -> None:
    prompts = prompts_of(model, 4, seed=5)
    asked = [
        SamplingParams(),
        SamplingParams(temperature=0.7, seed=3, presence_penalty=1.0, repetition_penalty=1.2),
        SamplingParams(temperature=0.7, seed=4, logprobs=3),
        SamplingParams(temperature=1.1, seed=5),
    ]

    def run(**options: Any) -> tuple[list[list[int]], int]:
        with Harness(model, **options) as harness:
            ids = [
                harness.submit(p, 6 + 2 * i, sampling=s) for i, (p, s) in enumerate(zip(prompts, asked, strict=True))
            ]
            transcripts = harness.wait(*ids)
            harness.assert_quiet()
            return [t.token_ids for t in transcripts], len(transcripts[2].logprobs)

    assert run(graphs=backend) == run()


def test_under_pressure_sequences_are_preempted_and_go_on(model: Any, backend: Watched) -> None:
    prompts = prompts_of(model, 6, seed=7)
    with Harness(model, graphs=backend, blocks=14) as harness:
        found = harness.run(*prompts, tokens_max=30)
        harness.assert_quiet()
    assert found == [plain_greedy(model, prompt, 30) for prompt in prompts]


def test_a_repeated_prompt_gets_its_last_block_by_a_copy(model: Any, backend: Watched) -> None:
    """The copy is queued before the step that reads it; other sequences decode meanwhile."""
    prompt = prompts_of(model, 1, seed=8)[0] * 3
    expected = plain_greedy(model, prompt, 6)
    with Harness(model, graphs=backend) as harness:
        other = harness.submit([1, 2, 3], 40)
        assert harness.run(prompt, tokens_max=6) == [expected]
        [transcript] = harness.wait(harness.submit(prompt, 6))
        harness.wait(other)
        harness.assert_quiet()
    assert transcript.token_ids == expected
    assert transcript.cached_tokens == len(prompt) - 1  # all that a sequence may share: whole blocks, and a copied tail


def test_a_size_that_cannot_be_recorded_runs_by_itself(qwen: Any, backend: Watched) -> None:
    backend.refuses = True
    prompts = prompts_of(qwen, 3)
    with Harness(qwen, graphs=backend) as harness:
        found = harness.run(*prompts, tokens_max=6)
        stats = captures_of(harness).stats
    assert found == [plain_greedy(qwen, prompt, 6) for prompt in prompts]
    assert stats.refused > 0
    assert stats.recorded == []


def test_two_steps_are_queued_before_the_first_has_ended(qwen: Any, backend: Watched) -> None:
    """The device is never waited for between two steps: with its end held back, the next one is in its queue."""
    backend.gate.clear()
    with Harness(qwen, graphs=backend) as harness:
        sequence_id = harness.submit([1, 2, 3], 12)
        pause = threading.Event()
        for _ in range(600):
            if backend.marks >= 2:
                break
            pause.wait(0.05)
        assert backend.marks == 2
        assert harness.transcripts[sequence_id].token_ids == []  # neither has ended
        backend.gate.set()
        [transcript] = harness.wait(sequence_id)
    assert transcript.token_ids == plain_greedy(qwen, [1, 2, 3], 12)


class Breaking:
    """The model, until told to break: raises, or gives logits that are no numbers for one token."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.raises = False
        self.poisoned: int | None = None

    def __call__(self, token_ids: Tensor, batch: Any, caches: Any, sample_rows: Tensor) -> Tensor:
        if self.raises:
            raise RuntimeError("the device is on fire")
        logits: Tensor = self.model(token_ids, batch, caches, sample_rows)
        if self.poisoned is not None:
            logits[token_ids[sample_rows] == self.poisoned] = float("nan")
        return logits


@pytest.fixture
def broken(qwen: Any, backend: Watched) -> Iterator[tuple[Harness, Breaking]]:
    harness = Harness(qwen, graphs=backend)
    executor = harness.engine._executor
    assert isinstance(executor, DeviceExecutor)
    breaking = Breaking(qwen)
    executor._model = executor.captures._model = breaking
    with harness:
        yield harness, breaking


def test_logits_that_are_no_numbers_end_their_request_alone(qwen: Any, broken: tuple[Harness, Breaking]) -> None:
    harness, breaking = broken
    good, bad = [5, 6, 7], [9, 8, 4]
    tokens = plain_greedy(qwen, bad, 4)
    breaking.poisoned = tokens[2]
    expected = plain_greedy(qwen, good, 8)
    assert breaking.poisoned not in expected
    assert breaking.poisoned not in tokens[:2]
    first, second = harness.submit(good, 8), harness.submit(bad, 8)
    ended = harness.wait(first, second)
    assert ended[0].token_ids == expected
    assert ended[1].finish is Finish.ERROR
    assert "not finite" in str(ended[1].terminals[0].error)
    assert ended[1].token_ids == tokens[:3]
    harness.assert_quiet()


def test_a_step_that_raises_ends_its_sequences_only(qwen: Any, broken: tuple[Harness, Breaking]) -> None:
    harness, breaking = broken
    first = harness.submit([1, 2, 3], 400)
    harness.wait_for(lambda: len(harness.transcripts[first].token_ids) >= 3, "three tokens")
    breaking.raises = True
    [transcript] = harness.wait(first)
    assert transcript.finish is Finish.ERROR
    assert isinstance(transcript.terminals[0].error, TokenRelayError)
    breaking.raises = False
    assert harness.run([1, 2, 3], tokens_max=5) == [plain_greedy(qwen, [1, 2, 3], 5)]
    harness.assert_quiet()


def test_warm_up_records_every_size(qwen: Any, backend: Watched) -> None:
    with Harness(qwen, graphs=backend, slots=6, draft_tokens=2) as harness:
        captures = captures_of(harness)
        with torch.inference_mode():
            captures.warm_up()
        assert sorted(captures.stats.recorded) == sorted((n, g) for n in sizes_for(18) for g in (1, 3))
        assert harness.run([4, 5, 6], tokens_max=6) == [plain_greedy(qwen, [4, 5, 6], 6)]
        assert len(captures.stats.recorded) == 2 * len(sizes_for(18))
