"""The engine against the plain loop: whatever the batch, the chunks, the cache and the pressure, the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from harness import BLOCK_TOKENS, VOCAB, Harness, plain_greedy, prompt_of

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.runtime.requests import EngineRequest, Finish, Reject, SamplingParams


def test_greedy_text_is_the_plain_loops(model: Any) -> None:
    prompts = [prompt_of(seed, length) for seed, length in enumerate((1, 5, 16, 17, 40, 70))]
    expected = [plain_greedy(model, prompt, 12) for prompt in prompts]
    with Harness(model) as harness:
        assert harness.run(*prompts, tokens_max=12) == expected
        assert [t.finish for t in harness.transcripts.values()] == [Finish.LENGTH] * len(prompts)
        harness.assert_quiet()


def test_every_chunking_and_step_size_gives_the_same_text(model: Any) -> None:
    prompts = [prompt_of(seed, length) for seed, length in enumerate((3, 33, 50, 90))]
    expected = [plain_greedy(model, prompt, 8) for prompt in prompts]
    for sizes in (
        {"chunk_tokens": 1, "step_tokens": 8},
        {"chunk_tokens": 7, "step_tokens": 11},
        {"chunk_tokens": 16, "step_tokens": 16, "slots": 2},
        {"chunk_tokens": 200, "step_tokens": 400, "steps_in_flight": 1},
    ):
        with Harness(model, **sizes) as harness:
            assert harness.run(*prompts, tokens_max=8) == expected, sizes
            harness.assert_quiet()


def test_a_cached_prefix_is_not_computed_again_and_changes_nothing(model: Any) -> None:
    shared = prompt_of(1, 3 * BLOCK_TOKENS + 5)
    turns = [shared, shared + prompt_of(2, 9), shared[:BLOCK_TOKENS] + prompt_of(3, 30), shared]
    expected = [plain_greedy(model, turn, 10) for turn in turns]
    with Harness(model) as harness:
        cached = []
        for turn, text in zip(turns, expected, strict=True):
            sequence = harness.submit(turn, 10)
            (transcript,) = harness.wait(sequence)
            assert transcript.token_ids == text
            cached.append(transcript.cached_tokens)
        # Of a fourth block the second finds what the first left unfilled; the last computes its own last token.
        assert cached == [0, len(shared), BLOCK_TOKENS, len(shared) - 1]
        assert harness.stats[-1].cached_tokens == sum(cached)
        harness.assert_quiet()
        assert {kind for kind, _ in harness.cache_events} == {"sealed"}


def test_a_conversation_computes_only_what_each_turn_appends(model: Any) -> None:
    with Harness(model, blocks=64) as harness:
        conversation, former = prompt_of(1, 40), 0
        for turn in range(5):
            (transcript,) = harness.wait(harness.submit(conversation, 20))
            assert transcript.token_ids == plain_greedy(model, conversation, 20)
            if turn:
                assert transcript.cached_tokens is not None
                # What the former turn computed: its prompt, and every output token but the last.
                assert transcript.cached_tokens == former - 1
            former = len(conversation) + 20
            conversation = [*conversation, *transcript.token_ids, *prompt_of(10 + turn, 13)]
        harness.assert_quiet()


def test_preempted_sequences_go_on_as_if_nothing_had_happened(model: Any) -> None:
    prompts = [prompt_of(seed, 20) for seed in range(4)]
    expected = [plain_greedy(model, prompt, 30) for prompt in prompts]
    with Harness(model, slots=4, blocks=11) as harness:  # four of them need 16 blocks
        assert harness.run(*prompts, tokens_max=30) == expected
        assert harness.stats[-1].preemptions > 0
        assert [t.cached_tokens for t in harness.transcripts.values()] == [0] * 4
        harness.assert_quiet()


def test_a_migrated_sequence_goes_on_where_it_was(model: Any) -> None:
    prompt = prompt_of(1, 25)
    whole = plain_greedy(model, prompt, 20)
    with Harness(model) as harness:
        (transcript,) = harness.wait(harness.submit(prompt, 20, emitted=whole[:7]))
        assert transcript.token_ids == whole[7:] and transcript.finish is Finish.LENGTH


def test_stop_tokens_end_a_sequence_with_the_stop_token_last(model: Any) -> None:
    prompt = prompt_of(3, 12)
    text = plain_greedy(model, prompt, 12)
    stop, unseen = text[5], next(token for token in range(VOCAB) if token not in text)
    with Harness(model) as harness:
        (transcript,) = harness.wait(harness.submit(prompt, 12, stop_token_ids=(unseen, stop)))
        assert transcript.token_ids == text[: text.index(stop) + 1] and transcript.finish is Finish.STOP
        harness.assert_quiet()


def test_priority_runs_first_when_there_is_room_for_one(qwen: Any) -> None:
    with Harness(qwen, slots=1) as harness:
        blocker = harness.submit(prompt_of(0, 10), 60)
        harness.wait_for(lambda: harness.transcripts[blocker].token_ids, "it runs")
        late = [harness.submit(prompt_of(n, 10), 2, priority=p) for n, p in ((1, 1), (2, 0), (3, -1))]
        harness.wait()
        order = sorted(late, key=lambda i: harness.ended_order.index(i))
        assert order == [late[2], late[1], late[0]] and harness.ended_order[0] == blocker


def test_refusals_name_their_reason(qwen: Any) -> None:
    with Harness(qwen, slots=1, waiting_max=2, context_tokens=64) as harness:
        ids = {
            "empty": harness.submit([], 4),
            "vocabulary": harness.submit([VOCAB], 4),
            "long": harness.submit(prompt_of(1, 65), 4),
            "nothing": harness.submit(prompt_of(1, 5), 0),
            "nan": harness.submit(prompt_of(1, 5), 4, sampling=SamplingParams(temperature=float("nan"))),
        }
        harness.wait()
        got = {name: harness.transcripts[i].terminals[0] for name, i in ids.items()}
        assert {name: output.reject for name, output in got.items()} == {
            "empty": Reject.INVALID,
            "vocabulary": Reject.INVALID,
            "long": Reject.PROMPT_TOO_LONG,
            "nothing": Reject.INVALID,
            "nan": Reject.INVALID,
        }
        assert all(output.finish is Finish.REJECTED and output.error is not None for output in got.values())
        running = harness.submit(prompt_of(1, 5), 50)
        harness.wait_for(lambda: harness.transcripts[running].token_ids, "it runs")
        waiting = [harness.submit(prompt_of(n, 5), 2) for n in range(3)]
        with pytest.raises(InvalidRequest):
            harness.engine.submit(EngineRequest(running, np.array([5], np.uint32), 1, 4))
        harness.wait()
        assert [harness.transcripts[i].finish for i in waiting].count(Finish.REJECTED) == 1
        harness.assert_quiet()


def test_sequence_zero_is_answered_as_any_other(model: Any) -> None:
    expected = plain_greedy(model, prompt_of(3, 9), 2)
    with Harness(model) as harness:
        harness._next_id = 0
        assert harness.submit(prompt_of(3, 9), 2) == 0
        harness.wait(0)
        assert harness.transcripts[0].token_ids == expected
