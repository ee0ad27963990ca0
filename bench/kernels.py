"""Each kernel beside its plain PyTorch reference and beside a floor: what memory or arithmetic alone would take.

    python bench/kernels.py --quick
    python bench/kernels.py --json bench/results/kernels.json --op mla_decode

The floor of a case is the larger of bytes read and written / memory bandwidth, and multiply-adds * 2 / the rate of a
2048^3 matrix product of the case's type; both rates are measured in this run.

On one thread (the default) the clock is the thread's processor time, and the best of several calls counts: what others
do on a shared machine hardly shows. With --threads N it is wall time: for a machine that has nothing else to do.
OMP_WAIT_POLICY=passive is set, as the supervisor sets it for workers: torch's threads spin otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from tokenrelay.kernels import cpu, ops, registry
from tokenrelay.kernels.batch import AttentionBatch, SamplingBatch
from tokenrelay.kernels.layout import GqaLayout, MlaLayout

BLOCK_TOKENS = 64


@dataclass(frozen=True)
class Case:
    """One op at one shape: the call, and the bytes and floating-point operations that it cannot avoid."""

    op: str
    label: str
    dtype: torch.dtype
    call: Callable[[], object]
    bytes_moved: int
    flops: int = 0


@dataclass(frozen=True)
class Result:
    """A case, measured; times in microseconds."""

    op: str
    label: str
    dtype: str
    path: str
    native_us: float
    reference_us: float
    floor_us: float
    bound: str


def best_us(call: Callable[[], object], budget_s: float) -> float:
    """The shortest time of a call, over as many as the budget allows; the first one counts where it takes it all."""
    clock = time.thread_time if cpu.threads() == 1 else time.perf_counter
    best, until = float("inf"), clock() + budget_s
    while True:
        begin = clock()
        call()
        end = clock()
        best = min(best, end - begin)
        if end >= until:
            return best * 1e6


def bandwidth_gb_s() -> float:
    """What all threads read per second, from a sum over 512 MiB."""
    data = torch.ones(128 << 20)
    return data.numel() * 4 / best_us(data.sum, 0.5) / 1e3


def matmul_gflop_s(dtype: torch.dtype) -> float:
    """The rate of torch's own 2048^3 product."""
    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    return 2 * 2048**3 / best_us(lambda: a @ b, 0.5) / 1e3


def paged(rows: list[tuple[int, int]]) -> tuple[AttentionBatch, int]:
    """Rows of (start, length), the decodes first, each with blocks of its own in random order; and how many blocks."""
    widths = [-(-(start + length) // BLOCK_TOKENS) for start, length in rows]
    order = torch.randperm(sum(widths)).to(torch.int32)
    table = torch.zeros(len(rows), max(widths), dtype=torch.int32)
    offsets, first = [0], 0
    for row, width in enumerate(widths):
        table[row, :width] = order[first : first + width]
        first += width
        offsets.append(offsets[-1] + rows[row][1])
    positions = torch.cat([torch.arange(s, s + n) for s, n in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor([n for _, n in rows]))
    batch = AttentionBatch(
        block_table=table,
        slots=torch.arange(len(rows), dtype=torch.int32),
        starts=torch.tensor([s for s, _ in rows], dtype=torch.int32),
        lengths=torch.tensor([n for _, n in rows], dtype=torch.int32),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        positions=positions,
        cache_slots=table[owner, positions // BLOCK_TOKENS].long() * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        decodes=sum(n == 1 for _, n in rows),
        context_max=max(s + n for s, n in rows),
    )
    return batch, sum(widths)


def pairs(rows: list[tuple[int, int]]) -> int:
    """Query-key pairs of causal rows."""
    return sum(n * s + n * (n + 1) // 2 for s, n in rows)


def mla_cases(dtype: torch.dtype, heads: int, rank: int, rope: int, contexts: list[tuple[int, int]]) -> Iterator[Case]:
    """MLA decode of (rows, context)."""
    layout = MlaLayout(rank, rope, BLOCK_TOKENS)
    for rows, context in contexts:
        extent = [(context - 1, 1)] * rows
        batch, blocks = paged(extent)
        cache = torch.randn(layout.shape(blocks)).to(dtype)
        q = torch.randn(rows, heads, rank + rope).to(dtype)
        yield Case(
            "mla_decode",
            f"rows={rows} context={context} h={heads} rank={rank}",
            dtype,
            lambda q=q, cache=cache, batch=batch: ops.mla_decode(q[..., :rank], q[..., rank:], cache, batch, 0.1),  # type: ignore[misc]
            rows * context * layout.width * dtype.itemsize,
            2 * rows * context * heads * (2 * rank + rope),
        )


def draft_cases(dtype: torch.dtype, heads: int, context: int, widths: list[int]) -> Iterator[Case]:
    """MLA decode of one sequence whose last tokens are a draft: rows of one slot, which share a pass over its cache."""
    layout = MlaLayout(512, 64, BLOCK_TOKENS)
    for width in widths:
        batch, blocks = paged([(context, width)])
        batch = dataclasses.replace(
            batch,
            slots=batch.slots.repeat(width),
            starts=torch.arange(context, context + width, dtype=torch.int32),
            lengths=torch.ones(width, dtype=torch.int32),
            offsets=torch.arange(width + 1, dtype=torch.int32),
            decodes=width,
        )
        cache = torch.randn(layout.shape(blocks)).to(dtype)
        q = torch.randn(width, heads, layout.width).to(dtype)
        yield Case(
            "mla_decode",
            f"draft of {width - 1} context={context} h={heads} rank=512",
            dtype,
            lambda q=q, cache=cache, batch=batch: ops.mla_decode(q[..., :512], q[..., 512:], cache, batch, 0.1),  # type: ignore[misc]
            context * layout.width * dtype.itemsize,
            2 * width * context * heads * (2 * 512 + 64),
        )


def mla_prefill_cases(
    dtype: torch.dtype, heads: int, rank: int, rope: int, head: int, extents: list[tuple[int, int]]
) -> Iterator[Case]:
    """MLA prefill of one row of (start, length)."""
    layout = MlaLayout(rank, rope, BLOCK_TOKENS)
    w = [(torch.randn(heads, head, rank) / rank**0.5).to(dtype) for _ in range(2)]
    for start, length in extents:
        batch, blocks = paged([(start, length), (0, 2)])
        cache = torch.randn(layout.shape(blocks)).to(dtype)
        q = torch.randn(length + 2, heads, head + rope).to(dtype)
        absorbed = 2 * (pairs([(start, length)]) * heads * (2 * rank + rope) + length * heads * 2 * head * rank)
        projected = 2 * (
            pairs([(start, length)]) * heads * (2 * head + rope) + (start + length) * heads * 2 * head * rank
        )
        yield Case(
            "mla_prefill",
            f"prefix={start} chunk={length} h={heads} rank={rank}",
            dtype,
            lambda q=q, cache=cache, batch=batch: ops.mla_prefill(  # type: ignore[misc]
                q[..., :head], q[..., head:], cache, batch, w[0], w[1], 0.1
            ),
            (start + length) * layout.width * dtype.itemsize,
            min(absorbed, projected),
        )


def gqa_cases(dtype: torch.dtype) -> Iterator[Case]:
    """GQA decode and prefill at Llama-3-8B's shape."""
    heads, kv_heads, head_dim = 32, 8, 128
    layout = GqaLayout(kv_heads, head_dim, BLOCK_TOKENS)
    for op, rows in (("gqa_decode", [(8191, 1)]), ("gqa_decode", [(2047, 1)] * 8), ("gqa_prefill", [(4096, 256)])):
        batch, blocks = paged(rows)
        cache = torch.randn(layout.shape(blocks)).to(dtype)
        q = torch.randn(sum(n for _, n in rows), heads, head_dim).to(dtype)
        call = getattr(ops, op)
        yield Case(
            op,
            f"rows={len(rows)} context={rows[0][0] + rows[0][1]} chunk={rows[0][1]} h=32/8 hd=128",
            dtype,
            lambda q=q, cache=cache, batch=batch, call=call: call(q, cache, batch, 0.1),  # type: ignore[misc]
            sum(s + n for s, n in rows) * layout.width * dtype.itemsize,
            4 * pairs(rows) * heads * head_dim,
        )


def moe_cases(dtype: torch.dtype, tokens_list: list[int]) -> Iterator[Case]:
    """Experts at a Moonlight-like shape, cut to 16 experts of 6 chosen."""
    count, top_k, width, hidden = 16, 6, 2048, 704
    gate_up = (torch.randn(count, 2 * hidden, width) / width**0.5).to(dtype)
    down = (torch.randn(count, width, hidden) / hidden**0.5).to(dtype)
    for tokens in tokens_list:
        x = torch.randn(tokens, width).to(dtype)
        experts = torch.stack([torch.randperm(count)[:top_k] for _ in range(tokens)]).to(torch.int32)
        weights = torch.rand(tokens, top_k)
        used = len(set(experts.flatten().tolist()))
        yield Case(
            "moe",
            f"tokens={tokens} experts={used}/{count} d={width} f={hidden}",
            dtype,
            lambda x=x, experts=experts, weights=weights: ops.moe(x, experts, weights, gate_up, down),  # type: ignore[misc]
            used * 3 * width * hidden * dtype.itemsize,
            2 * tokens * top_k * 3 * width * hidden,
        )


def row_cases(dtype: torch.dtype) -> Iterator[Case]:
    """What runs on each token: norms, rotary embedding, activation, cache write."""
    size = dtype.itemsize
    for tokens in (1, 256):
        x, residual, weight = (torch.randn(s).to(dtype) for s in ((tokens, 2048), (tokens, 2048), (2048,)))
        yield Case(
            "rms_norm", f"tokens={tokens} d=2048", dtype, _bind(ops.rms_norm, x, weight, 1e-6), 2 * x.numel() * size
        )
        call = _bind(ops.add_rms_norm, x, residual, weight, 1e-6)
        yield Case("add_rms_norm", f"tokens={tokens} d=2048", dtype, call, 4 * x.numel() * size)
        gate_up = torch.randn(tokens, 2 * 5632).to(dtype)
        yield Case(
            "silu_mul", f"tokens={tokens} f=5632", dtype, _bind(ops.silu_mul, gate_up), gate_up.numel() * 3 // 2 * size
        )
        q, k = torch.randn(tokens, 16, 192).to(dtype)[..., 128:], torch.randn(tokens, 1, 64).to(dtype)
        table, positions = torch.randn(4096, 64), torch.arange(tokens) + 900
        call = _bind(ops.rotary, q, k, positions, table, True)
        yield Case("rotary", f"tokens={tokens} h=16 r=64", dtype, call, 2 * (q.numel() + k.numel()) * size)
        batch, blocks = paged([(900, tokens)])
        cache = torch.zeros(MlaLayout(512, 64, BLOCK_TOKENS).shape(blocks), dtype=dtype)
        latent, rope = torch.randn(tokens, 512).to(dtype), torch.randn(tokens, 64).to(dtype)
        call = _bind(ops.mla_cache_write, latent, rope, cache, batch.cache_slots)
        yield Case("mla_cache_write", f"tokens={tokens} rank=512", dtype, call, 2 * tokens * 576 * size)


def token_cases() -> Iterator[Case]:
    """What runs on each sampled row."""
    for rows, vocab in ((1, 160_000), (16, 160_000), (32, 4096)):
        logits = torch.randn(rows, vocab) * 3
        for name, temperature, top_p, top_k in (
            ("greedy", 0.0, 1.0, 0),
            ("T=1", 1.0, 1.0, 0),
            ("top_p=.95 top_k=50", 1.0, 0.95, 50),
        ):
            batch = SamplingBatch(
                torch.full((rows,), temperature),
                torch.full((rows,), top_p),
                torch.full((rows,), top_k, dtype=torch.int32),
                torch.zeros(rows),
                torch.arange(rows),
                torch.zeros(rows, dtype=torch.int32),
                torch.arange(rows),
            )
            yield Case(
                "sample",
                f"rows={rows} V={vocab} {name}",
                torch.float32,
                _bind(ops.sample, logits, batch),
                logits.numel() * 4,
            )
        ids = torch.zeros(rows, dtype=torch.int64)
        call = _bind(ops.token_logprobs, logits, ids, 5)
        yield Case("token_logprobs", f"rows={rows} V={vocab} k=5", torch.float32, call, logits.numel() * 4)
    logits, bias = torch.randn(64, 256), torch.randn(256) * 0.1
    yield Case(
        "moe_route",
        "tokens=64 E=256 groups=8",
        torch.float32,
        lambda: ops.moe_route(
            logits, bias, top_k=8, groups=8, groups_top_k=4, scoring="sigmoid", normalize=True, group_score="top2"
        ),
        logits.numel() * 4,
    )


def _bind(call: Callable[..., object], *arguments: object) -> Callable[[], object]:
    return lambda: call(*arguments)


def cases(quick: bool) -> Iterator[Case]:
    """All of them; `quick` leaves the long ones out."""
    for dtype in (torch.bfloat16, torch.float32):
        yield from mla_cases(dtype, 16, 512, 64, [(1, 8192), (8, 2048)] + ([] if quick else [(1, 65536), (32, 8192)]))
        yield from mla_cases(dtype, 8, 64, 16, [(16, 1024)])
        yield from draft_cases(dtype, 4, 32_768, [1, 4] if quick else [1, 2, 4, 8])
        extents = [(8192, 4), (1024, 256)] + ([] if quick else [(32768, 16), (8192, 512)])
        yield from mla_prefill_cases(dtype, 16, 512, 64, 128, extents)
        yield from gqa_cases(dtype)
        yield from moe_cases(dtype, [1, 8, 64] + ([] if quick else [256, 1024]))
        yield from row_cases(dtype)
    yield from token_cases()


def measure(case: Case, budget_s: float, gb_s: float, gflop_s: dict[torch.dtype, float]) -> Result:
    """Time the chosen kernel and the reference."""
    native = best_us(case.call, budget_s)
    with registry.force(case.op, "ref/torch"):
        reference = best_us(case.call, budget_s)
    memory, arithmetic = case.bytes_moved / gb_s / 1e3, case.flops / gflop_s[case.dtype] / 1e3
    dtype = str(case.dtype).removeprefix("torch.")
    bound = "memory" if memory >= arithmetic else "arithmetic"
    path = registry.select(case.op, dtype=dtype).path
    return Result(case.op, case.label, dtype, path, native, reference, max(memory, arithmetic), bound)


def commit() -> str:
    """The commit, with a mark where files differ from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def machine() -> dict[str, object]:
    """Where this ran."""
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return {
        "cpu": model or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": round(os.getloadavg()[0], 2),
        "numerics": registry.numerics(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    """Run, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter cases, under a minute")
    parser.add_argument("--json", type=Path, help="write the results there too")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--threads", type=int, default=1, help="of our kernels and of torch; 1: processor time")
    arguments = parser.parse_args()
    cpu.set_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    gb_s = bandwidth_gb_s()
    gflop_s = {dtype: matmul_gflop_s(dtype) for dtype in (torch.float32, torch.bfloat16)}
    header: dict[str, object] = {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine(),
        "threads": arguments.threads,
        "clock": "processor time" if arguments.threads == 1 else "wall time",
        "bandwidth_gb_s": round(gb_s, 1),
        "matmul_gflop_s": {str(d).removeprefix("torch."): round(v, 1) for d, v in gflop_s.items()},
    }
    print(json.dumps(header, indent=1))
    print(f"{'op':<16}{'case':<46}{'type':<10}{'path':<16}{'native':>10}{'reference':>11}{'floor':>10}  x ref  x floor")
    results = []
    for case in cases(arguments.quick):
        if arguments.op in (None, case.op):
            r = measure(case, 0.05 if arguments.quick else 0.5, gb_s, gflop_s)
            results.append(r)
            print(
                f"{r.op:<16}{r.label:<46}{r.dtype:<10}{r.path:<16}{r.native_us:>8.1f}us{r.reference_us:>9.1f}us"
                f"{r.floor_us:>8.1f}us{r.reference_us / r.native_us:>7.1f}{r.native_us / r.floor_us:>8.1f} ({r.bound})",
                flush=True,
            )
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(header | {"results": [asdict(r) for r in results]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
