"""Drafts in the engine: the same tokens as without them, whatever was guessed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import EOS, write_tokenizer
from guesses import WIDTH, guessing, oracle, repeating
from harness import BLOCK_TOKENS, Harness, Transcript, plain_logits
from tokenizers import Tokenizer

from tokenrelay.libscheduler import Handover
from tokenrelay.runtime.drafts import Drafter, Rate, may_draft
from tokenrelay.runtime.requests import DraftStats, EngineRequest, Finish, SamplingParams
from tokenrelay.runtime.weights.loader import load_model

GREEDY = SamplingParams()


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft that the index finds is worth its while: how fast this machine is does not matter."""

    def width(self: Drafter, *_: Any) -> tuple[int, float]:
        return self._tokens_max, 1.0

    monkeypatch.setattr(Drafter, "_width", width)
    monkeypatch.setattr("tokenrelay.runtime.drafts.ORDER", 1)  # what a random model says seldom repeats


def accepted(harness: Harness) -> DraftStats:
    return harness.engine.stats.drafts


def prompts_of(model: Any) -> list[list[int]]:
    return [repeating(seed, model.config.vocab_size, 40 + 9 * seed) for seed in range(5)]


@pytest.fixture(scope="session")
def bundled() -> Any:
    folder = Path(__file__).parents[2] / "assets" / "tokenrelay-tiny"
    return load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS)


SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.7, top_k=2, seed=5),
    "logprobs": SamplingParams(logprobs=3),
    "late_end": SamplingParams(tokens_min=7, end_token_ids=(1, 2)),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.usefixtures("eager")
def test_the_text_is_that_of_a_run_without_drafts(model: Any, name: str) -> None:
    sampling = SAMPLINGS[name]
    prompts = prompts_of(model)
    with Harness(model) as harness:
        plain = [harness.submit(prompt, 40, sampling=sampling) for prompt in prompts]
        before = harness.wait(*plain)
    with Harness(model, draft_tokens=WIDTH) as harness:
        drafted = harness.wait(*[harness.submit(prompt, 40, sampling=sampling) for prompt in prompts])
        counts = accepted(harness)
        harness.assert_quiet()
    for one, other in zip(before, drafted, strict=True):
        assert other.token_ids == one.token_ids and other.finish == one.finish
        assert len(other.logprobs) == len(one.logprobs) == (40 if sampling.logprobs else 0)
        for expected, found in zip(one.logprobs, other.logprobs, strict=True):
            assert found.logprob == pytest.approx(expected.logprob, abs=1e-4)
            assert found.top_token_ids == expected.top_token_ids
    assert counts.drafts > 5 and counts.accepted > 0


@pytest.mark.usefixtures("eager")
def test_the_bundled_model_says_the_same(bundled: Any) -> None:
    prompts = [repeating(seed, 200, 50) for seed in range(3)]
    for sampling in (GREEDY, SamplingParams(temperature=0.8, seed=3)):
        with Harness(bundled, context_tokens=256) as harness:
            plain = harness.run(*prompts, tokens_max=60, sampling=sampling)
        with Harness(bundled, context_tokens=256, draft_tokens=WIDTH) as harness:
            assert harness.run(*prompts, tokens_max=60, sampling=sampling) == plain
            counts = accepted(harness)
        assert counts.drafts > 0
        assert sampling.temperature > 0 or counts.accepted > 0


def greedy_texts(model: Any, tokens_max: int) -> tuple[list[list[int]], dict[int, list[int]]]:
    prompts = prompts_of(model)
    with Harness(model) as harness:
        outputs = harness.run(*prompts, tokens_max=tokens_max)
    return prompts, {i + 1: prompt + output for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))}


@pytest.mark.parametrize(("right", "wrong"), [(6, 0), (2, 3), (0, 4)])
def test_guesses_that_come_true_in_part(model: Any, right: int, wrong: int) -> None:
    prompts, texts = greedy_texts(model, 30)
    with guessing(model, oracle(texts, right, wrong)) as harness:
        assert harness.run(*prompts, tokens_max=30) == [texts[i + 1][len(p) :] for i, p in enumerate(prompts)]
        counts = accepted(harness)
        steps = harness.engine.stats.steps
        harness.assert_quiet()
    assert counts.drafts > 0 and counts.tokens >= counts.drafts
    if right == 0:
        assert counts.accepted == 0
    if wrong == 0:
        assert counts.accepted == counts.tokens
        assert steps < 20  # six tokens and one more at a time


def test_a_stop_token_inside_a_draft_ends_it(model: Any) -> None:
    prompts, texts = greedy_texts(model, 24)
    for at in (3, 5, 9):
        stops = [texts[i + 1][len(prompt) + at] for i, prompt in enumerate(prompts)]
        with guessing(model, oracle(texts, WIDTH)) as harness:
            ids = [harness.submit(p, 24, stop_token_ids=(s,)) for p, s in zip(prompts, stops, strict=True)]
            for i, transcript in enumerate(harness.wait(*ids)):
                output = texts[i + 1][len(prompts[i]) :]
                assert transcript.token_ids == output[: output.index(stops[i]) + 1]
                assert transcript.finish == Finish.STOP
            harness.assert_quiet()


def test_the_length_inside_a_draft_ends_it(model: Any) -> None:
    prompts, texts = greedy_texts(model, 24)
    for tokens_max in (1, 2, 4, 11):
        with guessing(model, oracle(texts, WIDTH)) as harness:
            ids = [harness.submit(prompt, tokens_max) for prompt in prompts]
            for i, transcript in enumerate(harness.wait(*ids)):
                assert transcript.token_ids == texts[i + 1][len(prompts[i]) :][:tokens_max]
                assert transcript.finish == Finish.LENGTH
            harness.assert_quiet()


def test_rejected_tokens_are_never_in_the_cache(model: Any) -> None:
    """What was guessed wrong, as a prompt: every token of it is computed, and the answer is right."""
    prompts, texts = greedy_texts(model, 40)
    guess = oracle(texts, 1, 5)
    with guessing(model, guess) as harness:
        first = harness.run(*prompts, tokens_max=40)
        known = [texts[i + 1][: len(prompt) + 12] for i, prompt in enumerate(prompts)]
        wrong = [tokens + list(guess(i + 1, tokens)) for i, tokens in enumerate(known)]
        ids = [harness.submit(prompt, 6) for prompt in wrong]
        harness.engine._drafter = Drafter(harness.built.scheduler, tokens_max=0)
        answers = [transcript.token_ids for transcript in harness.wait(*ids)]
    with Harness(model) as harness:
        assert harness.run(*wrong, tokens_max=6) == answers
    assert first == [texts[i + 1][len(p) :] for i, p in enumerate(prompts)]


def test_preemption_and_a_full_pool(model: Any) -> None:
    """Each is admitted with three blocks and needs seven of sixteen."""
    prompts = [repeating(seed, model.config.vocab_size, 40) for seed in range(6)]
    with Harness(model) as harness:
        plain = harness.run(*prompts, tokens_max=60)
    texts = {i + 1: prompt + output for i, (prompt, output) in enumerate(zip(prompts, plain, strict=True))}
    with guessing(model, oracle(texts, 4, 2), blocks=16, context_tokens=112) as harness:
        assert harness.run(*prompts, tokens_max=60) == plain
        assert harness.engine.stats.preemptions > 0 and accepted(harness).accepted > 0
        harness.assert_quiet()


def test_aborts_in_the_middle_of_drafts(model: Any) -> None:
    prompts, texts = greedy_texts(model, 60)
    rng = random.Random(3)
    with guessing(model, oracle(texts, 3, 2)) as harness:
        ids = [harness.submit(prompt, 60) for prompt in prompts]
        for sequence_id in ids[::2]:
            enough = rng.randint(2, 20)
            transcript = harness.transcripts[sequence_id]
            harness.wait_for(lambda t=transcript, n=enough: len(t.token_ids) >= n or t.terminals, "some tokens")
            harness.engine.abort(sequence_id)
        for i, transcript in enumerate(harness.wait(*ids)):
            output = texts[i + 1][len(prompts[i]) :]
            assert transcript.token_ids == output[: len(transcript.token_ids)]
            assert i % 2 == 0 or transcript.finish == Finish.LENGTH
        harness.assert_quiet()


def test_sampled_tokens_have_the_models_distribution(qwen: Any) -> None:
    """Of 900 answers of two tokens, each second one drafted: their counts beside the model's own probabilities."""
    prompt, top, seeds = repeating(1, qwen.config.vocab_size, 20), 3, 900

    def likely(token_ids: list[int]) -> tuple[list[int], torch.Tensor]:
        logits, ids = plain_logits(qwen, token_ids).topk(top)
        return ids.tolist(), torch.softmax(logits, 0)

    firsts, first_odds = likely(prompt)
    odds = {}
    for first, chance in zip(firsts, first_odds.tolist(), strict=True):
        seconds, second_odds = likely([*prompt, first])
        odds |= {(first, second): chance * p for second, p in zip(seconds, second_odds.tolist(), strict=True)}
    guesses = {first: max((p, pair[1]) for pair, p in odds.items() if pair[0] == first)[1] for first in firsts}

    def guess(_: int, known: list[int]) -> list[int]:
        return [guesses[known[-1]], 1] if len(known) == len(prompt) + 1 else []

    found = dict.fromkeys(odds, 0)
    with guessing(qwen, guess, slots=32, steps_in_flight=1) as harness:
        samplings = [SamplingParams(temperature=1.0, top_k=top, seed=seed) for seed in range(seeds)]
        ids = [harness.submit(prompt, 3, sampling=sampling) for sampling in samplings]
        for transcript in harness.wait(*ids):
            found[tuple(transcript.token_ids[:2])] += 1  # type: ignore[index]
        counts = accepted(harness)
    assert counts.drafts > seeds * 0.9 and 0.1 * counts.drafts < counts.accepted < 0.9 * counts.drafts
    surprise = sum((found[pair] - seeds * p) ** 2 / (seeds * p) for pair, p in odds.items())
    assert surprise < 26.1  # chi-square, 8 degrees of freedom, one in a thousand


# -- within a grammar -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("right", "wrong"), [(3, 2), (0, 4)])
def test_outputs_that_must_follow_a_grammar(model: Any, tmp_path: Path, right: int, wrong: int) -> None:
    """The same tokens, sampled within the same masks, beside sequences that are free; what did not come true has not
    moved the grammar on."""
    write_tokenizer(tmp_path)
    tokenizer_file = tmp_path / "tokenizer.json"
    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string", "maxLength": 9}}}
    schema |= {"required": ["n", "s"], "additionalProperties": False, "x-guidance": {"whitespace_flexible": False}}
    prompts = prompts_of(model)
    samplings = [
        SamplingParams(temperature=1.0, seed=i, grammar=f"start: %json {json.dumps(schema)}" if i % 2 == 0 else "")
        for i in range(len(prompts))
    ]

    def run(harness: Harness) -> list[Transcript]:
        pairs = zip(prompts, samplings, strict=True)
        return harness.wait(*[harness.submit(p, 50, sampling=s, stop_token_ids=(EOS,)) for p, s in pairs])

    with Harness(model, tokenizer_file=tokenizer_file) as harness:
        plain = run(harness)
    texts = {i + 1: prompts[i] + found.token_ids for i, found in enumerate(plain)}
    with guessing(model, oracle(texts, right, wrong), tokenizer_file=tokenizer_file) as harness:
        drafted = run(harness)
        counts = accepted(harness)
        harness.assert_quiet()
    for i, (one, other) in enumerate(zip(plain, drafted, strict=True)):
        assert (other.token_ids, other.finish) == (one.token_ids, one.finish)
        if i % 2 == 0 and other.finish == Finish.STOP:
            text = Tokenizer.from_file(str(tokenizer_file)).decode(other.token_ids)
            assert set(json.loads(text)) == {"n", "s"}
    assert counts.drafts > 0
    assert counts.accepted > 0 if right else counts.accepted < 0.2 * counts.tokens


# -- who drafts, and when ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sampling", "drafts"),
    [
        (GREEDY, True),
        (SamplingParams(temperature=1.0, logprobs=2), True),
        (SamplingParams(presence_penalty=0.5), False),
        (SamplingParams(repetition_penalty=1.1), False),
        (SamplingParams(logit_bias=((1, 2.0),)), False),
        (SamplingParams(grammar="root ::= 'a'"), True),
    ],
)
def test_what_keeps_state_does_not_draft(sampling: SamplingParams, drafts: bool) -> None:
    assert may_draft(sampling) == drafts


@pytest.mark.usefixtures("eager")
def test_penalized_sequences_beside_drafting_ones(model: Any) -> None:
    prompts = prompts_of(model)
    penalized = SamplingParams(repetition_penalty=1.3, frequency_penalty=0.2)
    samplings = [penalized if i % 2 else GREEDY for i in range(len(prompts))]

    def texts(**sizes: Any) -> list[Transcript]:
        with Harness(model, **sizes) as harness:
            ids = [harness.submit(p, 30, sampling=s) for p, s in zip(prompts, samplings, strict=True)]
            return harness.wait(*ids)

    plain, drafted = texts(), texts(draft_tokens=WIDTH)
    assert [t.token_ids for t in drafted] == [t.token_ids for t in plain]


class Scheduler:
    """What a Drafter asks of one."""

    class Model:
        def __init__(self, row_us: float) -> None:
            self.row_us = row_us

        def predict_us(self, *, decode_rows: float, decode_context: float) -> float:
            return 10_000.0 + self.row_us * decode_rows

    def __init__(self, row_us: float) -> None:
        self.model = self.Model(row_us)

    def cost_model(self) -> Any:
        return self.model


def width_of(row_us: float, rate: float, rows: int = 1) -> int:
    drafter = Drafter(Scheduler(row_us), tokens_max=8)  # type: ignore[arg-type]
    drafter._rows = rows
    return drafter._width(rate, 0, 0.0, 100)[0]


def test_the_width_follows_what_it_costs_and_what_comes_true() -> None:
    assert width_of(100, 0.9) == 8  # rows cost next to nothing
    assert 1 <= width_of(1_500, 0.7) <= 4
    assert width_of(4_000, 0.3) == 0  # a row costs more than it brings
    assert width_of(100, 0.01) == 0
    assert width_of(10_000, 0.9, rows=32) == 0  # the device computes all the time: only sure tokens would pay
    widths = [width_of(1_000, rate / 10) for rate in range(11)]
    assert widths == sorted(widths)


def test_a_rate_forgets_and_begins_with_what_others_showed() -> None:
    rate = Rate()
    assert rate.mean(0.7, 4.0) == 0.7
    for _ in range(50):
        rate.saw(0, missed=True)
    assert rate.mean(0.7, 4.0) < 0.1
    for _ in range(100):
        rate.saw(6, missed=False)
    assert rate.mean(0.7, 4.0) > 0.9


def test_drafting_stops_where_nothing_comes_true(qwen: Any) -> None:
    """A drafter of rows that cost something gives up on a text of which nothing repeats, but for a probe."""
    with Harness(qwen, draft_tokens=WIDTH, blocks=200) as harness:
        drafter = harness.engine._drafter
        drafter._look_up = lambda context: (  # type: ignore[method-assign]
            setattr(drafter, "_steps_left", 100),
            setattr(drafter, "_costs", [1.0 + 0.2 * width for width in range(80)]),
        )
        prompt = repeating(2, qwen.config.vocab_size, 80)
        harness.wait(harness.submit(prompt, 120, sampling=SamplingParams(temperature=50.0, seed=1)))
        assert accepted(harness).tokens < 40


def test_a_sequence_numbered_0_is_one_like_others(qwen: Any) -> None:
    prompt = repeating(0, qwen.config.vocab_size)
    for width in (0, WIDTH):
        with Harness(qwen, draft_tokens=width) as harness:
            harness._next_id = 0
            texts = harness.run(prompt, prompt, tokens_max=9)
            assert texts[0] == texts[1] and len(texts[0]) == 9


def test_sources_and_off_never_draft(qwen: Any) -> None:
    prompt = repeating(0, qwen.config.vocab_size)
    with Harness(qwen) as harness:
        harness.run(prompt, tokens_max=30)
        assert accepted(harness) == DraftStats() and not harness.engine._drafter._texts
    drafter = Drafter(harness.built.scheduler, tokens_max=8)
    ids = np.array(prompt, np.uint32)
    drafter.opened(EngineRequest(1, ids, len(prompt), 4, handover=Handover.SOURCE))
    assert not drafter._texts


@pytest.mark.usefixtures("eager")
def test_it_forgets_those_that_ended(qwen: Any) -> None:
    with Harness(qwen, draft_tokens=WIDTH) as harness:
        ids = [harness.submit(prompt, 30) for prompt in prompts_of(qwen)]
        harness.engine.abort(ids[2])
        harness.wait(*ids)
        assert "drafted tokens came true" in explained_once(harness, qwen)
        harness.assert_quiet()
        assert not harness.engine._drafter._texts and not harness.engine._drafter._touched


def explained_once(harness: Harness, model: Any) -> str:
    """What `explain` says of a sequence that drafted, while it runs."""
    sequence_id = harness.submit(repeating(4, model.config.vocab_size), 200)
    harness.wait_for(lambda: len(harness.transcripts[sequence_id].token_ids) > 60, "tokens")
    answer = harness.engine.explain().result(30)
    harness.engine.abort(sequence_id)
    harness.wait(sequence_id)
    return " ".join(one.explanation["text"] for one in answer.sequences)


@pytest.mark.usefixtures("eager")
def test_a_long_prompt_is_indexed_in_parts(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenrelay.runtime.drafts.INDEXED_MAX", 16)
    prompt = repeating(1, qwen.config.vocab_size, 90)
    with Harness(qwen) as harness:
        plain = harness.run(prompt, tokens_max=40)
    with Harness(qwen, draft_tokens=WIDTH) as harness:
        assert harness.run(prompt, tokens_max=40) == plain
        assert accepted(harness).drafts > 0
