"""bench/router_peers.py: bodies of the size that rows name, each of its own; and what the figures are made of."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench/router_peers.py"
spec = importlib.util.spec_from_file_location("bench_router_peers", SCRIPT)
assert spec and spec.loader
peers: Any = importlib.util.module_from_spec(spec)
sys.modules["bench_router_peers"] = peers
spec.loader.exec_module(peers)


@pytest.mark.parametrize("size", [1_000, 200_000])
@pytest.mark.parametrize("make", [peers.chat_bodies, peers.token_bodies])
def test_bodies_have_their_size_and_an_end_of_their_own(make: Any, size: int) -> None:
    bodies = make(size, stream=True, tokens=7)
    found = [bodies.next() for _ in range(20)]
    assert len(set(found)) == 20 and all(0.85 * size < len(one) < 1.15 * size for one in found)
    said = [json.loads(one) for one in found]
    assert all((one["stream"], one["max_tokens"], one["model"]) == (True, 7, "mock") for one in said)
    assert b'"max_tokens"' in found[0][:200], "the mock server looks for it there"
    if make is peers.chat_bodies:
        assert said[0]["messages"][:-1] == said[1]["messages"][:-1] and said[0]["messages"][-1]["role"] == "user"
    else:
        assert said[0]["prompt"][:-4] == said[1]["prompt"][:-4] and min(said[19]["prompt"]) >= 300


def test_a_tokens_share_is_without_its_requests() -> None:
    one = {"one_p50_ms": 3.0, "one_p99_ms": 5.0, "paced_cpu_us_per_request": 1000.0, "begun_cpu_us_per_request": 370.0}
    rows = {"ours": dict(one), "direct": {**one, "one_p50_ms": 1.0, "one_p99_ms": 4.0}}
    found = peers.refine(rows)
    assert set(found) == {"ours"}
    assert (found["ours"]["added_p50_ms"], found["ours"]["added_p99_ms"]) == (2.0, 1.0)
    assert found["ours"]["token_cpu_us"] == pytest.approx(630 / (peers.TOKENS - 1))


def test_cpu_is_that_of_all_threads() -> None:
    import os
    import threading

    def spin() -> None:
        sum(n * n for n in range(1_000_000))

    before = peers.cpu_s(os.getpid())
    thread = threading.Thread(target=lambda: (spin(), done.set(), go.wait(10)))
    go, done = threading.Event(), threading.Event()
    thread.start()
    assert done.wait(30)
    used = peers.cpu_s(os.getpid()) - before
    go.set()
    thread.join()
    assert used > 0.01
