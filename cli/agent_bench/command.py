"""`tokenrelay bench agent`: from the command line to a table, a JSON file and an HTML report.

Ctrl-C ends the load that runs and writes what was measured so far; a second one ends at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import json
import math
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.version import version
from tokenrelay.cli.agent_bench.drive import LoadRun
from tokenrelay.cli.agent_bench.endpoint import Endpoint
from tokenrelay.cli.agent_bench.measure import Figures, best, figures
from tokenrelay.cli.agent_bench.records import Settings
from tokenrelay.cli.agent_bench.report import page
from tokenrelay.cli.agent_bench.search import Search
from tokenrelay.cli.agent_bench.text import Ruler
from tokenrelay.cli.agent_bench.workload import TraceRow, read_trace
from tokenrelay.cli.console import bars
from tokenrelay.cli.own import OwnServer

LOOK_S = 0.25
TABLE_COLUMNS = 140  # where there is no terminal to ask
INTERRUPTED = 130  # as shells have it


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is measured, and where the result goes."""

    url: str | None
    model: str | None
    api_key: str = ""
    json: Path | None = None
    html: Path | None = None


def run_agent_bench(target: Target, settings: Settings) -> int:
    """The exit code. Raises TokenRelayError."""
    for path in (target.json, target.html):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(f"cannot write {path}: its folder does not exist")
    rows = read_trace(settings.trace, settings.requests) if settings.trace is not None else None
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        url, model = target.url, target.model
        if url is None:
            url, model = _start_own(target.model, console, stack), None
        endpoint = Endpoint(url, model=model or "", api_key=target.api_key, timeout_s=settings.request_timeout_s)
        result = asyncio.run(_measure(endpoint, settings, rows, console))
    out = Console(width=None if sys.stdout.isatty() else TABLE_COLUMNS)
    out.print(table(result["loads"]))
    out.print(result["summary"], soft_wrap=True, highlight=False, markup=False)
    _write(target, result)
    return INTERRUPTED if result["interrupted"] else 0


def _start_own(model: str | None, console: Console, stack: contextlib.ExitStack) -> str:
    with bars(console) as progress:
        task = progress.add_task("starting a server", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(task, description=f"loading {what}", completed=done, total=total)

        arguments = ([] if model is None else [model]) + ["--log-level", "error"]
        return stack.enter_context(OwnServer(arguments, on_progress=on_progress, quiet=True)).url


async def _measure(
    endpoint: Endpoint, settings: Settings, rows: list[TraceRow] | None, console: Console
) -> dict[str, Any]:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)  # a second one is the interpreter's

    loads: list[Figures] = []
    async with endpoint:
        ruler = await endpoint.calibrate()
        loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            search = Search(settings)
            with _progress(console) as progress:
                while not stop.is_set() and (load := search.next()) is not None:
                    found = await _one_load(endpoint, settings, ruler, load, rows, stop, progress)
                    found["cut_short"] = stop.is_set()
                    loads.append(found)
                    search.result(load, bool(found["held"]))
                    if not console.is_terminal:
                        print(f"tokenrelay: {line(found)}", file=sys.stderr, flush=True)
        finally:
            loop.remove_signal_handler(signal.SIGINT)
    return {
        "bench": "agent",
        "version": version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "endpoint": endpoint.url,
        "model": endpoint.model,
        "workload": workload_text(settings),
        "settings": _plain(settings),
        "chars_per_token": round(ruler.chars_per_token, 3),
        "answers_as_long_as_asked": endpoint.ignores_end,
        "tokens_counted_by": "usage" if endpoint.streams_usage else "chunks, and prompts by their length",
        "interrupted": stop.is_set(),
        "loads": loads,
        "best": best(loads),
        "summary": summary(loads, settings),
    }


async def _one_load(
    endpoint: Endpoint,
    settings: Settings,
    ruler: Ruler,
    load: float,
    rows: list[TraceRow] | None,
    stop: asyncio.Event,
    progress: Progress,
) -> Figures:
    run = LoadRun(endpoint, settings, ruler, load, rows)
    span_s = run.span_s
    task = progress.add_task(f"{load:g} {settings.unit}", total=span_s, said="")
    playing = asyncio.create_task(run.play(stop))
    while not playing.done():
        await asyncio.wait([playing], timeout=LOOK_S)
        done = [one for one in run.records if one.end == "done"]
        failed = sum(one.end in ("failed", "refused") for one in run.records)
        tokens = sum(one.output_tokens for one in done)
        said = f"{run.open} open, {len(done)} done, {tokens:,} tokens out"
        progress.update(task, completed=min(run.clock(), span_s), said=f"{said}, {failed} failed" if failed else said)
    await playing
    found = figures(run.records, run.window_s, load, settings, run.held_back)
    progress.update(task, completed=span_s, said=line(found, short=True))
    return found


def _progress(console: Console) -> Progress:
    columns = (
        SpinnerColumn(finished_text=" "),
        TextColumn("{task.description}"),
        BarColumn(28),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


# -- words ------------------------------------------------------------------------------------------------------------
def workload_text(settings: Settings) -> str:
    """What is replayed, for people."""
    if settings.trace is not None:
        return f"{settings.trace.name}, its first {settings.requests} requests, lengths x {settings.scale:g}"
    names = ("first_tokens", "system_tokens", "turn_tokens", "output_tokens")
    first, system, turn, output = (f"{settings.scaled(getattr(settings, name)):,}" for name in names)
    low, high = settings.turns
    return (
        f"sessions of {low} to {high} turns: {first} tokens first ({system} of them shared), then {turn} more a turn, "
        f"answers of {output}"
    )


def line(found: Figures, *, short: bool = False) -> str:
    """One load in a line."""
    tps, first = found["tps"], found["ttft_s"]["p95"]
    said = f"{found['tpm_per_device']:,.0f} TPM/device"
    if tps["p5"] is not None:
        said += f", users {tps['p50']:.0f} TPS (slowest 5 %: {tps['p5']:.0f})"
    if first is not None:
        said += f", first token p95 {first:.2f} s"
    said += ", held" if found["held"] else f", not held: {found['why_not']}"
    return said if short else f"{found['load']:g} {found['unit']}: {said}"


def summary(loads: list[Figures], settings: Settings) -> str:
    """The one sentence."""
    winner = best(loads)
    if winner is None:
        return f"No load kept {settings.floor:g} tokens/s for every user."
    cached = "" if winner["hit_rate"] is None else f", {100 * winner['hit_rate']:.0f} % of prompts from caches"
    ideal = "" if winner["ideal_hit_rate"] is None else f" (ideal {100 * winner['ideal_hit_rate']:.0f} %)"
    return (
        f"{winner['tpm_per_device']:,.0f} tokens a minute and device at {winner['load']:g} {winner['unit']}, while the "
        f"slowest 5 % of answers got {winner['tps']['p5']:.0f} tokens/s (floor {settings.floor:g}){cached}{ideal}."
    )


def table(loads: list[Figures]) -> Table:
    """All loads, for a terminal."""
    found = Table(box=None, header_style="bold", padding=(0, 1))
    heads = ("load", "TPM/device", "TPS p50", "TPS p5", "TTFT p50", "TTFT p95", "ITL p50", "ITL p99", "cached", "ideal")
    for head in (*heads, "done", "failed"):
        found.add_column(head, justify="right")
    found.add_column("held")
    for one in sorted(loads, key=lambda one: float(one["load"])):
        times = [one["ttft_s"]["p50"], one["ttft_s"]["p95"], one["itl_s"]["p50"], one["itl_s"]["p99"]]
        rates = [one["hit_rate"], one["ideal_hit_rate"]]
        found.add_row(
            f"{one['load']:g}",
            f"{one['tpm_per_device']:,.0f}",
            *("–" if one["tps"][name] is None else f"{one['tps'][name]:.1f}" for name in ("p50", "p5")),
            *("–" if value is None else f"{1000 * value:,.0f} ms" for value in times),
            *("–" if value is None else f"{100 * value:.0f} %" for value in rates),
            str(one["requests"]),
            str(one["failed"] + one["refused"]),
            "yes" if one["held"] else "no",
        )
    return found


def _plain(settings: Settings) -> dict[str, Any]:
    """As JSON has it: no infinities, paths as text."""
    found = dataclasses.asdict(settings)
    found["trace"] = None if settings.trace is None else str(settings.trace)
    found["ttft_max_s"] = None if math.isinf(settings.ttft_max_s) else settings.ttft_max_s
    return found


def _write(target: Target, result: dict[str, Any]) -> None:
    texts = {target.json: json.dumps(result, indent=2) + "\n", target.html: page(result)}
    for path, text in texts.items():
        if path is None:
            continue
        try:
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from error
        print(f"tokenrelay: wrote {path}", file=sys.stderr)
