"""`tokenrelay kernels`: which there are, which one runs and why, and which is fastest here."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from tokenrelay.runtime.models.decoder import Model

app = typer.Typer(no_args_is_help=True, help="Which kernels there are, which one would run and why, which is fastest.")

ModelFolder = Annotated[
    Path | None, typer.Argument(metavar="MODEL", help="Its folder. Default: the bundled one.", show_default=False)
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, max=100, help="A figure is the best of so many.")]

CONTEXT_TOKENS, PROMPT_TOKENS, BLOCK_TOKENS = 128, 192, 64


@app.command("list")
def kernels_list(
    op: Annotated[str | None, typer.Argument(metavar="OP", help="Only this operation.", show_default=False)] = None,
) -> None:
    """List the registered kernels: operation, path, device, instruction set, dtypes, priority."""
    from tokenrelay.cli.introspect import print_kernels

    print_kernels(op)


@app.command("explain")
def kernels_explain(
    op: Annotated[str, typer.Argument(metavar="OP", help="The operation, such as mla_decode.")],
    features: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="What is asked for: device=cpu dtype=bfloat16 …"),
    ] = None,
) -> None:
    """Say which kernel would run for these features, and why each other one would not.

    [cyan]tokenrelay kernels explain mla_decode device=cpu dtype=bfloat16[/cyan]
    """
    from tokenrelay.cli.introspect import explain_kernel

    explain_kernel(op, features or [])


@app.command("tune")
def kernels_tune(
    model: ModelFolder = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", metavar="FILE", help="Where the choices go. Default: where workers look for them."),
    ] = None,
    rounds: Rounds = 5,
) -> None:
    """Time the kernels that could run a model's shapes on this machine, and keep what is faster than the default.

    Steps of 1 and of 8 sequences and a prompt are computed with the model's weights. Workers read the file when they
    start; on another machine it is ignored.
    """
    from rich.console import Console
    from rich.table import Table

    from tokenrelay.kernels.tune import save, tune
    from tokenrelay.services.decode.config import KERNELS_FILE

    run = _workload(model)
    table = Table(box=None, header_style="bold")
    for column in ("operation", "shape", "dtype", "default", "us", "fastest", "us", "tried"):
        table.add_column(column, justify="right" if column in ("us", "tried") else "left")
    findings = []
    for finding in tune(run, rounds):
        findings.append(finding)
        op, _, dtype, dims = finding.key
        shape = " ".join(f"{name}={size}" for name, size in dims)
        best = finding.best if finding.gained else "-"
        figures = (
            f"{finding.before_us:,.0f}",
            best,
            f"{finding.best_us:,.0f}" if finding.gained else "",
            finding.tried,
        )
        table.add_row(op, shape, dtype, finding.before, *map(str, figures))
    console = Console(highlight=False)
    console.print(table)
    target = KERNELS_FILE if file is None else file
    count = save(target, findings)
    before = sum(finding.before_us for finding in findings)
    after = sum(finding.best_us if finding.gained else finding.before_us for finding in findings)
    gained = sum(finding.gained for finding in findings)
    console.print(
        f"{gained} of {len(findings)} shapes gain: {before / 1e3:.1f} ms -> {after / 1e3:.1f} ms "
        f"({1 - after / before:.1%} less). {target} holds {count} choices; workers that start from now on read it.",
        markup=False,
    )


@app.command("bench")
def kernels_bench(
    model: ModelFolder = None,
    weights: Annotated[
        str, typer.Option("--weight-dtype", help="auto, or as integers: int8, int4, int4-32, int4-128.")
    ] = "auto",
    rounds: Rounds = 5,
) -> None:
    """Time each operation of a model's steps beside what this machine's memory and arithmetic could do.

    Steps of 1 and of 8 sequences and a prompt are computed with the model's weights. The ceiling, measured in the same
    run, is what all threads read from memory and the rate of a large matrix product. What fits a cache may pass the
    first, integers the second.
    """
    from rich.console import Console
    from rich.table import Table

    from tokenrelay.kernels.measure import measure, measure_ceiling

    run = _workload(model, weights)
    dtype = _dtype()
    ceiling = measure_ceiling(dtype)
    table = Table(box=None, header_style="bold")
    for column in ("operation", "shape", "tokens", "kernel", "calls", "us", "MB", "MFLOP", "of ceiling"):
        table.add_column(column, justify="left" if column in ("operation", "shape", "kernel") else "right")
    lines = measure(run, rounds)
    for line in lines:
        figures = (line.seconds * 1e6, line.work.bytes / 1e6, line.work.flops / 1e6)
        each = [f"{figure / line.calls:,.1f}" for figure in figures]
        part = f"{line.work.floor_s(ceiling) / line.seconds:.0%}"
        table.add_row(line.op, line.shape, str(line.tokens), line.path, str(line.calls), *each, part)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    console.print(table)
    total, floor = sum(line.seconds for line in lines), sum(line.work.floor_s(ceiling) for line in lines)
    console.print(
        f"All: {total * 1e3:.1f} ms, {floor / total:.0%} of the ceiling, which is {ceiling.bytes_per_s / 1e9:.1f} GB/s "
        f"and {ceiling.flops_per_s / 1e9:.0f} GFLOP/s in {str(dtype).removeprefix('torch.')}.",
        markup=False,
    )


def _dtype() -> torch.dtype:
    """What a model is computed in here."""
    import torch

    from tokenrelay.kernels.packed import packs

    return torch.bfloat16 if packs(16) else torch.float32


def _workload(folder: Path | None, weights: str = "auto") -> Callable[[], object]:
    """A prompt, then steps of 1 and of 8 sequences, as an engine lays the model out but operation by operation."""
    import torch

    from tokenrelay.cli.serve import BUNDLED_MODEL
    from tokenrelay.runtime.executor.threads import default_threads, use_threads
    from tokenrelay.runtime.weights.loader import load_model
    from tokenrelay.runtime.weights.pack import pack_model
    from tokenrelay.runtime.weights.quantize import quantize_model, weight_bytes

    loaded = load_model(folder or BUNDLED_MODEL, dtype=_dtype(), block_tokens=BLOCK_TOKENS)
    if weights != "auto":
        quantize_model(loaded, weights)
    use_threads(default_threads(weight_bytes(loaded)))
    pack_model(loaded)
    steps = [
        _step(loaded, 1, 0, PROMPT_TOKENS),
        _step(loaded, 1, CONTEXT_TOKENS, 1),
        _step(loaded, 8, CONTEXT_TOKENS, 1),
    ]

    def run() -> None:
        with torch.inference_mode():
            for step in steps:
                step()

    return run


def _step(model: Model, rows: int, start: int, count: int) -> Callable[[], object]:
    """A step of `count` tokens each at position `start`, over caches of zeros."""
    import torch

    from tokenrelay.kernels.batch import AttentionBatch

    blocks = -(-(start + count) // BLOCK_TOKENS)
    layout = model.config.kv_layout
    caches = [torch.zeros(layout.shape(rows * blocks), dtype=model.config.kv_dtype) for _ in model.layers]
    table = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)
    positions = torch.arange(start, start + count).repeat(rows)
    row = torch.arange(rows).repeat_interleave(count)
    offsets = torch.arange(rows + 1, dtype=torch.int32) * count
    batch = AttentionBatch(
        block_table=table,
        slots=torch.arange(rows, dtype=torch.int32),
        starts=torch.full((rows,), start, dtype=torch.int32),
        lengths=torch.full((rows,), count, dtype=torch.int32),
        offsets=offsets,
        positions=positions,
        cache_slots=table[row, positions // BLOCK_TOKENS].long() * BLOCK_TOKENS + positions % BLOCK_TOKENS,
        decodes=rows if count == 1 else 0,
        context_max=start + count,
    )
    tokens = torch.randint(0, model.config.vocab_size, (rows * count,))
    ends = offsets[1:].long() - 1
    return lambda: model(tokens, batch, caches, ends)
