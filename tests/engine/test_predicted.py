"""Drafts from a prediction layer: the same tokens as without them, and proposals as a model by hand makes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import BLOCK_TOKENS, Harness, plain_logits
from paged import Paged
from predictions import make_prediction_checkpoint, make_steady_checkpoint

from tokenrelay.kernels import registry
from tokenrelay.libscheduler import Outcome, Plan
from tokenrelay.runtime.executor.device import DeviceExecutor
from tokenrelay.runtime.executor.graphs import Eager
from tokenrelay.runtime.executor.predictor import Proposals
from tokenrelay.runtime.models.prediction import Pairs
from tokenrelay.runtime.predicted import Pace, PredictedDrafter
from tokenrelay.runtime.requests import SamplingParams
from tokenrelay.runtime.weights.loader import load_model
from tokenrelay.runtime.weights.quantize import quantize_model

GREEDY = SamplingParams()
WIDTH = 3


class Models:
    """One checkpoint, loaded with its prediction layer and without."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.with_layer = load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS, prediction="on")
        self.plain = load_model(folder, dtype=torch.float32, block_tokens=BLOCK_TOKENS)


@pytest.fixture(scope="module")
def wild(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Random weights: next to nothing that it proposes comes true."""
    return Models(make_prediction_checkpoint(tmp_path_factory.mktemp("wild") / "model"))


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Nine of ten first tokens come true."""
    return Models(make_steady_checkpoint(tmp_path_factory.mktemp("steady") / "model", noise=0.1))


@pytest.fixture(params=["wild", "steady"])
def models(request: pytest.FixtureRequest) -> Models:
    found: Models = request.getfixturevalue(request.param)
    return found


@pytest.fixture(params=["apart", "recorded"])
def how(request: pytest.FixtureRequest) -> dict[str, Any]:
    """How steps run: operation by operation, as on a CPU, or as recordings of fixed sizes, as on a device."""
    return {"graphs": Eager()} if request.param == "recorded" else {}


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every proposal is worth its while: how fast this machine is does not matter."""

    def width(self: PredictedDrafter, rates: Sequence[float], *_: Any) -> tuple[int, float]:
        return len(rates), 1.0

    monkeypatch.setattr(PredictedDrafter, "_best_width", width)
    monkeypatch.setattr(Pace, "pays", lambda _: None)


class Heard(Harness):
    """Remembers what was proposed: sequence -> tokens known -> proposal."""

    def __init__(self, model: Any, **sizes: Any) -> None:
        super().__init__(model, **{"draft_tokens": WIDTH, **sizes})
        self.heard: dict[int, dict[int, list[int]]] = {}
        drafter = self.engine._drafter
        committed = drafter.committed

        def listen(plan: Plan, outcome: Outcome, proposals: Proposals | None = None) -> None:
            if proposals is not None:
                rows = zip(
                    proposals.sequence_ids, proposals.contexts.tolist(), proposals.token_ids.tolist(), strict=True
                )
                for sequence_id, context, tokens in rows:
                    self.heard.setdefault(sequence_id, {})[context] = [token for token in tokens if token >= 0]
            committed(plan, outcome, proposals)

        drafter.committed = listen  # type: ignore[method-assign]


def prompts_of(model: Any, count: int = 5) -> list[list[int]]:
    rng = random.Random(5)
    return [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(3, 80))] for _ in range(count)]


def said_by_hand(model: Any, text: list[int], unknown: Sequence[int] = ()) -> torch.Tensor:
    """What the layer says behind each token of `text`, all of its KV written in one go. `unknown`: tokens before
    which nothing was known, as behind a prefix that was found in the cache."""
    paged = Paged(model)
    cache = torch.full(paged.caches[0].shape, float("nan"))
    sequence = paged.add(text)
    token_ids, batch, _ = paged.batch({sequence: len(text)})
    hidden = model.hidden(token_ids, batch, [*paged.caches, cache])
    before = torch.cat((torch.zeros(1, hidden.shape[1]), hidden[:-1]))
    before[list(unknown)] = 0.0
    pairs = Pairs(before, model.embed(token_ids), batch.positions, batch.cache_slots, torch.arange(len(text)))
    rows = batch.__class__(
        block_table=paged.block_table,
        slots=batch.slots.repeat(len(text)),
        starts=torch.arange(len(text), dtype=torch.int32),
        lengths=torch.ones(len(text), dtype=torch.int32),
        offsets=torch.arange(len(text) + 1, dtype=torch.int32),
        positions=batch.positions,
        cache_slots=batch.cache_slots,
        decodes=len(text),
        context_max=len(text),
    )
    logits: torch.Tensor = model.head(model.prediction(pairs, model.cos_sin, rows, cache))
    return logits


SAMPLINGS = {
    "greedy": GREEDY,
    "sampled": SamplingParams(temperature=0.7, top_k=8, seed=5),
    "logprobs": SamplingParams(logprobs=3),
    "late_end": SamplingParams(tokens_min=7, end_token_ids=(1, 2)),
}


@pytest.mark.parametrize("name", SAMPLINGS)
@pytest.mark.usefixtures("eager")
def test_the_text_is_that_of_a_run_without_drafts(models: Models, name: str, how: dict[str, Any]) -> None:
    sampling, prompts = SAMPLINGS[name], prompts_of(models.plain)
    with Harness(models.plain) as harness:
        before = harness.wait(*[harness.submit(prompt, 40, sampling=sampling) for prompt in prompts])
    with Harness(models.with_layer, **how, draft_tokens=WIDTH) as harness:
        after = harness.wait(*[harness.submit(prompt, 40, sampling=sampling) for prompt in prompts])
        drafts = harness.engine.stats.drafts
        harness.assert_quiet()
    for one, other in zip(before, after, strict=True):
        assert other.token_ids == one.token_ids and other.finish == one.finish
        assert len(other.logprobs) == len(one.logprobs)
    assert drafts.proposer == "mtp" and drafts.drafts > 20


@pytest.mark.usefixtures("eager")
def test_recorded_steps_propose_what_others_do(models: Models) -> None:
    """Drawn tokens, one sequence at a time, so that where a block ends there is a step without drafts: both kinds are
    recorded. When a draft comes depends on how steps overlap, what is proposed behind a text does not."""
    prompts, drawn = prompts_of(models.plain), SamplingParams(temperature=0.7, top_k=8, seed=5)
    outputs, heard = [], []
    for graphs in (None, Eager()):
        with Heard(models.with_layer, graphs=graphs) as harness:
            outputs.append([harness.run(prompt, tokens_max=40, sampling=drawn) for prompt in prompts])
            executor, steps = harness.engine._executor, harness.engine.stats.steps
            harness.assert_quiet()
        heard.append(harness.heard)
    assert outputs[0] == outputs[1]
    for sequence_id, proposed in heard[0].items():
        both = proposed.keys() & heard[1][sequence_id].keys()
        assert len(both) >= 5
        for context in both:
            pairs = zip(proposed[context], heard[1][sequence_id][context], strict=False)  # as far as a block went
            assert all(one == other for one, other in pairs), (sequence_id, context)
    assert isinstance(executor, DeviceExecutor)
    stats = executor.captures.stats
    assert stats.refused == 0 and stats.replays >= 0.7 * steps
    assert {group_max for _, group_max in stats.recorded} == {1, 1 + WIDTH}


@pytest.mark.usefixtures("eager")
def test_most_of_a_steady_models_proposals_come_true(steady: Models, how: dict[str, Any]) -> None:
    prompts = prompts_of(steady.plain)
    with Harness(steady.plain) as harness:
        plain = harness.run(*prompts, tokens_max=40)
        steps = harness.engine.stats.steps
    with Harness(steady.with_layer, **how, draft_tokens=WIDTH) as harness:
        assert harness.run(*prompts, tokens_max=40) == plain
        drafts = harness.engine.stats.drafts
        assert harness.engine.stats.steps < 0.7 * steps
    assert drafts.accepted > 0.6 * drafts.tokens


@pytest.mark.usefixtures("eager")
def test_proposals_are_those_of_the_layer_by_hand(models: Models, how: dict[str, Any]) -> None:
    """At every token, whatever was drafted and rejected before it, with prompts in chunks."""
    prompts = prompts_of(models.plain)
    with Heard(models.with_layer, **how, step_tokens=48, chunk_tokens=23) as harness:
        outputs = harness.run(*prompts, tokens_max=50)
        heard = dict(harness.heard)
        rejected = harness.engine.stats.drafts
    assert rejected.tokens > rejected.accepted
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        text, proposed = prompt + output, heard[i + 1]
        logits = said_by_hand(models.with_layer, text)
        for context, tokens in proposed.items():
            if context <= len(text):
                assert tokens[0] == int(logits[context - 1].argmax()), f"sequence {i + 1} behind {context} tokens"
                # A draft's row may have had the next block already.
                assert min(WIDTH, BLOCK_TOKENS - (context - 1) % BLOCK_TOKENS) <= len(tokens) <= WIDTH
        assert len(proposed) >= (len(output) - 1) / (1 + WIDTH) * 0.8


@pytest.mark.usefixtures("eager")
def test_the_second_proposal_is_made_of_the_first(wild: Models, how: dict[str, Any]) -> None:
    """The layer asked again: with what stands behind its own answer, and the token that it proposed."""
    model, prompt = wild.with_layer, prompts_of(wild.plain)[0]
    with Heard(model, **how) as harness:
        harness.run(prompt, tokens_max=4)
        first = harness.heard[1][len(prompt) + 1]
    text = prompt + harness.transcripts[1].token_ids[:1]
    paged = Paged(model)
    cache = torch.full(paged.caches[0].shape, float("nan"))
    sequence = paged.add([*text, *first])
    token_ids, batch, _ = paged.batch({sequence: len(text) + len(first)})
    hidden = model.hidden(token_ids[: len(text) - 1], cut(batch, len(text) - 1), [*paged.caches, cache])
    carried = torch.cat((torch.zeros(1, hidden.shape[1]), hidden))
    for i in range(len(text) + len(first) - 1):
        entry = slice(i, i + 1)
        pairs = Pairs(
            carried[entry],
            model.embed(token_ids[entry]),
            batch.positions[entry],
            batch.cache_slots[entry],
            torch.zeros(1, dtype=torch.int64),
        )
        y = model.prediction(pairs, model.cos_sin, cut(batch, 1, start=i), cache)
        if i >= len(text) - 1:
            assert int(model.head(y).argmax()) == first[i - len(text) + 1]
            carried = torch.cat((carried, y))


def cut(batch: Any, length: int, start: int = 0) -> Any:
    """A row of so many tokens of the batch's only sequence."""
    return batch.__class__(
        block_table=batch.block_table,
        slots=batch.slots,
        starts=torch.tensor([start], dtype=torch.int32),
        lengths=torch.tensor([length], dtype=torch.int32),
        offsets=torch.tensor([0, length], dtype=torch.int32),
        positions=batch.positions[start : start + length],
        cache_slots=batch.cache_slots[start : start + length],
        decodes=int(length == 1),
        context_max=start + length,
    )


@pytest.mark.usefixtures("eager")
def test_blocks_that_are_found_in_the_cache_hold_the_layers_kv(models: Models, how: dict[str, Any]) -> None:
    """A next turn: its prompt is the first one's text. What it proposes is what the layer says by hand, but that one
    token, the first behind the cached ones, has nothing before it."""
    model, prompt = models.with_layer, prompts_of(models.plain)[1]
    with Heard(model, **how) as harness:
        (output,) = harness.run(prompt, tokens_max=50)
        turn = prompt + output + [7, 8, 9]
        second = harness.submit(turn, 20)
        (transcript,) = harness.wait(second)
        heard = harness.heard[second]
    cached = transcript.cached_tokens
    assert cached is not None and cached > len(prompt)
    logits = said_by_hand(model, turn + transcript.token_ids, unknown=[cached])
    checked = [context for context in heard if context <= len(turn) + 20]
    assert checked
    for context in checked:
        assert heard[context][0] == int(logits[context - 1].argmax())


@pytest.mark.usefixtures("eager")
def test_blocks_that_come_back_from_host_memory_hold_the_layers_kv(wild: Models, how: dict[str, Any]) -> None:
    """A pool that has forgotten the first prompt when it comes again; what it proposes then is as when it was new, but
    for the one token behind the loaded blocks."""
    model, vocab = wild.with_layer, wild.plain.config.vocab_size
    prompts = [[(start + i * i) % vocab for i in range(5 * BLOCK_TOKENS + 3)] for start in (3, 50, 90, 70)]
    block_bytes = model.config.kv_layers * model.config.kv_layout.bytes_per_block(torch.float32)
    sizes = {"blocks": 14, "slots": 2, "context_tokens": 7 * BLOCK_TOKENS, "host_memory_bytes": 64 * block_bytes}
    with Heard(model, **how, **sizes) as harness:
        first = [harness.run(prompt, tokens_max=12)[0] for prompt in prompts]
        assert [harness.run(prompt, tokens_max=12)[0] for prompt in prompts] == first
        assert harness.engine.stats.host.loads > 0
        for i, prompt in enumerate(prompts):
            cached = harness.transcripts[len(prompts) + 1 + i].cached_tokens
            assert cached
            logits = said_by_hand(model, prompt + first[i], unknown=[cached])
            heard = harness.heard[len(prompts) + 1 + i]
            assert heard
            for context, tokens in heard.items():
                assert tokens[0] == int(logits[context - 1].argmax()) or context > len(prompt) + 12
        harness.assert_quiet()


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("form", ["bfloat16", "int8", "deterministic"])
def test_other_forms_of_weights(steady: Models, form: str) -> None:
    """Packed, quantized; and with the bits of a run without drafts in bfloat16 where that is promised."""
    prompts = prompts_of(steady.plain, 3)

    def model(prediction: Any) -> Any:
        dtype = torch.float32 if form == "int8" else torch.bfloat16
        found = load_model(steady.folder, dtype=dtype, block_tokens=BLOCK_TOKENS, prediction=prediction)
        if form == "int8":
            quantize_model(found, "int8")
        return found

    registry.deterministic(form == "deterministic")
    try:
        with Harness(model("off")) as harness:
            plain = harness.run(*prompts, tokens_max=40)
        with Harness(model("on"), draft_tokens=WIDTH) as harness:
            drafted = harness.run(*prompts, tokens_max=40)
            drafts = harness.engine.stats.drafts
            harness.assert_quiet()
    finally:
        registry.deterministic(False)
    assert drafts.accepted > 0.5 * drafts.tokens
    if form == "deterministic":
        assert drafted == plain
    else:  # the number of rows may tip a tie
        assert [output[:3] for output in drafted] == [output[:3] for output in plain]


@pytest.mark.usefixtures("eager")
def test_preemption_and_a_full_pool(models: Models, how: dict[str, Any]) -> None:
    """Each is admitted with three blocks and needs seven of sixteen."""
    prompts = [prompt[:40] for prompt in prompts_of(models.plain, 12) if len(prompt) >= 40][:6]
    with Harness(models.plain) as harness:
        plain = harness.run(*prompts, tokens_max=60)
    with Heard(models.with_layer, **how, blocks=16, context_tokens=112) as harness:
        assert harness.run(*prompts, tokens_max=60) == plain
        assert harness.engine.stats.preemptions > 0
        harness.assert_quiet()


@pytest.mark.usefixtures("eager")
def test_aborts_in_the_middle_of_drafts(steady: Models, how: dict[str, Any]) -> None:
    prompts = prompts_of(steady.plain)
    with Harness(steady.plain) as harness:
        plain = harness.run(*prompts, tokens_max=60)
    with Harness(steady.with_layer, **how, draft_tokens=WIDTH) as harness:
        ids = [harness.submit(prompt, 60) for prompt in prompts]
        transcript = harness.transcripts[ids[0]]
        harness.wait_for(lambda: len(transcript.token_ids) >= 5 or transcript.terminals, "some tokens")
        for sequence_id in ids[::2]:
            harness.engine.abort(sequence_id)
        for i, found in enumerate(harness.wait(*ids)):
            assert found.token_ids == plain[i][: len(found.token_ids)]
        harness.assert_quiet()
        drafter = harness.engine._drafter
        assert isinstance(drafter, PredictedDrafter) and not drafter._texts and not drafter._proposed


@pytest.mark.usefixtures("eager")
def test_sampled_tokens_have_the_models_distribution(steady: Models) -> None:
    """Of 900 answers of three tokens, their first two counted beside the model's own probabilities: the second one was
    drafted by the layer, which samples with the random number of the place, and the draft was kept on equality."""
    prompt, top, seeds = prompts_of(steady.plain)[0][:19], 3, 900

    def likely(token_ids: list[int]) -> tuple[list[int], torch.Tensor]:
        logits, ids = plain_logits(steady.plain, token_ids).topk(top)
        return ids.tolist(), torch.softmax(logits, 0)

    firsts, first_odds = likely(prompt)
    odds = {}
    for first, chance in zip(firsts, first_odds.tolist(), strict=True):
        seconds, second_odds = likely([*prompt, first])
        odds |= {(first, second): chance * p for second, p in zip(seconds, second_odds.tolist(), strict=True)}
    found = dict.fromkeys(odds, 0)
    with Harness(steady.with_layer, draft_tokens=WIDTH, slots=32, blocks=200, steps_in_flight=1) as harness:
        samplings = [SamplingParams(temperature=1.0, top_k=top, seed=seed) for seed in range(seeds)]
        ids = [harness.submit(prompt, 3, sampling=sampling) for sampling in samplings]
        for transcript in harness.wait(*ids):
            found[tuple(transcript.token_ids[:2])] += 1  # type: ignore[index]
        drafts = harness.engine.stats.drafts
    assert drafts.drafts > seeds * 0.9 and 0.1 * drafts.tokens < drafts.accepted < 0.95 * drafts.tokens
    surprise = sum((found[pair] - seeds * p) ** 2 / (seeds * p) for pair, p in odds.items())
    assert surprise < 26.1  # chi-square, 8 degrees of freedom, one in a thousand


class Untimed(Pace):
    """Says nothing of this machine's speed."""

    def pays(self) -> bool | None:
        return None


# -- when it pays -----------------------------------------------------------------------------------------------------
def costing(harness: Harness, row: float) -> PredictedDrafter:
    """Steps whose every drafted row costs that part of a step."""
    drafter = harness.engine._drafter
    assert isinstance(drafter, PredictedDrafter)

    def look_up(_: int) -> None:
        drafter._steps_left, drafter._costs = 100, [1.0 + row * width for width in range(80)]

    drafter._look_up = look_up  # type: ignore[method-assign]
    drafter._pace = Untimed()
    return drafter


def test_drafting_stops_where_nothing_comes_true_and_its_kv_goes_on(wild: Models) -> None:
    """Proposals of probes, much later, are right: entries are written whether anybody is asked or not."""
    model, prompt = wild.with_layer, prompts_of(wild.plain)[2]
    with Heard(model, blocks=64) as harness:
        costing(harness, 0.2)
        (output,) = harness.run(prompt, tokens_max=300)
        drafts, heard = harness.engine.stats.drafts, harness.heard[1]
    assert drafts.tokens < 60
    late = [context for context in heard if context > len(prompt) + 200]
    assert 1 <= len(late) < 20
    logits = said_by_hand(model, prompt + output)
    assert all(heard[context][0] == int(logits[context - 1].argmax()) for context in late if context <= 360)


def test_probes_find_out_that_it_pays(steady: Models) -> None:
    """After a text of which it knew nothing; then drafting begins again."""
    with Heard(steady.with_layer, blocks=64) as harness:
        drafter = costing(harness, 0.1)
        for rate in drafter._rates:
            rate.hits, rate.trials = 0.0, 64.0  # as after a text that it knew nothing of
        prompt = prompts_of(steady.plain)[2]
        harness.run(prompt, tokens_max=700)
        drafts = harness.engine.stats.drafts
        assert drafter._rates[0].hits > 5
    assert drafts.accepted > 20


def test_the_layers_time_counts(steady: Models) -> None:
    """Asked for only where it pays with its time; what is there is drafted where its rows pay."""
    drafter = costing(Harness(steady.with_layer, draft_tokens=WIDTH), 0.05)
    drafter._alone_us = 1000.0

    def widths(guessing_us: float) -> tuple[int, int]:
        drafter._times.extend([guessing_us] * 15)
        drafter._ask([None])
        return drafter._predictor.width, drafter._best_width(drafter._chances(None), 0, 0.0, 10)[0]

    assert widths(20.0) == (3, 3)
    assert widths(600.0) == (1, 3)
    assert widths(900.0) == (0, 3)


def test_off_writes_its_kv_and_proposes_nothing(steady: Models) -> None:
    """As a prefill worker of drafting decode workers does."""
    prompt = prompts_of(steady.plain)[0]
    with Heard(steady.with_layer, draft_tokens=0) as harness:
        harness.run(prompt, tokens_max=20)
        drafts = harness.engine.stats.drafts
        assert (drafts.drafts, drafts.proposer, harness.heard) == (0, "", {})
    with Harness(steady.plain, draft_tokens=2) as harness:
        harness.run(prompt, tokens_max=5)
        assert harness.engine.stats.drafts.proposer == "ngram"


def test_what_was_measured_beats_what_is_modelled(steady: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("tokenrelay.runtime.predicted.time.monotonic", lambda: now_s)
    pace = Pace()

    def steps(seconds: float, tokens: int, drafted: bool | None, count: int = 8, rows: int = 1) -> None:
        nonlocal now_s
        for i in range(count):
            now_s += seconds * (50 if i == 2 else 1)  # a neighbour's turn
            pace.saw(rows, tokens, drafted)

    steps(0.010, 1, False)
    assert pace.pays() is None
    steps(0.015, 2, True)
    assert pace.pays() is True
    steps(0.019, 2, True, count=15)
    steps(0.010, 1, False, count=15)
    assert pace.pays() is True  # 105 tokens a second beside 100
    steps(0.020, 2, True, count=15)
    assert pace.pays() is False
    steps(1.0, 1, None)  # prompts
    assert pace.pays() is False
    steps(0.010, 4, False, rows=4)
    assert pace.pays() is None, "another number of sequences is another matter"


@pytest.mark.parametrize("pays", [True, False])
def test_drafting_begins_and_ends_by_what_was_measured(steady: Models, pays: bool) -> None:
    """Against a model of costs that says the opposite; probes and rests go on."""
    prompt = prompts_of(steady.plain)[1]
    with Heard(steady.with_layer, blocks=64) as harness:
        drafter = costing(harness, 5.0 if pays else 0.0)
        drafter._pace.pays = lambda: pays  # type: ignore[method-assign]
        harness.run(prompt, tokens_max=600)
        drafts, steps = harness.engine.stats.drafts, harness.engine.stats.steps
    if pays:
        assert drafts.drafts > 0.7 * steps
    else:
        assert 4 <= drafts.drafts < 0.15 * steps
