"""Microseconds of plan + commit for decoding sequences, and of admitting a prompt with a cached prefix."""

from __future__ import annotations

import statistics
import time

import numpy as np

from tokenrelay.libscheduler import Config, Scheduler

KEY = bytes(range(16))


def config(slots: int, context_tokens: int, blocks: int) -> Config:
    """A pool with room for everything the measurement submits."""
    return Config(
        blocks=blocks,
        slots=slots,
        context_tokens=context_tokens,
        step_tokens=8192,
        chunk_tokens=8192,
        waiting_max=slots,
        hash_key=KEY,
        model_identity=KEY,
    )


def decode_us(sequences: int, steps: int = 2000) -> tuple[float, float]:
    """Median and 99th percentile of plan + commit with a step in flight meanwhile, every array of both touched."""
    scheduler = Scheduler(config(sequences, 4096, sequences * 64))
    rng = np.random.default_rng(0)
    for i in range(sequences):
        prompt = rng.integers(0, 4000, 100, dtype=np.uint32)
        assert scheduler.submit(i + 1, prompt, output_start=100, tokens_max=3900, now_us=0) is None
    launched = []
    while not launched or launched[-1].decodes < sequences:
        while (plan := scheduler.plan(0)) is not None:
            launched.append(plan)
        first = launched.pop(0)
        scheduler.commit(first.step, np.zeros(int(first.samples.sum()), np.uint32), 0)
    tokens = np.ones(sequences, np.uint32)
    times = []
    for step in range(steps):
        begin = time.perf_counter_ns()
        plan = scheduler.plan(step)
        assert plan is not None
        for name in ("sequence_ids", "slots", "starts", "lengths", "token_ids", "feedback", "samples", "admitted_ids"):
            getattr(plan, name)
        launched.append(plan)
        outcome = scheduler.commit(launched.pop(0).step, tokens, step)
        for name in ("sequence_ids", "token_ids", "finish", "rows", "first", "cached_tokens"):
            getattr(outcome, name)
        times.append((time.perf_counter_ns() - begin) / 1000)
    return statistics.median(times), sorted(times)[int(len(times) * 0.99)]


def admission_us(tokens: int = 50_000, cached: int = 48_000, repeat: int = 9) -> tuple[float, float]:
    """Median of submitting (copying and hashing), and of the plan that admits, a prompt whose beginning is cached."""
    submits, plans = [], []
    for seed in range(repeat):
        scheduler = Scheduler(config(4, 65536, 4096))
        prompt = np.random.default_rng(seed).integers(0, 4000, tokens, dtype=np.uint32)
        scheduler.submit(1, prompt[:cached], output_start=cached, tokens_max=1, now_us=0)
        while (plan := scheduler.plan(0)) is not None:
            scheduler.commit(plan.step, np.zeros(int(plan.samples.sum()), np.uint32), 0)
        begin = time.perf_counter_ns()
        scheduler.submit(2, prompt, output_start=tokens, tokens_max=100, now_us=0)
        middle = time.perf_counter_ns()
        plan = scheduler.plan(0)
        end = time.perf_counter_ns()
        assert plan is not None and plan.admitted_cached[0] == cached
        submits.append((middle - begin) / 1000)
        plans.append((end - middle) / 1000)
    return statistics.median(submits), statistics.median(plans)


def main() -> None:
    """Print a table."""
    for sequences in (1, 64, 256):
        median, p99 = decode_us(sequences)
        print(f"plan + commit, {sequences:4d} decoding: {median:7.1f} us, p99 {p99:7.1f} us")
    submit, plan = admission_us()
    print(f"50,000 tokens, 48,000 cached: submit {submit:.0f} us, plan with admission {plan:.0f} us")


if __name__ == "__main__":
    main()
