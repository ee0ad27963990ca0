"""What integer weights cost in exactness and give in speed: the bundled model, or any folder, as it is and quantized.

    python bench/quantized.py [--quick] [--json FILE] [--model DIR]

Perplexity is of the assistant's tokens in held-out dialogues of the bundled model's own world (nothing of them was
trained on), every token given the right text before it. Speed is of a decode step of 1 and of 8 rows after 256 tokens,
and of a prompt of 1,024, medians of wall time; with `--model` only speed is measured, the tokens mean nothing to it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from scheduler import about  # noqa: E402 - once its folder is known

from tokenrelay.cli.held_out import perplexity  # noqa: E402
from tokenrelay.kernels.ops import AttentionBatch  # noqa: E402
from tokenrelay.runtime.executor.threads import default_threads, use_threads  # noqa: E402
from tokenrelay.runtime.models.decoder import Model  # noqa: E402
from tokenrelay.runtime.weights.loader import load_model  # noqa: E402
from tokenrelay.runtime.weights.quantize import quantize_model, weight_bytes  # noqa: E402

BUNDLED = ROOT / "assets/tokenrelay-tiny"
FORMS = ("auto", "int8", "int4-32", "int4", "int4-128")
CONTEXT, PROMPT, BLOCK_TOKENS = 256, 1024, 64


class Steps:
    """A model and caches of a few sequences, each in blocks of its own, in order."""

    def __init__(self, model: Model, rows: int, tokens_max: int) -> None:
        self.model = model
        blocks = -(-tokens_max // BLOCK_TOKENS)
        layout = model.config.kv_layout
        self.caches = [torch.zeros(layout.shape(rows * blocks), dtype=model.config.dtype) for _ in model.layers]
        self.table = torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks)

    def run(self, tokens: torch.Tensor, start: int, *, every: bool = False) -> torch.Tensor:
        """tokens int64 [rows, n] at positions [start, start + n) -> logits, of the last ones or of every one."""
        rows, count = tokens.shape
        positions = torch.arange(start, start + count).repeat(rows)
        row = torch.arange(rows).repeat_interleave(count)
        ends = torch.arange(1, rows + 1) * count
        batch = AttentionBatch(
            block_table=self.table,
            slots=torch.arange(rows, dtype=torch.int32),
            starts=torch.full((rows,), start, dtype=torch.int32),
            lengths=torch.full((rows,), count, dtype=torch.int32),
            offsets=torch.cat((torch.zeros(1), ends)).int(),
            positions=positions,
            cache_slots=self.table[row, positions // BLOCK_TOKENS].long() * BLOCK_TOKENS + positions % BLOCK_TOKENS,
            decodes=rows if count == 1 and start > 0 else 0,
            context_max=start + count,
        )
        wanted = torch.arange(rows * count) if every else ends - 1
        logits: torch.Tensor = self.model(tokens.flatten(), batch, self.caches, wanted)
        return logits


def measured(model: Model, dialogues: int) -> float:
    """Perplexity, with a bar."""
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("perplexity", total=dialogues)
        return perplexity(model, BUNDLED, dialogues, lambda _: progress.advance(task))


def median_ms(repeat: int, work: Callable[[], Any]) -> float:
    """Of wall time, after one run that is not counted."""
    work()
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e3


def speeds(model: Model, repeat: int) -> dict[str, float]:
    """Milliseconds of steps."""
    steps, ids = Steps(model, 8, CONTEXT + 1), torch.randint(5, 500, (8, CONTEXT + 1))
    steps.run(ids[:, :CONTEXT], 0)
    one, prompt = Steps(model, 1, CONTEXT + 1), Steps(model, 1, PROMPT)
    one.run(ids[:1, :CONTEXT], 0)
    long = torch.randint(5, 500, (1, PROMPT))
    return {
        "decode_1_ms": median_ms(repeat, lambda: one.run(ids[:1, CONTEXT:], CONTEXT)),
        "decode_8_ms": median_ms(repeat, lambda: steps.run(ids[:, CONTEXT:], CONTEXT)),
        "prefill_1024_ms": median_ms(max(3, repeat // 10), lambda: prompt.run(long, 0)),
    }


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer dialogues and repetitions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the result into this file")
    parser.add_argument("--model", type=Path, default=None, metavar="DIR", help="speed of another model's folder")
    options = parser.parse_args()
    dialogues, repeat = (16, 20) if options.quick else (300, 100)
    results: list[dict[str, Any]] = []
    for form in FORMS:
        model = load_model(options.model or BUNDLED, dtype=torch.bfloat16, context_tokens=2048)
        if form != "auto":
            quantize_model(model, form)
        use_threads(default_threads(weight_bytes(model)))
        row: dict[str, Any] = {"weights": "bfloat16" if form == "auto" else form, "bytes": weight_bytes(model)}
        if options.model is None:
            row["perplexity"] = measured(model, dialogues)
        results.append(row | speeds(model, repeat))
    table = Table(title="integer weights" if options.model is None else str(options.model))
    for name in results[0]:
        table.add_column(name, justify="left" if name == "weights" else "right")
    for row in results:
        table.add_row(*(value if isinstance(value, str) else f"{value:,.5g}" for value in row.values()))
    Console(width=120).print(table)
    head = {"bench": "quantized", **about(), "dialogues": dialogues if options.model is None else 0}
    print(", ".join(f"{name}: {value}" for name, value in head.items()))
    if options.json is not None:
        options.json.write_text(json.dumps(head | {"results": results}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
