"""Kernels on a GPU beside their floors and, where they are installed, FlashInfer and FlashMLA, in one run.

    python bench/gpu.py --quick
    python bench/gpu.py --json bench/results/gpu.json --only mla_decode

The floor of a case is the larger of the bytes that it must move / the read bandwidth, and its operations / the rate of
an 8192^3 bfloat16 product, both measured in this run on random data. A case runs as a recorded graph of several calls
over different inputs, which together do not fit the cache; the median of several replays counts. Before it is timed its
result is compared with the reference in float64. Without a GPU nothing is measured, and the result says so.

Peers: `pip install flashinfer-python` compiles when it is first used; FlashMLA is built from its public source
(github.com/deepseek-ai/FlashMLA). A peer that is absent or refuses a shape is named with its reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenrelay.kernels import ops, registry
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.kernels.layout import MlaFp8Layout, MlaLayout
from tokenrelay.kernels.ref import fp8
from tokenrelay.kernels.scaled import BlockScaledWeight

RANK, ROPE, NOPE, VALUE, PAGE = 512, 64, 128, 128, 64
SCALE = (NOPE + ROPE) ** -0.5
ROTATED_BYTES = 256 << 20  # inputs of one graph together: several times the cache
CALLS_MAX = 32  # of one graph
BYTES_MAX = 48 << 30  # of one case's cache
REPLAYS = 20
ERROR_MAX = 1.2e-2  # of the norm, against float64: bfloat16 rounds twice
Call = Callable[[], Any]


@dataclass
class Case:
    """One operation at one shape. `calls` and each of `peers` do the same work, over inputs that differ."""

    op: str
    label: str
    bytes_moved: int
    flops: int
    calls: list[Call]
    check: Callable[[], float]  # error of the first call's result, relative to the norm
    peers: dict[str, list[Call]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def no_gpu() -> str:
    """Why nothing can be measured; empty: it can."""
    return "" if torch.cuda.is_available() else f"there is no GPU: torch {torch.__version__} sees none"


def floor_us(case: Case, ceilings: dict[str, float]) -> tuple[float, str]:
    """The time that memory or arithmetic alone would take, and which of them it is."""
    memory = case.bytes_moved / ceilings["read_gb_s"] / 1e3
    arithmetic = case.flops / ceilings["bf16_tflop_s"] / 1e6
    return max(memory, arithmetic), "memory" if memory >= arithmetic else "arithmetic"


def mla_bytes(rows: int, queries: int, heads: int, context: int, *, small: bool) -> int:
    """Of a decode call: each row's cache once, queries and results once."""
    entry = MlaFp8Layout(RANK, ROPE, PAGE).width if small else 2 * (RANK + ROPE)
    return rows * context * entry + rows * queries * heads * 2 * (2 * RANK + ROPE)


def mla_flops(rows: int, queries: int, heads: int, context: int) -> int:
    """Multiply-adds * 2: scores over rank + rope, sums over rank."""
    return 2 * rows * queries * heads * context * (2 * RANK + ROPE)


def paged(extents: list[tuple[int, int]], device: torch.device, queries: int = 1) -> tuple[AttentionBatch, int]:
    """Sequences of (start, length) with blocks in random order; those of at most `queries` tokens are drafts, cut into
    rows as the executor cuts them. And the number of blocks."""
    widths = [-(-(start + length) // PAGE) for start, length in extents]
    order = torch.randperm(sum(widths)).to(torch.int32)
    table = torch.zeros(len(extents), max(widths), dtype=torch.int32)
    first = 0
    for row, width in enumerate(widths):
        table[row, :width] = order[first : first + width]
        first += width
    rows, groups = [], [0]
    for slot, (start, length) in enumerate(extents):
        split = length <= queries
        rows += [(slot, start + i, 1) for i in range(length)] if split else [(slot, start, length)]
        groups.append(len(rows))
    decodes = sum(length for _, length in extents if length <= queries)
    lengths = torch.tensor([length for _, _, length in rows], dtype=torch.int32)
    starts = torch.tensor([start for _, start, _ in rows], dtype=torch.int32)
    slots = torch.tensor([slot for slot, _, _ in rows], dtype=torch.int32)
    positions = torch.cat([torch.arange(start, start + length) for _, start, length in rows])
    batch = AttentionBatch(
        block_table=table.to(device),
        slots=slots.to(device),
        starts=starts.to(device),
        lengths=lengths.to(device),
        offsets=torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device),
        positions=positions.to(device),
        cache_slots=torch.full_like(positions, -1).to(device),
        decodes=decodes,
        context_max=max(start + length for start, length in extents),
        groups=torch.tensor(groups, dtype=torch.int32, device=device) if queries > 1 else None,
        group_max=queries,
        extents=tuple((start, length) for _, start, length in rows),
    )
    return batch, sum(widths)


def copies_of(size: int) -> int:
    """Inputs so many that together they are larger than the cache."""
    return max(1, min(CALLS_MAX, -(-ROTATED_BYTES // size)))


def mla_cache(blocks: int, device: torch.device, *, small: bool) -> Tensor:
    """Random latents."""
    if not small:
        return torch.randn(MlaLayout(RANK, ROPE, PAGE).shape(blocks), device=device, dtype=torch.bfloat16)
    cache = torch.empty(MlaFp8Layout(RANK, ROPE, PAGE).shape(blocks), device=device, dtype=torch.float8_e4m3fn)
    for first in range(0, blocks, 1024):
        part = cache[first : first + 1024]
        count = part.shape[0] * PAGE
        latent, rope = torch.randn(count, RANK, device=device), torch.randn(count, ROPE, device=device)
        part.view(torch.uint8).copy_(fp8.encode(latent, rope).view(torch.uint8).view(part.shape))
    return cache


def mla_decode_case(
    rows: int, queries: int, heads: int, context: int, device: torch.device, *, small: bool = False
) -> Case:
    """`rows` sequences whose last `queries` tokens are asked."""
    batch, blocks = paged([(context - queries, queries)] * rows, device, queries)
    size = mla_bytes(rows, queries, heads, context, small=small)
    inputs = []
    for _ in range(copies_of(size)):
        q = torch.randn(rows * queries, heads, RANK + ROPE, device=device, dtype=torch.bfloat16)
        inputs.append((q, mla_cache(blocks, device, small=small)))

    def call(q: Tensor, cache: Tensor) -> Tensor:
        return ops.mla_decode(q[..., :RANK], q[..., RANK:], cache, batch, SCALE)

    def check() -> float:
        q, cache = inputs[0]
        worst = 0.0
        out = call(q, cache)
        for row in {0, rows * queries - 1}:
            length = int(batch.starts[row]) + 1
            pages = batch.block_table[int(batch.slots[row]), : -(-length // PAGE)].long()
            entries = cache[pages].flatten(0, 1)[:length]
            wide = (fp8.decode(entries, RANK) if small else entries).double()
            weights = torch.softmax(q[row].double() @ wide.T * SCALE, -1)
            expected = weights @ wide[:, :RANK]
            worst = max(worst, float((out[row].double() - expected).norm() / expected.norm()))
        return worst

    label = f"rows={rows} q={queries} h={heads} context={context}{' float8' if small else ''}"
    flops = mla_flops(rows, queries, heads, context)
    case = Case("mla_decode", label, size, flops, [lambda x=x: call(*x) for x in inputs], check)  # type: ignore[misc]
    if not small:
        for name, make in (("flashinfer", _flashinfer), ("flashmla", _flashmla)):
            try:
                case.peers[name] = [make(q, cache, batch, rows, queries, context) for q, cache in inputs]
            except Exception as error:  # a peer is a stranger: what it says is reported
                case.refused[name] = f"{type(error).__name__}: {error}"[:200]
    return case


def _flashinfer(q: Tensor, cache: Tensor, batch: AttentionBatch, rows: int, queries: int, context: int) -> Call:
    import flashinfer  # type: ignore[import-not-found]

    device, heads, pages = q.device, q.shape[1], -(-context // PAGE)
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=device)
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(workspace)
    queries_at = torch.arange(rows + 1, dtype=torch.int32, device=device) * queries
    pages_at = torch.arange(rows + 1, dtype=torch.int32, device=device) * pages
    lengths = torch.full((rows,), context, dtype=torch.int32, device=device)
    indices = batch.block_table[:, :pages].flatten()
    sizes = (heads, RANK, ROPE, PAGE, queries > 1, SCALE, q.dtype, cache.dtype)
    wrapper.plan(queries_at, pages_at, indices, lengths, *sizes)
    latents, ropes = cache[..., :RANK].contiguous(), cache[..., RANK:].contiguous()
    nope, rope = q[..., :RANK].contiguous(), q[..., RANK:].contiguous()
    return lambda: wrapper.run(nope, rope, latents, ropes, return_lse=False)


def _flashmla(q: Tensor, cache: Tensor, batch: AttentionBatch, rows: int, queries: int, context: int) -> Call:
    import flash_mla  # type: ignore[import-not-found]

    lengths = torch.full((rows,), context, dtype=torch.int32, device=q.device)
    metadata, splits = flash_mla.get_mla_metadata(lengths, queries * q.shape[1], 1)
    shaped, keys = q.view(rows, queries, q.shape[1], RANK + ROPE), cache.unsqueeze(2)
    return lambda: flash_mla.flash_mla_with_kvcache(
        shaped, keys, batch.block_table, lengths, RANK, metadata, splits, softmax_scale=SCALE, causal=True
    )


def mla_prefill_case(prefix: int, pieces: list[int], heads: int, device: torch.device) -> Case:
    """Pieces of a prompt after a cached prefix each."""
    batch, blocks = paged([(prefix, n) for n in pieces], device, 0)
    tokens = sum(pieces)
    cache = mla_cache(blocks, device, small=False)
    q = torch.randn(tokens, heads, NOPE + ROPE, device=device, dtype=torch.bfloat16)
    w_uk, w_uv = (torch.randn(heads, NOPE, RANK, device=device).div(RANK**0.5).bfloat16() for _ in range(2))
    absorbed = projected = 0
    for n in pieces:
        pairs = n * prefix + n * (n + 1) // 2
        absorbed += 2 * heads * (pairs * (2 * RANK + ROPE) + n * RANK * (NOPE + VALUE))
        projected += 2 * heads * (pairs * (NOPE + ROPE + VALUE) + (prefix + n) * RANK * (NOPE + VALUE))

    def call() -> Tensor:
        return ops.mla_prefill(q[..., :NOPE], q[..., NOPE:], cache, batch, w_uk, w_uv, SCALE)

    def check() -> float:
        out, row = call()[-1].double(), len(pieces) - 1
        length = prefix + pieces[row]
        entries = cache[batch.block_table[row, : -(-length // PAGE)].long()].flatten(0, 1)[:length].double()
        worst = 0.0
        for head in (0, heads - 1):
            absorbed_q = torch.cat((q[-1, head, :NOPE].double() @ w_uk[head].double(), q[-1, head, NOPE:].double()))
            weights = torch.softmax(entries @ absorbed_q * SCALE, -1)
            expected = w_uv[head].double() @ (weights @ entries[:, :RANK])
            worst = max(worst, float((out[head] - expected).norm() / expected.norm()))
        return worst

    moved = cache.numel() * 2 + q.numel() * 2 + tokens * heads * VALUE * 2
    label = f"prefix={prefix} new={'+'.join(map(str, pieces))} h={heads}"
    return Case("mla_prefill", label, moved, min(absorbed, projected), [call], check)


def moe_case(tokens: int, experts: int, width: int, hidden: int, device: torch.device, *, small: bool) -> Case:
    """Eight of `experts` for each token, as a router deals them: at random."""
    top_k = min(8, experts)
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    chosen = torch.rand(tokens, experts, device=device).topk(top_k).indices.to(torch.int32)
    weights = torch.rand(tokens, top_k, device=device)
    gate_up = torch.randn(experts, 2 * hidden, width, device=device, dtype=torch.bfloat16) / width**0.5
    down = torch.randn(experts, width, hidden, device=device, dtype=torch.bfloat16) / hidden**0.5
    used = int(chosen.unique().numel())
    size = used * 3 * width * hidden * (1 if small else 2) + 2 * tokens * width * 2
    if small:
        scaled = [BlockScaledWeight.of(gate_up[e : e + 1]) for e in range(experts)]
        scaled_down = [BlockScaledWeight.of(down[e : e + 1]) for e in range(experts)]
        pair = [
            BlockScaledWeight(torch.cat([w.data for w in part]), torch.cat([w.factors for w in part]))
            for part in (scaled, scaled_down)
        ]

    def call() -> Tensor:
        if small:
            return ops.scaled_moe(x, chosen, weights, *pair)
        return ops.moe(x, chosen, weights, gate_up, down)

    def check() -> float:
        out, expected = call()[0].double(), torch.zeros(width, dtype=torch.float64, device=device)
        for i in range(top_k):
            e = int(chosen[0, i])
            up = scaled[e].dequantize()[0] if small else gate_up[e]
            back = scaled_down[e].dequantize()[0] if small else down[e]
            gate, value = (up.double() @ x[0].double()).chunk(2)
            expected += float(weights[0, i]) * (back.double() @ (torch.nn.functional.silu(gate) * value))
        error = float((out - expected).norm() / expected.norm())
        return error / 4 if small else error  # activations have three bits of mantissa

    label = f"tokens={tokens} experts={experts} {width}x{hidden}{' float8' if small else ''}"
    return Case("moe", label, size, 2 * 3 * tokens * top_k * width * hidden, [call], check)


def cases(device: torch.device, *, quick: bool) -> Iterator[Callable[[], Case]]:
    """What is measured, each made when its turn comes: memory holds one at a time."""
    heads = (16, 128) if quick else (16, 32, 64, 128)
    contexts = (4096, 32_768) if quick else (4096, 16_384, 65_536, 131_072)
    for h in heads:
        for queries in (1,) if quick else (1, 2, 4):
            for rows in (1, 32) if quick else (1, 4, 16, 64, 128):
                for context in contexts:
                    if mla_bytes(rows, queries, h, context, small=False) <= BYTES_MAX:
                        yield lambda a=(rows, queries, h, context): mla_decode_case(*a, device)  # type: ignore[misc]
        yield lambda h=h: mla_decode_case(32, 1, h, 32_768, device, small=True)  # type: ignore[misc]
    yield lambda: mla_prefill_case(50_000, [800], 16, device)
    if not quick:
        yield lambda: mla_prefill_case(50_000, [800], 128, device)
        yield lambda: mla_prefill_case(50_000, [60, 90, 120, 30], 128, device)
    for tokens in (1, 128) if quick else (1, 8, 64, 512, 4096):
        for small in (False, True):
            yield lambda a=(tokens, small): moe_case(a[0], 32, 7168, 2048, device, small=a[1])  # type: ignore[misc]


def time_us(calls: list[Call]) -> float:
    """The median of a call, in a recorded graph of all of them."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[3:])


def ceilings(device: torch.device) -> dict[str, float]:
    """What the device reads and multiplies at best, on random data."""
    data = torch.randn(1 << 30, device=device)
    read = data.numel() * 4 / time_us([data.amax]) / 1e3
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    copy = torch.empty_like(data)
    both = 2 * data.numel() * 4 / time_us([lambda: copy.copy_(data)]) / 1e3
    return {
        "read_gb_s": max(read, both),
        "copy_gb_s": both,
        "bf16_tflop_s": 2 * 8192**3 / time_us([lambda: a @ b]) / 1e6,
    }


def measure(case: Case, limits: dict[str, float]) -> dict[str, Any]:
    """One case: checked, timed, and its peers timed."""
    error = case.check()
    limit, bound = floor_us(case, limits)
    result: dict[str, Any] = {"op": case.op, "label": case.label, "error": error, "floor_us": limit, "bound": bound}
    if not error <= ERROR_MAX:
        return {**result, "wrong": f"off by {error:.3g} of the norm, at most {ERROR_MAX}"}
    took = time_us(case.calls)
    result |= {"us": took, "of_floor": limit / took, "gb_s": case.bytes_moved / took / 1e3}
    result["tflop_s"] = case.flops / took / 1e6
    for name, calls in case.peers.items():
        try:
            result[f"{name}_us"] = time_us(calls)
        except Exception as reason:  # a peer is a stranger: what it says is reported
            case.refused[name] = f"{type(reason).__name__}: {reason}"[:200]
    return {**result, "refused": case.refused} if case.refused else result


def blank_result() -> dict[str, Any]:
    """What ran where, before anything is measured. `gpu` is None where nothing can be; the reason is printed."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result: dict[str, Any] = {"commit": commit.stdout.strip(), "torch": torch.__version__, "results": []}
    if reason := no_gpu():
        print(f"{reason}. Nothing was measured.", file=sys.stderr)
        return result | {"gpu": None, "figures": {"gpu": "none: nothing was measured"}}
    return result | {"gpu": torch.cuda.get_device_name(0), "figures": {}}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--only", help="one: mla_decode, mla_prefill, moe, scaled_linear, rotary_write")
    parser.add_argument("--json", type=Path, help="write the result there")
    options = parser.parse_args()
    result = blank_result()
    if result["gpu"] is not None:
        device = torch.device("cuda", 0)
        limits = ceilings(device)
        result |= {"figures": limits, "numerics": registry.numerics("cuda")}
        print(f"{result['gpu']}: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))
        with torch.inference_mode():
            import gpu_layers

            layers = gpu_layers.cases(device, quick=options.quick)
            for make in itertools.chain(cases(device, quick=options.quick), layers):
                case = make()
                if options.only in (None, case.op):
                    found = measure(case, limits)
                    result["results"].append(found)
                    print(json.dumps(found), flush=True)
                del case
                torch.cuda.empty_cache()
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
