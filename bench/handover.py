"""How long a request waits between its last prefill step at one worker and its first decode step at another one.

    python bench/handover.py --quick
    python bench/handover.py --json bench/results/handover.json

A prefill and a decode worker (processes, a kvstore beside them) run a small-compute MLA model with random weights whose
latent is a real one: 512 + 64 wide, bfloat16. Prompts of 1k, 8k and 32k tokens go from one to the other:

- `overlap`: the prompt is computed while the decode worker pulls; what counts is what is left when it is done.
- `at once`: the source has the prompt in its cache, so that nothing hides the transfer: all bytes are pulled at once.

`gap_ms` is from the source's token to the destination's first one, less a usual step of the destination: the handover
as a client could see it. `raw_ms` is what raw NIXL takes for the same bytes between two processes in the same run (and
`shared_ms` shared memory), measured before and after by bench/transfer.py; `by_raw` is the gap by it: the target is 1.3
from 64 MB on. `ttft_ms` is the time to the first token with two workers, `alone_ms` with one,
which has nothing in its cache; medians all.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
for folder in ("tests/support", "tests/worker", "tests/kvstore", "tests/handover"):
    sys.path.insert(0, str(ROOT / folder))

from checkpoints import VOCAB, make_checkpoint  # noqa: E402  (from the folders above)
from fleet import Fleet, Relayed  # noqa: E402
from worker_process import Stream, submit_message  # noqa: E402

from tokenrelay.base.version import version  # noqa: E402
from tokenrelay.proto import worker_pb2  # noqa: E402
from tokenrelay.transfer.select import available  # noqa: E402

_spec = importlib.util.spec_from_file_location("bench_transfer", ROOT / "bench" / "transfer.py")
assert _spec is not None and _spec.loader is not None
raw_bench = sys.modules[_spec.name] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(raw_bench)

LATENT, ROPE = 512, 64
BLOCK_TOKENS = 64
SIZES = (1024, 8192, 32768)
OUTPUT_TOKENS = 12
TARGET = 1.3
TARGET_FROM_BYTES = 64_000_000
FLAGS = (
    *("--dtype", "bfloat16", "--block-tokens", str(BLOCK_TOKENS), "--step-tokens", "2048", "--tps-floor", "0"),
    *("--lease-s", "30", "--read-deadline-s", "30", "--handle-deadline-s", "300", "--transfer-deadline-s", "300"),
)


class Timed(Stream):
    """A stream that notes when each token came."""

    def __init__(self) -> None:
        super().__init__()
        self.at_s: list[float] = []

    def __call__(self, output: worker_pb2.SequenceOutput) -> None:
        if output.token_ids:
            self.at_s.append(time.perf_counter())
        super().__call__(output)


@dataclass
class Case:
    """What was measured of one size, one way, by one transport."""

    transport: str
    tokens: int
    way: str
    gaps_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    alones_s: list[float] = field(default_factory=list)

    def bytes(self, layers: int) -> int:
        """Of the prompt's KV, in whole blocks."""
        return -(-self.tokens // BLOCK_TOKENS) * BLOCK_TOKENS * (LATENT + ROPE) * 2 * layers


class BenchFleet(Fleet):
    """With streams that note the time."""

    def __init__(self, model: Path, transport: str, tokens_max: int) -> None:
        super().__init__(model, transport=transport, chunk_tokens=2048)
        self.flags += FLAGS
        blocks = tokens_max // BLOCK_TOKENS + 40  # one long prompt at a time: its pages are warm after the first
        self._blocks = {"prefill": blocks, "decode": blocks}

    async def timed(self, prompt: list[int]) -> tuple[Relayed, float]:
        """A request on two legs, and when it began."""
        began_s = time.perf_counter()
        source, destination = Timed(), Timed()
        handover = worker_pb2.Handover(role=worker_pb2.Handover.ROLE_SOURCE)
        self.clients["prefill"].submit(submit_message(prompt, OUTPUT_TOKENS, handover=handover), source)
        await source.until(lambda: source.terminals or any(output.offer for output in source.outputs))
        offer = next(output.offer for output in source.outputs if output.offer)
        handover = worker_pb2.Handover(role=worker_pb2.Handover.ROLE_DESTINATION, offer=offer)
        self.clients["decode"].submit(submit_message(prompt, OUTPUT_TOKENS, handover=handover), destination)
        relayed = Relayed(source, destination)
        terminal = (await source.ended(), await destination.ended())[1]
        assert terminal.finish == worker_pb2.FINISH_LENGTH, self.logs(terminal)
        await self.settles("prefill", "decode")
        return relayed, began_s

    async def first_token_alone_s(self, prompt: list[int]) -> float:
        """On the prefill worker, which has the prompt in its cache then."""
        stream, began_s = Timed(), time.perf_counter()
        self.clients["prefill"].submit(submit_message(prompt, 1), stream)
        await stream.ended()
        return stream.at_s[0] - began_s


async def measure_case(fleet: BenchFleet, case: Case, seed: int) -> None:
    """One request."""
    chosen = random.Random(seed)
    prompt = [chosen.randrange(3, VOCAB - 4) for _ in range(case.tokens)]
    if case.way == "at once":
        case.alones_s.append(await fleet.first_token_alone_s(prompt))
    relayed, began_s = await fleet.timed(prompt)
    assert isinstance(relayed.source, Timed) and isinstance(relayed.destination, Timed)
    steps = relayed.destination.at_s
    step_s = statistics.median(later - sooner for sooner, later in itertools.pairwise(steps))
    case.gaps_s.append(max(0.0, steps[0] - relayed.source.at_s[0] - step_s))
    case.ttfts_s.append(relayed.source.at_s[0] - began_s)


def cases_of(kind: str, quick: bool) -> list[Case]:
    """In the order of their sizes. A long prompt takes long: a quick run has one, and only over NIXL."""
    cases = [Case(kind, tokens, way) for tokens in SIZES for way in ("overlap", "at once")]
    return [case for case in cases if case.tokens < SIZES[-1] or not quick or (kind, case.way) == ("nixl", "overlap")]


async def measure_kind(model: Path, cases: list[Case], *, warm_up: int, repeats: int) -> list[Case]:
    """All cases of one transport. `warm_up`: tokens of a first prompt, which touches the pools' pages."""
    kind = cases[0].transport
    fleet = BenchFleet(model, kind, max(case.tokens for case in cases))
    try:
        await fleet.start()
        await measure_case(fleet, Case(kind, warm_up, "warm-up"), 0)
        for repeat in range(repeats):
            for number, case in enumerate(cases):
                await measure_case(fleet, case, 1 + repeat * 100 + number)
    finally:
        await fleet.close()
    return cases


async def raw_rates() -> dict[str, dict[int, float]]:
    """Bytes a second of raw NIXL and of shared memory, by bytes of a pull."""
    raw_bench.SIZES_QUICK = [1 << 20, 8 << 20, 64 << 20]
    _, results = await raw_bench.measure(quick=True)
    found: dict[str, dict[int, float]] = {}
    for row in results:
        if row["case"].endswith("neighbours"):
            found.setdefault(row["transport"], {})[row["bytes"]] = row["bytes"] / (row["ms"] / 1e3)
    return found


def rate_for(rates: list[dict[str, dict[int, float]]], kind: str, moved: int) -> float | None:
    """Of the nearest size that was measured, the mean of the runs before and after."""
    tables = [rate[kind] for rate in rates if kind in rate]
    if not tables:
        return None
    return statistics.mean(table[min(table, key=lambda size: abs(size - moved))] for table in tables)


def row_of(case: Case, layers: int, rates: list[dict[str, dict[int, float]]]) -> dict[str, Any]:
    """A flat result."""
    moved, gap_s = case.bytes(layers), statistics.median(case.gaps_s)
    row: dict[str, Any] = {
        "transport": case.transport,
        "case": f"{case.tokens // 1024}k {case.way}",
        "bytes": moved,
        "repeats": len(case.gaps_s),
        "gap_ms": round(gap_s * 1e3, 2),
        "best_gap_ms": round(min(case.gaps_s) * 1e3, 2),
        "ttft_ms": round(statistics.median(case.ttfts_s) * 1e3, 2),
    }
    if case.alones_s:
        row["alone_ms"] = round(statistics.median(case.alones_s) * 1e3, 2)
    for name, kind in (("raw", "nixl_raw"), ("shared", "shared")):
        if (rate := rate_for(rates, kind, moved)) is not None:
            row[f"{name}_ms"] = round(moved / rate * 1e3, 2)
            row[f"by_{name}"] = round(gap_s / (moved / rate), 3)
    return row


async def measure(quick: bool) -> tuple[dict[str, float], list[dict[str, Any]], list[str]]:
    """Figures, results, and what misses the target."""
    torch.set_num_threads(1)
    kinds = [kind for kind in ("shared", "nixl", "stream") if kind in available() and not (quick and kind == "stream")]
    layers, repeats = (2, 1) if quick else (3, 2)
    rates = [await raw_rates()]
    cases: list[Case] = []
    with tempfile.TemporaryDirectory(prefix="trb-") as folder:
        model = make_checkpoint(
            Path(folder) / "mla",
            "deepseek_v3",
            dtype=torch.bfloat16,
            kv_lora_rank=LATENT,
            qk_rope_head_dim=ROPE,
            num_hidden_layers=layers,
            first_k_dense_replace=layers,
            num_attention_heads=1,
            max_position_embeddings=max(SIZES) + 2048,
        )
        for kind in kinds:
            cases += await measure_kind(model, cases_of(kind, quick), warm_up=SIZES[1 if quick else 2], repeats=repeats)
    rates.append(await raw_rates())
    results = [row_of(case, layers, rates) for case in cases]
    figures = overheads(cases)
    missed = [
        f"{row['transport']} {row['case']}: {row['by_raw']} of raw NIXL's time, the target is {TARGET}"
        for row in results
        if row["bytes"] >= TARGET_FROM_BYTES and "overlap" in row["case"] and row.get("by_raw", 0) > TARGET
    ]
    return figures, results, missed


def overheads(cases: list[Case]) -> dict[str, float]:
    """Time to the first token of a prompt that nobody has: on two workers, by that on one."""
    found: dict[str, float] = {}
    for one in cases:
        two = next((case for case in cases if (case.transport, case.tokens) == (one.transport, one.tokens)), one)
        if one.alones_s and two.way == "overlap":
            overhead = statistics.median(two.ttfts_s) / statistics.median(one.alones_s)
            found[f"{one.transport}, {one.tokens // 1024}k: time to first token, two workers by one"] = overhead
    return {name: round(value, 3) for name, value in found.items()}


def commit() -> str:
    """Of this tree, or empty."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip()


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, each case once, one long prompt")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    versions = {name: metadata.version(name) for name in ("torch", "grpcio", "nixl-cu12") if raw_bench.installed(name)}
    machine = {"cores": len(os.sched_getaffinity(0)), "load_1min": round(os.getloadavg()[0], 1)}
    print(f"tokenrelay {version()} at {commit()}, {machine}, {versions}")
    figures, results, missed = asyncio.run(measure(options.quick))
    columns = ("gap_ms", "best_gap_ms", "raw_ms", "by_raw", "shared_ms", "by_shared", "ttft_ms", "alone_ms")
    print(f"{'transport':10} {'case':12} {'MB':>7}", *(f"{name:>11}" for name in columns))
    for row in results:
        print(
            f"{row['transport']:10} {row['case']:12} {row['bytes'] / 1e6:7.1f}",
            *(f"{row.get(name, ''):>11}" for name in columns),
        )
    for name, value in figures.items():
        print(f"{name:60} {value:8.3f}")
    for problem in missed:
        print(f"missed: {problem}")
    if options.json:
        told = {
            "bench": "handover",
            "version": version(),
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine,
            "versions": versions,
            "figures": figures,
            "results": results,
            "problems": missed,
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
