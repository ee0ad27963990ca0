"""Eviction through the whole scheduler: beside models of LRU and of the optimum, and what a block costs."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from eviction import play
from eviction_model.oracle import hits_of_optimum
from eviction_model.work import Agents, Request, read_trace

from tokenrelay.libscheduler import Config, Scheduler, block_hashes

KEYS = {"hash_key": bytes(range(16)), "model_identity": bytes(16)}
SIZES = {"slots": 4, "context_tokens": 640, "step_tokens": 640, "chunk_tokens": 640, **KEYS}


def lru_hits(chains: Sequence[Sequence[int]], capacity: int) -> int:
    """Blocks found in an LRU cache, in which a chain's end is older than its beginning."""
    cached: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for chain in chains:
        found = 0
        while found < len(chain) and chain[found] in cached:
            found += 1
        hits += found
        for block in chain[:found]:
            del cached[block]
        # One more block is taken for the token behind the chain: it is the running sequence's own.
        while len(cached) + len(chain) + 1 > capacity:
            cached.popitem(last=False)
        for block in reversed(chain):
            cached.pop(block, None)
            cached[block] = None
    return hits


def optimum_by_force(chains: Sequence[Sequence[int]], capacity: int) -> int:
    """The most hits that any choice of what to keep gives, prefixes staying under their children. Exponential."""
    states: dict[frozenset[int], int] = {frozenset(): 0}
    for chain in chains:
        after: dict[frozenset[int], int] = {}
        for cached, hits in states.items():
            found = 0
            while found < len(chain) and chain[found] in cached:
                found += 1
            everything = cached | set(chain)
            frontier = {everything}
            while frontier:
                kept = frontier.pop()
                if len(kept) <= capacity and after.get(kept, -1) < hits + found:
                    after[kept] = hits + found
                if len(kept) > 0 and len(everything) - len(kept) < 6:
                    frontier |= {kept - {block} for block in kept}
        states = after
    return max(states.values())


def test_lru_is_lru() -> None:
    requests = Agents(3, 12, 0.2).requests()
    chains = [request.blocks for request in requests]
    for blocks in (120, 300, 900):
        assert play(requests, blocks, "lru")[0] == lru_hits(chains, blocks)


def test_the_oracle_is_the_optimum() -> None:
    rng = random.Random(5)
    for _ in range(30):
        # Chains of two blocks: the second one is named after the first.
        chains = [(first, 10 + 3 * first + rng.randrange(2)) for first in (rng.randrange(3) for _ in range(7))]
        assert hits_of_optimum(chains, 3) == optimum_by_force(chains, 3)


@pytest.mark.parametrize("blocks", [300, 600])
def test_agents_find_more_than_with_lru_and_no_more_than_the_optimum(blocks: int) -> None:
    requests = Agents(1, 60, 0.5).requests()
    lru, reuse = (play(requests, blocks, policy)[0] for policy in ("lru", "reuse"))
    best = hits_of_optimum([request.blocks for request in requests], blocks)
    assert lru < reuse <= best
    assert reuse - lru > 0.15 * (best - lru)
    assert play(requests, blocks, "reuse")[0] == reuse, "the same calls, the same answers"


def test_no_prefix_is_evicted_under_its_children() -> None:
    """From the events alone: whenever a block goes, the blocks that follow it went before."""
    rng = random.Random(11)
    scheduler = Scheduler(Config(block_tokens=16, blocks=60, **SIZES))
    parents: dict[bytes, bytes | None] = {}
    children: dict[bytes, set[bytes]] = {}
    there: set[bytes] = set()
    evictions = now = number = 0
    stems = [[rng.randrange(50) for _ in range(320)] for _ in range(6)]
    while number < 600:
        now += rng.randrange(1, 2_000_000)
        while rng.random() < 0.6:
            stem = rng.choice(stems)
            ids = stem[: rng.randrange(20, 320)] + [rng.randrange(50) for _ in range(rng.randrange(1, 60))]
            number += 1
            hashes = block_hashes(np.array(ids, np.uint32), block_tokens=16, **KEYS)
            for parent, child in zip([None, *hashes], hashes, strict=False):
                parents[child] = parent
                if parent is not None:
                    children.setdefault(parent, set()).add(child)
            scheduler.submit(
                number,
                np.array(ids, np.uint32),
                output_start=len(ids),
                tokens_max=2,
                tools=rng.random() < 0.5,
                now_us=now,
            )
        if (plan := scheduler.plan(now)) is not None:
            scheduler.commit(plan.step, np.zeros(int(plan.samples.sum()), np.uint32), now + 1000)
        for kind, block in scheduler.take_cache_events():
            if kind == "sealed":
                there.add(block)
                continue
            assert kind == "evicted"
            evictions += 1
            there.discard(block)
            assert not children.get(block, set()) & there, "a prefix went before what follows it"
        scheduler.check()
    assert evictions > 200


def test_a_hint_sorts_its_blocks_into_a_kind_of_their_own() -> None:
    scheduler = Scheduler(Config(block_tokens=16, blocks=40, **SIZES))
    ids = np.arange(100, dtype=np.uint32)
    for number, tools in enumerate((True, False)):
        scheduler.submit(number, ids + number * 100, output_start=100, tokens_max=1, tools=tools, now_us=number)
        plan = scheduler.plan(number)
        assert plan is not None
        scheduler.commit(plan.step, np.zeros(1, np.uint32), number)
    watched = {(row.origin, row.level): row.watched for row in scheduler.reuse() if row.watched}
    assert watched == {("tool_turn", 0): 6, ("prompt", 0): 6}


def test_a_block_costs_at_most_128_bytes_beside_its_kv() -> None:
    for policy in ("lru", "reuse"):
        scheduler = Scheduler(Config(blocks=20_000, eviction=policy, **{**SIZES, "block_tokens": 64}))
        assert 64 < scheduler.bookkeeping_bytes_per_block <= 128


def test_an_unknown_policy_is_named() -> None:
    with pytest.raises(ValueError, match=r'^eviction is "mru", expected "lru" or "reuse"$'):
        Config(blocks=40, eviction="mru", **SIZES)
    assert Config(blocks=40, **SIZES).eviction == "reuse"
    assert Config(blocks=40, eviction="lru", **SIZES).eviction == "lru"


def test_a_broken_trace_is_named(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 3, "input_length": 9, "hash_ids": [4, 5]}\n{"timestamp": 4}\n', encoding="utf-8")
    assert read_trace(trace, 1) == [Request(3000, (4, 5))]
    with pytest.raises(ValueError, match=r"trace\.jsonl:2: expected an object with timestamp and hash_ids"):
        read_trace(trace)
