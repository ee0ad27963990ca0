"""The host tier: what comes back from host memory is what was computed, for MLA and GQA; and what if it fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from harness import BLOCK_TOKENS, Harness

from tokenrelay.base.errors import ConfigError
from tokenrelay.kernels.layout import GqaLayout, MlaLayout
from tokenrelay.runtime.executor import memory
from tokenrelay.runtime.executor.host_tier import Copier, Copy, HostMemory, runs_of
from tokenrelay.runtime.executor.memory import plan_host

PROMPT = 5 * BLOCK_TOKENS + 3
SMALL = {"blocks": 14, "slots": 2, "context_tokens": 7 * BLOCK_TOKENS}  # two prompts evict the third
ROUNDS = 3


def prompts_of(vocab: int) -> list[list[int]]:
    return [[(start + i * i) % vocab for i in range(PROMPT)] for start in (3, 50, 90, 70)]


def block_bytes(model: Any) -> int:
    return int(model.config.layers * model.config.kv_layout.bytes_per_block(model.config.dtype))


def tiered(model: Any, blocks: int = 64, **sizes: Any) -> Harness:
    return Harness(model, **{**SMALL, "host_memory_bytes": blocks * block_bytes(model), **sizes})


def turns(harness: Harness, prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Each prompt alone, then all of them again: a small pool has forgotten the first by then."""
    return [[harness.run(prompt, tokens_max=8)[0] for prompt in prompts] for _ in range(ROUNDS)]


def test_tokens_are_those_of_a_large_pool_and_come_from_host_memory(model: Any) -> None:
    prompts = prompts_of(model.config.vocab_size)
    with Harness(model, blocks=64, slots=2, context_tokens=7 * BLOCK_TOKENS) as large:
        expected = turns(large, prompts)
        large.assert_quiet()
    with Harness(model, **SMALL) as small:
        assert turns(small, prompts) == expected
        without = small.engine.stats
        small.assert_quiet()
    with tiered(model) as harness:
        assert turns(harness, prompts) == expected
        harness.assert_quiet()
        stats = harness.engine.stats
        reused = [t.cached_tokens for t in harness.transcripts.values()]
    assert without.host.blocks == without.host.loads == 0
    assert reused[len(prompts) :] == [5 * BLOCK_TOKENS] * len(prompts) * (ROUNDS - 1)
    assert stats.host.loads >= len(prompts), "the pool had evicted every prompt"
    assert stats.host.tokens_loaded == stats.host.blocks_loaded * BLOCK_TOKENS > without.cached_tokens
    assert stats.host.blocks_stored >= 5 * len(prompts) and stats.host.copies_failed == stats.host.copies_expired == 0
    assert stats.host.block_bytes == block_bytes(model)


def test_requests_together_and_a_twin(model: Any) -> None:
    prompts = prompts_of(model.config.vocab_size)
    with Harness(model, blocks=64, slots=2, context_tokens=7 * BLOCK_TOKENS) as large:
        expected = large.run(*prompts, tokens_max=8)
        large.assert_quiet()
    with tiered(model) as harness:
        harness.run(*prompts, tokens_max=8)
        for _ in range(4):
            both = [prompts[0], *prompts, prompts[0]]
            assert harness.run(*both, tokens_max=8) == [expected[0], *expected, expected[0]]
        harness.assert_quiet()
        assert harness.engine.stats.host.loads > 0


class Stubborn:
    """A copier that lets nothing end until it is told to, and fails what it is told to fail."""

    def __init__(self, harness: Harness, fails: bool = False) -> None:
        self.block_bytes = 1
        self.fails = fails
        self.holds = threading.Event()
        self.held: list[int] = []
        self.loading = threading.Event()  # a load is held
        self._ended = harness.engine.tier.ended

    def start(self, copies: Any) -> None:
        stores, loads = copies.store_ids.tolist(), copies.load_ids.tolist()
        if self.fails:
            self._ended(stores, loads)
        elif self.holds.is_set():
            self.held += [*stores, *loads]
            if loads:
                self.loading.set()
        else:
            self._ended([*stores, *loads], [])

    def close(self) -> None:
        self._ended([], self.held)
        self.held = []


def with_copier(harness: Harness, **options: Any) -> Stubborn:
    """In place of the real one; it moves no bytes, so nothing it says it loaded may be read."""
    real = harness.engine.tier._copier
    assert real is not None
    real.close()
    copier = Stubborn(harness, **options)
    harness.engine.tier.attach(copier)
    return copier


def test_failed_loads_are_computed(model: Any) -> None:
    prompts = prompts_of(model.config.vocab_size)
    harness = tiered(model)
    with_copier(harness, fails=True)
    with harness:
        first, second, _ = turns(harness, prompts)
        harness.assert_quiet()
        stats = harness.engine.stats
    assert first == second and stats.host.copies_failed > 0 and stats.host.tokens_loaded == 0


def test_an_idle_engine_finds_a_late_load_and_goes_on(
    qwen: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = prompts_of(qwen.config.vocab_size)
    from tokenrelay.runtime import build

    real = build.SchedulerConfig
    monkeypatch.setattr(build, "SchedulerConfig", lambda **fields: real(**fields, copy_deadline_us=100_000))
    harness = tiered(qwen)
    copier = with_copier(harness)
    with harness:
        expected = [harness.run(prompt, tokens_max=8)[0] for prompt in prompts]
        copier.holds.set()
        began_s = time.monotonic()
        # Its prefix is in host memory, nothing else runs: only the copy's own deadline wakes the engine.
        assert harness.run(prompts[0], tokens_max=8) == [expected[0]]
        assert time.monotonic() - began_s >= 0.1
        stats = harness.engine.stats
        assert stats.host.copies_expired >= 5 and stats.host.copies_late >= 5
        assert stats.blocks_active >= 5, "the blocks of late copies stay held"
        harness.assert_quiet()
        assert harness.engine.stats.host.copies_late == 0


def test_an_abort_while_loading(qwen: Any) -> None:
    prompts = prompts_of(qwen.config.vocab_size)
    harness = tiered(qwen)
    copier = with_copier(harness)
    with harness:
        for prompt in prompts:
            harness.run(prompt, tokens_max=8)
        copier.holds.set()
        loading = harness.submit(prompts[0], 8)
        assert copier.loading.wait(10)
        assert "it waits for its prefix to be loaded from host memory" in explained(harness)
        harness.engine.abort(loading)
        assert harness.wait(loading)[0].token_ids == []
        other = harness.submit(prompts[3], 8)  # others go on meanwhile
        assert len(harness.wait(other)[0].token_ids) == 8
        harness.assert_quiet()


def explained(harness: Harness) -> str:
    answer = harness.engine.explain().result(10)
    return " ".join(str(one.explanation["text"]) for one in answer.sequences)


# -- the memory and the copier ------------------------------------------------------------------------------------
class Listed:
    """`Copies` as a test writes them."""

    def __init__(
        self, *, stores: Sequence[tuple[int, int, int]] = (), loads: Sequence[tuple[int, int, int]] = ()
    ) -> None:
        for name, rows in (("store", stores), ("load", loads)):
            for field, column in zip(("ids", "blocks", "slots"), range(3), strict=True):
                setattr(self, f"{name}_{field}", torch.tensor([row[column] for row in rows], dtype=torch.int64))


@pytest.mark.parametrize("layout", [MlaLayout(8, 4, 16), GqaLayout(2, 4, 16)])
def test_every_layer_of_a_block_comes_back(layout: Any) -> None:
    caches = [torch.randn(layout.shape(9)) for _ in range(3)]
    before = [cache.clone() for cache in caches]
    ended: list[int] = []
    failed: list[int] = []
    changed = threading.Event()

    def note(done: list[int], wrong: list[int]) -> None:
        ended.extend(done)
        failed.extend(wrong)
        changed.set()

    copier = Copier(HostMemory(caches, 4), note)
    assert copier.block_bytes == 3 * layout.bytes_per_block(torch.float32)
    copier.start(Listed(stores=[(1, 5, 0), (2, 6, 1), (3, 2, 3)]))  # type: ignore[arg-type]
    assert changed.wait(10)
    for cache in caches:
        cache.zero_()
    copier.start(Listed(loads=[(4, 0, 0), (5, 1, 1), (6, 8, 3)]))  # type: ignore[arg-type]
    copier.close()
    assert (ended, failed) == ([1, 2, 3, 4, 5, 6], [])
    for cache, was in zip(caches, before, strict=True):
        assert torch.equal(cache[[0, 1, 8]], was[[5, 6, 2]]) and not cache[2:8].any()


def test_copies_that_cannot_be_made_have_failed(caplog: pytest.LogCaptureFixture) -> None:
    ended: list[tuple[list[int], list[int]]] = []
    copier = Copier(HostMemory([torch.zeros(3, 2)], 4), lambda done, failed: ended.append((done, failed)))
    copier.start(Listed(loads=[(1, 99, 0), (2, 0, 1)]))  # type: ignore[arg-type]
    copier.start(Listed(stores=[(3, 0, 0)]))  # type: ignore[arg-type]
    copier.close()
    assert sorted(ended) == [([], [1, 2]), ([3], [])], "what goes with a copy that fails is not believed; others go on"


def test_loads_go_before_write_backs() -> None:
    caches = [torch.zeros(4, 2)]
    order: list[int] = []
    memory_ = HostMemory(caches, 4)
    gate = threading.Event()
    real = memory_.move

    def slow(run: Sequence[Copy]) -> None:
        gate.wait(10)
        real(run)

    memory_.move = slow  # type: ignore[method-assign]
    copier = Copier(memory_, lambda done, _: order.extend(done))
    copier.start(Listed(stores=[(1, 0, 0)]))  # type: ignore[arg-type]
    time.sleep(0.05)  # it is on its way
    copier.start(Listed(stores=[(2, 1, 1)], loads=[(3, 2, 2)]))  # type: ignore[arg-type]
    gate.set()
    copier.close()
    assert order == [1, 3, 2]


def test_runs_are_moved_together() -> None:
    copies = [Copy(1, 4, 7, load=True), Copy(2, 5, 8, load=True), Copy(3, 6, 8, load=True), Copy(4, 7, 9, load=False)]
    assert [[copy.id for copy in run] for run in runs_of(copies)] == [[1, 2], [3], [4]]
    assert runs_of([]) == []


def test_room_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    layout, cpu = MlaLayout(8, 4, 16), torch.device("cpu")
    per_block = 2 * layout.bytes_per_block(torch.float32)
    assert plan_host(layout, 2, torch.float32, 0, 3, cpu) == 0
    assert plan_host(layout, 2, torch.float32, 10 * per_block + 5, 3, cpu) == 10
    with pytest.raises(ConfigError, match=r"does not fit in the 5 of --host-cache-gib"):
        plan_host(layout, 2, torch.float32, 5, 3, cpu)
    monkeypatch.setattr(memory, "available_bytes", lambda: 9 * per_block)
    with pytest.raises(ConfigError, match=r"--host-cache-gib asks for .* bytes of host memory, and .* are free"):
        plan_host(layout, 2, torch.float32, 10 * per_block, 3, cpu)
