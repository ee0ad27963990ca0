"""Sampling through the engine: reproducible whatever happens around it, and every parameter does what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import VOCAB, Harness, plain_greedy, plain_logits, prompt_of

from tokenrelay.kernels import ops
from tokenrelay.kernels.batch import SamplingBatch
from tokenrelay.runtime.requests import Finish, SamplingParams

WARM = SamplingParams(temperature=1.0, seed=7)


def test_a_seed_gives_the_same_text_alone_in_a_crowd_in_chunks_and_under_pressure(model: Any) -> None:
    prompt = prompt_of(1, 20)
    with Harness(model) as harness:
        (alone,) = harness.run(prompt, tokens_max=30, sampling=WARM)
    assert alone != plain_greedy(model, prompt, 30)
    with Harness(model, chunk_tokens=3, step_tokens=8) as harness:
        mine = harness.submit(prompt, 30, sampling=WARM)
        for seed in range(6):
            harness.submit(prompt_of(seed + 2, 15), 30, sampling=SamplingParams(temperature=1.3, seed=seed))
        assert harness.wait(mine)[0].token_ids == alone
        harness.wait()
    with Harness(model, slots=4, blocks=11) as harness:
        crowd = [harness.submit(prompt_of(seed, 20), 30, sampling=WARM) for seed in (2, 3, 4)]
        mine = harness.submit(prompt, 30, sampling=WARM)
        assert harness.wait(mine)[0].token_ids == alone
        harness.wait(*crowd)
        assert harness.stats[-1].preemptions > 0
    with Harness(model) as harness:  # another worker goes on
        (transcript,) = harness.wait(harness.submit(prompt, 30, emitted=alone[:11], sampling=WARM))
        assert transcript.token_ids == alone[11:]


def plain_sampled(model: Any, prompt: list[int], tokens: int, params: SamplingParams) -> list[int]:
    """The plain loop, each token drawn under the key (seed, choice, output position)."""
    output: list[int] = []
    for position in range(tokens):
        batch = SamplingBatch(
            temperature=torch.tensor([params.temperature]),
            top_p=torch.tensor([params.top_p]),
            top_k=torch.tensor([params.top_k], dtype=torch.int32),
            min_p=torch.tensor([params.min_p]),
            seed=torch.tensor([params.seed - (params.seed >> 63 << 64)]),
            choice=torch.tensor([params.choice], dtype=torch.int32),
            position=torch.tensor([position]),
        )
        output.append(int(ops.sample(plain_logits(model, prompt + output)[None], batch)[0]))
    return output


def test_each_token_is_drawn_under_its_own_key(qwen: Any) -> None:
    """And one slot serves sequences that ask for different things, one after the other."""
    wanted = [
        SamplingParams(),
        SamplingParams(temperature=0.9, seed=2**63 + 11, choice=3, top_p=0.9),
        SamplingParams(temperature=1.4, seed=5, top_k=20, min_p=0.01),
        SamplingParams(),
    ]
    prompts = [prompt_of(n, 9 + n) for n in range(len(wanted))]
    with Harness(qwen, slots=1) as harness:
        for prompt, params in zip(prompts, wanted, strict=True):
            assert harness.run(prompt, tokens_max=12, sampling=params) == [plain_sampled(qwen, prompt, 12, params)]


def test_choices_and_seeds_differ(qwen: Any) -> None:
    prompt = prompt_of(1, 10)
    params = [SamplingParams(temperature=1.0, seed=s, choice=c) for s, c in ((1, 0), (1, 1), (2, 0), (2**64 - 1, 0))]
    with Harness(qwen) as harness:
        ids = [harness.submit(prompt, 20, sampling=p) for p in params]
        texts = [tuple(t.token_ids) for t in harness.wait(*ids)]
        assert len(set(texts)) == len(texts)


def test_greedy_and_sampled_rows_share_a_step(qwen: Any) -> None:
    prompt = prompt_of(1, 10)
    with Harness(qwen) as harness:
        greedy = harness.submit(prompt, 20)
        harness.submit(prompt, 20, sampling=WARM)
        top_1 = harness.submit(prompt, 20, sampling=SamplingParams(temperature=2.0, top_k=1, seed=3))
        harness.wait()
        expected = plain_greedy(qwen, prompt, 20)
        assert harness.transcripts[greedy].token_ids == harness.transcripts[top_1].token_ids == expected


def test_logprobs_are_the_models_own(model: Any) -> None:
    prompt = prompt_of(5, 19)
    with Harness(model) as harness:
        plain = harness.submit(prompt, 6)
        asked = harness.submit(prompt, 6, sampling=SamplingParams(logprobs=4, logit_bias=((9, 5.0),), temperature=0.7))
        chosen_only = harness.submit(prompt, 6, sampling=SamplingParams(logprobs=1))
        harness.wait()
        assert harness.transcripts[plain].logprobs == []
        for sequence, k in ((asked, 3), (chosen_only, 0)):
            transcript = harness.transcripts[sequence]
            assert len(transcript.logprobs) == len(transcript.token_ids) == 6
            for position, (token, entry) in enumerate(zip(transcript.token_ids, transcript.logprobs, strict=True)):
                expected = plain_logits(model, [*prompt, *transcript.token_ids[:position]]).log_softmax(-1)
                assert entry.logprob == pytest.approx(float(expected[token]), abs=1e-4)
                top = expected.topk(k)
                assert list(entry.top_token_ids) == top.indices.tolist()
                assert list(entry.top_logprobs) == pytest.approx(top.values.tolist(), abs=1e-4)


def penalised(model: Any, prompt: list[int], tokens: int, params: SamplingParams) -> list[int]:
    """The plain loop with penalties written down as their definitions."""
    output: list[int] = []
    for _ in range(tokens):
        logits = plain_logits(model, prompt + output).clone()
        for token in set(prompt + output):
            value = float(logits[token])
            logits[token] = value / params.repetition_penalty if value > 0 else value * params.repetition_penalty
        for token in set(output):
            logits[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
        for token, bias in params.logit_bias:
            logits[token] += bias
        if len(output) < params.tokens_min:
            logits[list(params.end_token_ids)] = float("-inf")
        output.append(int(logits.argmax()))
    return output


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(repetition_penalty=1.8),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.7),
        SamplingParams(repetition_penalty=0.8, presence_penalty=-1.0, logit_bias=((5, 3.0), (6, -100.0))),
        SamplingParams(logit_bias=((11, 4.5), (300, 2.0))),
    ],
    ids=["repetition", "presence+frequency", "all", "bias"],
)
def test_penalties_and_bias_follow_their_definitions(qwen: Any, params: SamplingParams) -> None:
    prompt = prompt_of(8, 24)
    expected = penalised(qwen, prompt, 24, params)
    assert expected != plain_greedy(qwen, prompt, 24)
    with Harness(qwen, slots=4, blocks=11) as harness:  # with preemption on top
        mine = harness.submit(prompt, 24, sampling=params)
        others = [harness.submit(prompt_of(seed, 20), 30) for seed in range(3)]
        assert harness.wait(mine)[0].token_ids == expected
        harness.wait(*others)
        again = harness.submit(prompt, 24, sampling=params, emitted=expected[:9])  # the slot has a past
        assert harness.wait(again)[0].token_ids == expected[9:]


def test_end_tokens_are_masked_until_tokens_min(qwen: Any) -> None:
    prompt = prompt_of(2, 14)
    end = (plain_greedy(qwen, prompt, 1)[0], 2)
    params = SamplingParams(tokens_min=5, end_token_ids=end)
    expected = penalised(qwen, prompt, 30, params)
    assert not set(expected[:5]) & set(end)
    with Harness(qwen) as harness:
        bare = harness.submit(prompt, 30, stop_token_ids=end)
        held = harness.submit(prompt, 30, stop_token_ids=end, sampling=params)
        harness.wait()
        assert harness.transcripts[bare].token_ids == [end[0]]
        got = harness.transcripts[held]
        stop = next((i for i, token in enumerate(expected) if token in end), None)
        if stop is None:
            assert got.token_ids == expected and got.finish is Finish.LENGTH
        else:
            assert got.token_ids == expected[: stop + 1] and got.finish is Finish.STOP


def test_samples_follow_the_distribution(qwen: Any) -> None:
    """Chi-square over the likeliest tokens: 600 seeds at one position."""
    prompt, draws = prompt_of(4, 6), 600
    with Harness(qwen, slots=64, step_tokens=512) as harness:
        ids = [harness.submit(prompt, 1, sampling=SamplingParams(temperature=1.5, seed=s)) for s in range(draws)]
        got = torch.tensor([t.token_ids[0] for t in harness.wait(*ids)])
    probabilities = (plain_logits(qwen, prompt) / 1.5).softmax(-1)
    likely = probabilities.topk(8)
    expected = torch.cat([likely.values, 1 - likely.values.sum(0, keepdim=True)]) * draws
    counts = torch.bincount(got, minlength=VOCAB)[likely.indices].float()
    counts = torch.cat([counts, (draws - counts.sum()).unsqueeze(0)])
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 26.1, "8 degrees of freedom: p < 0.001"
