"""Outputs that must follow a grammar: every one does, whatever the model would say, and nobody else notices."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from checkpoints import EOS, VOCAB, write_tokenizer
from guesses import guessing
from harness import Harness, prompt_of
from tokenizers import Tokenizer

from tokenrelay.base.errors import InvalidRequest
from tokenrelay.runtime.executor.grammars import GrammarAdmission, GrammarSource, GrammarState
from tokenrelay.runtime.requests import Finish, SamplingParams

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "size": {"enum": [1, 2, 3]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
JSON = f"start: %json {json.dumps({**SCHEMA, 'x-guidance': {'whitespace_flexible': False}})}"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder / "tokenizer.json"


def text_of(tokenizer_file: Path, token_ids: list[int]) -> str:
    return str(Tokenizer.from_file(str(tokenizer_file)).decode(token_ids))


def following(grammar: str, seed: int = 0, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, seed=seed, grammar=grammar, end_token_ids=(EOS,), **fields)


def test_every_output_follows_its_grammar_and_others_do_not_notice(model: Any, tokenizer_file: Path) -> None:
    free = SamplingParams(temperature=1.0, seed=9)
    with Harness(model) as harness:
        (alone,) = harness.run(prompt_of(1, 20), tokens_max=30, sampling=free)
    with Harness(model, tokenizer_file=tokenizer_file) as harness:
        other = harness.submit(prompt_of(1, 20), 30, sampling=free)
        choices = [
            harness.submit(prompt_of(2, 9), 12, sampling=following('start: "yes" | "no"', seed), stop_token_ids=(EOS,))
            for seed in range(4)
        ]
        objects = [
            harness.submit(prompt_of(3, 9), 200, sampling=following(JSON, seed, logprobs=2), stop_token_ids=(EOS,))
            for seed in range(4)
        ]
        assert harness.wait(other)[0].token_ids == alone
        for transcript in harness.wait(*choices):
            assert transcript.finish == Finish.STOP
            assert text_of(tokenizer_file, transcript.token_ids) in ("yes", "no")
        texts = [text_of(tokenizer_file, transcript.token_ids) for transcript in harness.wait(*objects)]
        for text in texts:
            jsonschema.validate(json.loads(text), SCHEMA)
        assert len(set(texts)) > 1
        assert {transcript.finish for transcript in harness.wait(*objects)} == {Finish.STOP}


def test_another_worker_goes_on_within_the_grammar(model: Any, tokenizer_file: Path) -> None:
    asked = {"sampling": following(JSON, 5), "stop_token_ids": (EOS,)}
    with Harness(model, tokenizer_file=tokenizer_file) as harness:
        (whole,) = harness.wait(harness.submit(prompt_of(4, 9), 200, **asked))
        half = len(whole.token_ids) // 2
        (rest,) = harness.wait(harness.submit(prompt_of(4, 9), 200, emitted=whole.token_ids[:half], **asked))
    assert whole.token_ids[:half] + rest.token_ids == whole.token_ids


def test_preemption_does_not_lose_the_place(model: Any, tokenizer_file: Path) -> None:
    asked = {"sampling": following(JSON, 3), "stop_token_ids": (EOS,)}
    with Harness(model, tokenizer_file=tokenizer_file) as harness:
        (alone,) = harness.wait(harness.submit(prompt_of(5, 20), 60, **asked))
    with Harness(model, tokenizer_file=tokenizer_file, slots=4, blocks=9) as harness:
        mine = [harness.submit(prompt_of(5, 20), 60, **asked) for _ in range(4)]
        assert [one.token_ids for one in harness.wait(*mine)] == [alone.token_ids] * 4
        assert harness.stats[-1].preemptions > 0


def right(answer: list[int], known: int) -> list[int]:
    return answer[known:]


def wrong_soon(answer: list[int], known: int) -> list[int]:
    """Two tokens that come true, then one that may not come there."""
    return [*answer[known : known + 2], EOS, 7, 8]


def wrong_at_once(answer: list[int], known: int) -> list[int]:
    return [(answer[known] + 1) % VOCAB, *answer[known + 1 :]] if known < len(answer) else [3, 4]


def past_the_end(answer: list[int], known: int) -> list[int]:
    return [*answer[known:], 5, 6, 7]


@pytest.mark.parametrize("guess", [right, wrong_soon, wrong_at_once, past_the_end])
def test_drafts_change_nothing_under_a_grammar(model: Any, tokenizer_file: Path, guess: Any) -> None:
    """Whatever is guessed, the text is the one without drafts; what is guessed right comes in fewer steps."""
    forms = [JSON, 'start: "yes" | "no"', JSON, JSON]
    asked = [
        {"sampling": following(form, seed, logprobs=1), "stop_token_ids": (EOS,)} for seed, form in enumerate(forms)
    ]
    with Harness(model, tokenizer_file=tokenizer_file) as harness:
        alone = harness.wait(*(harness.submit(prompt_of(n, 9), 120, **one) for n, one in enumerate(asked)))
    answers = {n: one.token_ids for n, one in enumerate(alone)}
    beside = SamplingParams(temperature=1.0, seed=9)
    ids: dict[int, int] = {}

    def draft(sequence_id: int, known: list[int]) -> list[int]:
        if sequence_id not in ids:
            return []
        return guess(answers[ids[sequence_id]], len(known) - 9)  # type: ignore[no-any-return]

    with guessing(model, draft, tokenizer_file=tokenizer_file) as harness:
        free = harness.submit(prompt_of(20, 15), 40, sampling=beside)
        for n, one in enumerate(asked):
            ids[harness.submit(prompt_of(n, 9), 120, **one)] = n
        found = harness.wait(*ids)
        (other,) = harness.wait(free)
        drafts = harness.stats[-1].drafts
        harness.assert_quiet()
    assert [one.token_ids for one in found] == list(answers.values())
    assert {one.finish for one in found} == {Finish.STOP} and other.finish == Finish.LENGTH
    assert drafts.tokens > 0 and (drafts.accepted > 20 if guess in (right, past_the_end) else True)
    assert (drafts.accepted == 0) == (guess is wrong_at_once)


def test_a_look_ahead_leaves_the_grammar_where_it_was(tokenizer_file: Path) -> None:
    source = GrammarSource(tokenizer_file, VOCAB, [EOS])
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    yes, no = tokenizer.encode("yes").ids, tokenizer.encode("no").ids
    state = GrammarState(source)
    for drafted, sampled, count in (
        ([*yes, EOS], [*yes, EOS], len(yes) + 1),  # to the end of what may come
        ([*no[:1], *yes], [yes[0], 5], 1 + 1),  # the second drafted token may not come
        ([9999 % VOCAB, *yes], [yes[0]], 1),
    ):
        state.admit(GrammarAdmission(0, 'start: "yes" | "no"', ()))
        before = state._masks[0].result(10)[0]
        state.expect(0, drafted)
        masks = state._masks[0].result(10)
        assert len(masks) == count and np.array_equal(masks[0], before)
        logits = torch.zeros(len(drafted) + 1, VOCAB)
        rows = np.arange(len(logits))
        assert state.apply(logits, rows, np.zeros(len(logits), np.int64)) == {}
        tokens = torch.tensor([*sampled, *[5] * (len(logits) - len(sampled))])
        state.advance(rows, np.zeros(len(logits), np.int64), tokens)
        (after,) = state._masks[0].result(10)
        state.admit(GrammarAdmission(1, 'start: "yes" | "no"', tuple(yes if sampled[:2] == yes else sampled[:1])))
        assert np.array_equal(after, state._masks[1].result(10)[0])
    state.close()


def test_a_grammar_that_cannot_be_used_ends_its_own_sequence_only(model: Any, tokenizer_file: Path) -> None:
    with Harness(model, tokenizer_file=tokenizer_file) as harness:
        bad = harness.submit(prompt_of(6, 9), 20, sampling=following("start: nothing"))
        left = harness.submit(prompt_of(6, 9), 20, sampling=following('start: "yes"'), emitted=[5, 6, 7])
        good = harness.submit(prompt_of(7, 9), 20, sampling=following('start: "yes"'), stop_token_ids=(EOS,))
        for transcript in harness.wait(bad, left):
            assert transcript.finish == Finish.ERROR
            assert "grammar" in transcript.terminals[0].error.message
        assert harness.wait(good)[0].finish == Finish.STOP
        after = harness.submit(prompt_of(8, 9), 4)
        assert harness.wait(after)[0].finish == Finish.LENGTH
        assert harness.fatal == []


def test_grammars_are_read_once(tokenizer_file: Path) -> None:
    source = GrammarSource(tokenizer_file, VOCAB, [EOS])
    first, second = source.matcher('start: "a"'), source.matcher('start: "a"')
    assert first.consume_token(Tokenizer.from_file(str(tokenizer_file)).token_to_id("a"))
    assert first.is_accepting()
    assert not second.is_accepting(), "each sequence has its own place"
    with pytest.raises(InvalidRequest, match="cannot be used"):
        source.matcher("start: (")


# -- random schemas ---------------------------------------------------------------------------------------------------
def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["string", "integer", "boolean", "null", "enum", "number", "pattern"]
    kind = rng.choice(kinds + ["object", "array", "anyOf"] * (2 if depth < 2 else 0))
    if kind == "object" or depth == 0:
        names = rng.sample(["a", "name", "größe", "x y", "_id", 'q"'], rng.randint(0, 3))
        required = [name for name in names if rng.random() < 0.6]
        properties = {name: random_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        least = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + 1}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(2)]}
    if kind == "enum":
        return {"enum": rng.sample(["red", 5, None, True, "ü"], 2)}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-c]{2}$", "^x+y?$", "^(ab|cd)[0-9]$"]), "maxLength": 6}
    if kind == "string":
        return {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 5)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-50, 0), "maximum": rng.randint(0, 500)}
    return {"type": kind, **({"minimum": 0, "maximum": 1} if kind == "number" else {})}


def written(state: GrammarState, tokenizer: Tokenizer, schema: dict[str, Any], rng: random.Random) -> str:
    """What a model that knows nothing writes under this schema."""
    style = {"whitespace_flexible": False}
    state.admit(GrammarAdmission(0, f"start: %json {json.dumps({**schema, 'x-guidance': style})}", ()))
    rows = np.zeros(1, np.int64)
    output: list[int] = []
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    for _ in range(2000):
        logits = torch.randn(1, VOCAB, generator=generator)
        assert state.apply(logits, rows, rows) == {}
        token = logits.argmax(-1)
        assert logits[0, token] > float("-inf"), "something may always come"
        if int(token) == EOS:
            return str(tokenizer.decode(output))
        output.append(int(token))
        state.advance(rows, rows, token)
    raise AssertionError("it does not end")


@pytest.mark.parametrize("count", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_outputs_under_random_schemas_are_valid(tokenizer_file: Path, count: int) -> None:
    rng = random.Random(count)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    state = GrammarState(GrammarSource(tokenizer_file, VOCAB, [EOS]))
    for _ in range(count):
        schema = random_schema(rng)
        text = written(state, tokenizer, schema, rng)
        jsonschema.validate(json.loads(text), schema)
    state.close()
