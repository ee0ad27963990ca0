"""What a host tier saves: prompt tokens computed with pools of several sizes, and host memory of several sizes beside.

    python bench/host_tier.py                          # generated agents
    python bench/host_tier.py --trace conversation_trace.jsonl --json result.json

Each request goes through the real scheduler (submit, plan, commit until it ends), one after the other, at the time it
arrived; steps and copies take no time. A block of 512 tokens is played by one of 16. Shown is the share of all blocks
of prompts that were computed, beside that of a pool of the device that is as large as both together, and what the
tier costs the scheduler. docs/scheduler.md has the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from eviction_model.work import Agents, Request, read_trace  # noqa: E402 - once its folder is known
from scheduler import about  # noqa: E402

from tokenrelay.libscheduler import Config, Scheduler  # noqa: E402

PLAYED_TOKENS = 16  # a block, in the scheduler
SIZES = (1000, 2000, 4000)
FACTORS = (0, 1, 2, 4, 8)  # of the pool: room in host memory


def play(requests: Sequence[Request], blocks: int, host_blocks: int) -> dict[str, Any]:
    """Blocks of prompts that were found on the device, loaded from host memory, written back; seconds of CPU time."""
    longest = max(len(request.blocks) for request in requests) + 1
    tokens = longest * PLAYED_TOKENS
    scheduler = Scheduler(
        Config(
            block_tokens=PLAYED_TOKENS,
            blocks=blocks,
            slots=1,
            context_tokens=tokens,
            step_tokens=tokens,
            chunk_tokens=tokens,
            hash_key=bytes(range(16)),
            model_identity=bytes(16),
            steps_in_flight=1,
            host_blocks=host_blocks,
        )
    )
    sampled = np.zeros(1, np.uint32)
    found = 0
    began_s = time.process_time()
    for number, request in enumerate(requests):
        # One token more than the blocks: the last token of a prompt is always computed.
        ids = np.append(np.repeat(np.array(request.blocks, np.uint32), PLAYED_TOKENS), np.uint32(0))
        refused = scheduler.submit(
            number, ids, output_start=len(ids), tokens_max=1, tools=request.tools, now_us=request.at_us
        )
        assert refused is None, f"request {number} was refused: {refused}"
        plan = scheduler.plan(request.at_us)
        if plan is None:  # it loads its prefix
            _copy(scheduler)
            plan = scheduler.plan(request.at_us)
        assert plan is not None and plan.samples[-1], "a prompt fits one step"
        found += int(scheduler.commit(plan.step, sampled, request.at_us, 0).cached_tokens[0]) // PLAYED_TOKENS
        while host_blocks:  # until everything is written back
            assert scheduler.plan(request.at_us) is None
            if not _copy(scheduler):
                break
        scheduler.take_cache_events()
    seconds = time.process_time() - began_s
    scheduler.check()
    host = scheduler.counts().host
    return {"found": found, "loaded": host.blocks_loaded, "stored": host.blocks_stored, "cpu_s": round(seconds, 2)}


def _copy(scheduler: Scheduler) -> bool:
    """All copies end at once. False: there was none."""
    copies = scheduler.take_copies()
    if copies is None:
        return False
    ids = [*copies.store_ids.tolist(), *copies.load_ids.tolist()]
    assert scheduler.copied(ids) == len(ids)
    return True


def measure(
    name: str, requests: Sequence[Request], sizes: Sequence[int], factors: Sequence[int], out: Console
) -> list[dict[str, Any]]:
    """A row for each size of the pool and of host memory."""
    total = sum(len(request.blocks) for request in requests)
    rows = []
    for blocks in sizes:
        for factor in factors:
            row = play(requests, blocks, factor * blocks)
            together = play(requests, (1 + factor) * blocks, 0)
            rows.append(
                {
                    "workload": name,
                    "blocks": blocks,
                    "host_blocks": factor * blocks,
                    "computed": round(1 - row["found"] / total, 5),
                    "loaded": round(row["loaded"] / total, 5),
                    "written_back": round(row["stored"] / total, 5),
                    "computed_by_one_pool_of_both": round(1 - together["found"] / total, 5),
                    "cpu_us_per_request": round(1e6 * row["cpu_s"] / len(requests), 1),
                    "cpu_us_per_request_of_one_pool": round(1e6 * together["cpu_s"] / len(requests), 1),
                }
            )
            out.print(f"{name}, {blocks} + {factor * blocks} blocks: {rows[-1]['computed']:.2%} computed")
    return rows


def show(rows: Sequence[dict[str, Any]], out: Console) -> None:
    """The table of docs/scheduler.md."""
    table = Table("workload", "pool", "host", "computed", "loaded", "written back", "one pool of both computes")
    for row in rows:
        shares = (row["computed"], row["loaded"], row["written_back"], row["computed_by_one_pool_of_both"])
        table.add_row(
            row["workload"], str(row["blocks"]), str(row["host_blocks"]), *(f"{share:.1%}" for share in shares)
        )
    out.print(table)


def main() -> int:
    """Play everything, print the table, write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", action="append", default=[], type=Path, metavar="FILE", help="repeatable")
    parser.add_argument("--quick", action="store_true", help="few sessions and sizes")
    parser.add_argument("--json", metavar="FILE", help="write the result here (-: stdout)")
    parser.add_argument("--seed", type=int, default=1, help="of the generated agents")
    options = parser.parse_args()
    out = Console(stderr=options.json == "-", width=130)
    agents = Agents(options.seed, 60, 0.5) if options.quick else Agents(options.seed, 400, 2.0)
    works = {"agents": agents.requests()}
    for path in options.trace:
        works[path.stem.removesuffix("_trace")] = read_trace(path, 2000 if options.quick else None)
    sizes, factors = ((500,), (0, 2)) if options.quick else (SIZES, FACTORS)
    rows = [row for name, requests in works.items() for row in measure(name, requests, sizes, factors, out)]
    result = {
        "bench": "host_tier",
        **about(),
        "versions": {"python": sys.version.split()[0], "numpy": np.__version__},
        "quick": options.quick,
        "seed": options.seed,
        "results": rows,
    }
    show(rows, out)
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
