"""Does it pay to cut a step into micro-batches of rows that are alike, or to order its rows? The forward's CPU time.

    python bench/micro_batches.py [MODEL]

Each case runs the same rows in one step, in two steps (short contexts and long ones; decodes and prompts), and with the
rows in other orders. One thread and its CPU time, so that a busy machine does not matter; medians, in milliseconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tokenrelay.runtime.executor.batch import BatchBuilder
from tokenrelay.runtime.executor.memory import allocate_caches, plan_pool
from tokenrelay.runtime.executor.threads import use_threads
from tokenrelay.runtime.weights.loader import load_model

BUNDLED = Path(__file__).resolve().parents[1] / "assets" / "tokenrelay-tiny"
SLOTS, CONTEXT = 40, 4096
Row = tuple[int, int]  # tokens before it, tokens of it


class Forward:
    """A model, its caches, and steps made by hand."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder, dtype=None, device="cpu", progress=lambda *_: None)
        config = self.model.config
        width = config.kv_layout.block_tokens
        pool = plan_pool(
            config.kv_layout,
            config.layers,
            config.dtype,
            slots=SLOTS,
            context_tokens=CONTEXT,
            context_asked=False,
            kv_memory_bytes=None,
            blocks=SLOTS * CONTEXT // width,
            device=torch.device("cpu"),
        )
        self.caches = allocate_caches(config.kv_layout, config.layers, pool, config.dtype, torch.device("cpu"))
        table = np.arange(pool.blocks, dtype=np.int32).reshape(SLOTS, CONTEXT // width)
        self.batches = BatchBuilder(table, width, torch.device("cpu"))

    def run_ms(self, rows: list[Row]) -> float:
        """CPU time of one step; decode rows (of one token) come first."""
        rows = sorted(rows, key=lambda row: row[1] > 1)
        starts, lengths = np.array(rows, np.int32).T
        count = len(rows)
        plan: Any = SimpleNamespace(
            decodes=int((lengths == 1).sum()),
            drafted=0,
            slots=np.arange(count, dtype=np.int32),
            starts=starts.copy(),
            lengths=lengths.copy(),
            token_ids=np.arange(lengths.sum(), dtype=np.uint32) % self.model.config.vocab_size,
            feedback=np.zeros(count, np.uint8),
            samples=np.ones(count, np.uint8),
        )
        batch = self.batches.build(plan)
        with torch.inference_mode():
            begin = time.process_time_ns()
            self.model(batch.token_ids, batch.attention, self.caches, batch.sample_rows)
            return (time.process_time_ns() - begin) / 1e6


def variants(rows: list[Row]) -> dict[str, list[list[Row]]]:
    """The same rows in one step and in several."""
    by_context = sorted(rows)
    middle = len(rows) // 2
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    found = {
        "one step, as they came": [rows],
        "one step, long contexts first": [by_context[::-1]],
        "one step, short contexts first": [by_context],
        "one step, shuffled": [shuffled],
        "two steps, short and long contexts": [by_context[:middle], by_context[middle:]],
    }
    decodes, prompts = [row for row in rows if row[1] == 1], [row for row in rows if row[1] > 1]
    if decodes and prompts:
        found["two steps, decodes and prompts"] = [decodes, prompts]
    return found


def cases() -> dict[str, list[Row]]:
    """Steps of rows that differ."""
    half_long = [(100 if i % 2 else 3500, 1) for i in range(16)]
    spread = [(60 * i + 20, 1) for i in range(32)]
    return {
        "16 decodes, half at 100 and half at 3,500 tokens": half_long,
        "32 decodes, contexts from 20 to 1,880": spread,
        "8 decodes at 1,000 and a chunk of 64 at 1,000": [(1000, 1)] * 8 + [(1000, 64)],
        "16 decodes as above and chunks of 16, 128 and 256": [*half_long, (2000, 16), (500, 128), (0, 256)],
    }


def main() -> None:
    """Print a table: every variant in turn, round by round, so that what disturbs one disturbs all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=BUNDLED)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    use_threads(1)
    forward = Forward(arguments.model)
    for case, rows in cases().items():
        samples: dict[str, list[float]] = {}
        for _ in range(arguments.rounds + 2):
            for name, steps in variants(rows).items():
                samples.setdefault(name, []).append(sum(forward.run_ms(step) for step in steps))
        print(case)
        whole = statistics.median(samples["one step, as they came"][2:])
        for name, taken in samples.items():
            median = statistics.median(taken[2:])
            print(f"  {name:36} {median:8.2f} ms   x {median / whole:.2f}")


if __name__ == "__main__":
    main()
