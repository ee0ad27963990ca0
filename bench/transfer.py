"""How fast KV moves between two processes: each transport beside raw NIXL, in one run.

    python bench/transfer.py --quick
    python bench/transfer.py --json bench/results/transfer.json

One process owns a pool of 8 layers x 64 KiB blocks, this one pulls from it: sizes from one extent up, once with
neighbouring blocks (they coalesce) and once with blocks in random order at both ends (none does). `nixl_raw` is the
same read by NIXL's own API with nothing of ours around it: polled without a pause, one transfer for all descriptors.
Kinds take turns, so that what else the machine does hits all alike; times are medians. `of_raw` is raw NIXL's time by
ours (above 1: faster than raw), `best_of_raw` the same of the best times. `cpu_ms` is processor time of
this process, what a busy machine disturbs least; `cpu_by_raw` ours by raw NIXL's (below 1: less). `validate_ms` is what
the read of the generation words takes after the data.

What of a transfer does not overlap with the prefill is a matter of the services; their benchmark can call `measure`
for the raw rate of its own run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tokenrelay.base.deadlines import Deadline
from tokenrelay.base.ids import incarnation
from tokenrelay.base.version import version
from tokenrelay.transfer.memory import Layout, Memory, SharedPool
from tokenrelay.transfer.runs import Runs, Span, coalesce
from tokenrelay.transfer.select import available, open_transport
from tokenrelay.transfer.transport import Connection, Identity, Transport

LAYERS = 8
BLOCK_BYTES = 64 << 10
SIZES = [64 << 10, 1 << 20, 8 << 20, 64 << 20, 512 << 20]
SIZES_QUICK = [64 << 10, 1 << 20, 8 << 20, 64 << 20]
REPEATS_MAX = 200
DEADLINE_S = 120.0


def layout() -> Layout:
    """Of the pools."""
    return Layout(
        model_identity=bytes(16),
        dtype="bfloat16",
        block_tokens=64,
        layout="bench",
        block_bytes=(BLOCK_BYTES,) * LAYERS,
    )


def new_pool(blocks: int) -> tuple[SharedPool, Memory]:
    """With every page touched."""
    pool = SharedPool(layout().block_bytes, blocks)
    for view in pool.layers:
        np.frombuffer(view, dtype=np.uint64)[:] = 7
    return pool, pool.memory(layout())


# Raw NIXL: its own API.


def raw_agent(name: str, memory: Memory) -> Any:
    """An agent that knows the pool's regions."""
    from nixl_cu12._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    rows = [(region.address, region.bytes, 0, "") for region in memory.regions]
    agent.register_memory(agent.get_reg_descs(rows, mem_type="DRAM"))
    return agent


def descriptors(addresses: list[int], layers: Any, blocks: Any, counts: Any) -> Any:
    """uint64 [n, 3] of runs."""
    bases = np.array(addresses, dtype=np.int64)
    columns = [bases[layers] + blocks * BLOCK_BYTES, counts * BLOCK_BYTES, np.zeros_like(counts)]
    return np.stack(columns, axis=1).astype(np.uint64)


class Raw:
    """Reads as plainly as NIXL allows."""

    def __init__(self, memory: Memory, remote: dict[str, Any]) -> None:
        self._memory = memory
        self._remote = remote["addresses"]
        self._agent = raw_agent("bench-reader", memory)
        self._name = self._agent.add_remote_agent(bytes.fromhex(remote["metadata"]))

    async def read(self, runs: Runs) -> None:
        """One transfer."""
        agent, here = self._agent, [region.address for region in self._memory.regions]
        target = agent.get_xfer_descs(descriptors(here, runs.layers, runs.local, runs.blocks), mem_type="DRAM")
        source = agent.get_xfer_descs(descriptors(self._remote, runs.layers, runs.remote, runs.blocks), mem_type="DRAM")
        handle = agent.initialize_xfer("READ", target, source, self._name)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        assert state == "DONE", state


# The owner: a process of its own.


async def own(folder: str, blocks: int) -> None:
    """Serve the pool by every transport until stdin ends."""
    _, memory = new_pool(blocks)
    life, endpoints, transports = incarnation(), {}, []
    for kind in available():
        transport = open_transport(kind, Identity("owner", f"{life}-{kind}"), memory, listen=f"unix:{folder}/{kind}")
        await transport.open()
        transports.append(transport)
        endpoints[kind] = transport.endpoint().hex()
    raw = None
    if "nixl" in available():
        agent = raw_agent("bench-owner", memory)
        raw = {
            "metadata": agent.get_agent_metadata().hex(),
            "addresses": [region.address for region in memory.regions],
        }
        threading.Thread(target=progress, args=(agent,), daemon=True).start()
    print(json.dumps({"endpoints": endpoints, "raw": raw}), flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for transport in transports:
        await transport.close()


def progress(agent: Any) -> None:
    """Where UCX needs the target to go on."""
    while True:
        agent.get_new_notifs()
        time.sleep(200e-6)


# The reader.


async def measure(quick: bool) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Figures (first contact) and one result per case and kind."""
    sizes = SIZES_QUICK if quick else SIZES
    blocks = sizes[-1] // BLOCK_BYTES // LAYERS
    with tempfile.TemporaryDirectory(prefix="tr-") as folder:
        command = [sys.executable, __file__, "--own", folder, str(blocks)]
        owner = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24
        )
        assert owner.stdout is not None
        assert owner.stdin is not None
        told = json.loads(await owner.stdout.readline())
        try:
            return await read_all(told, folder, sizes, blocks, 0.5 if quick else 3.0)
        finally:
            owner.stdin.close()
            await owner.wait()


async def read_all(
    told: dict[str, Any], folder: str, sizes: list[int], blocks: int, case_s: float
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Connect by every kind, then case after case."""
    _, memory = new_pool(blocks)
    figures: dict[str, float] = {}
    readers: dict[str, Callable[[list[Span], Runs], Awaitable[None]]] = {}
    connections: dict[str, Connection] = {}
    transports: list[Transport] = []
    for kind, endpoint in told["endpoints"].items():
        transport = open_transport(kind, Identity("reader", incarnation()), memory, listen=f"unix:{folder}/r-{kind}")
        await transport.open()
        began_s = time.perf_counter()
        connection = connections[kind] = await transport.connect(bytes.fromhex(endpoint), Deadline.after(DEADLINE_S))
        await connection.pull([Span(0, 1, [0], [0])], Deadline.after(DEADLINE_S))
        figures[f"{kind}, connect and first extent_ms"] = round((time.perf_counter() - began_s) * 1e3, 2)
        transports.append(transport)
        readers[kind] = lambda spans, _, c=connection: c.pull(spans, Deadline.after(DEADLINE_S))  # type: ignore[misc]
    if told["raw"] is not None:
        raw = Raw(memory, told["raw"])
        readers["nixl_raw"] = lambda _, runs: raw.read(runs)
    results: list[dict[str, Any]] = []
    for size in sizes:
        for order in ("neighbours", "scattered"):
            results += await case(size, order, blocks, readers, connections, case_s)
    for transport in transports:
        await transport.close()
    return figures, results


def spans_of(size: int, order: str, blocks: int) -> list[Span]:
    """`size` bytes over as many layers as it takes."""
    extents = size // BLOCK_BYTES
    layers = min(LAYERS, extents)
    count = extents // layers
    if order == "neighbours":
        return [Span(0, layers, np.arange(count), np.arange(blocks - count, blocks))]
    shuffled = random.Random(size)
    remote, local = shuffled.sample(range(blocks), count), shuffled.sample(range(blocks), count)
    return [Span(0, layers, remote, local)]


async def case(
    size: int,
    order: str,
    blocks: int,
    readers: dict[str, Callable[[list[Span], Runs], Awaitable[None]]],
    connections: dict[str, Connection],
    case_s: float,
) -> list[dict[str, Any]]:
    """All kinds in turn, until the time is used up; medians."""
    spans = spans_of(size, order, blocks)
    runs = coalesce(spans, layers=LAYERS, remote_blocks=blocks, local_blocks=blocks)
    times: dict[str, list[float]] = {kind: [] for kind in readers}
    processor: dict[str, list[float]] = {kind: [] for kind in readers}
    checks: dict[str, list[float]] = {kind: [] for kind in connections}
    for read in readers.values():
        await read(spans, runs)
    until_s = time.perf_counter() + case_s
    while len(times["shared"]) < 3 or (time.perf_counter() < until_s and len(times["shared"]) < REPEATS_MAX):
        for kind, read in readers.items():
            began_s, used_s = time.perf_counter(), time.process_time()
            await read(spans, runs)
            times[kind].append(time.perf_counter() - began_s)
            processor[kind].append(time.process_time() - used_s)
            if kind in connections:
                began_s = time.perf_counter()
                await connections[kind].generations(spans[0].remote_blocks, Deadline.after(DEADLINE_S))
                checks[kind].append(time.perf_counter() - began_s)
    raw_s = statistics.median(times["nixl_raw"]) if "nixl_raw" in times else None
    rows = []
    for kind, taken in times.items():
        median_s = statistics.median(taken)
        row: dict[str, Any] = {
            "transport": kind,
            "case": f"{size >> 10} KiB {order}",
            "bytes": size,
            "descriptors": len(runs),
            "repeats": len(taken),
            "ms": round(median_s * 1e3, 4),
            "best_ms": round(min(taken) * 1e3, 4),
            "cpu_ms": round(statistics.median(processor[kind]) * 1e3, 4),
            "gb_per_s": round(size / median_s / 1e9, 3),
        }
        if raw_s is not None and kind != "nixl_raw":
            row["of_raw"] = round(raw_s / median_s, 3)
            row["best_of_raw"] = round(min(times["nixl_raw"]) / min(taken), 3)
            row["cpu_by_raw"] = round(row["cpu_ms"] / (statistics.median(processor["nixl_raw"]) * 1e3), 3)
        if kind in checks:
            row["validate_ms"] = round(statistics.median(checks[kind]) * 1e3, 4)
        rows.append(row)
    return rows


def installed(name: str) -> bool:
    """Whether the distribution is there."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Print a table, and write it where --json says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="seconds, and up to 64 MiB")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--own", nargs=2, metavar=("FOLDER", "BLOCKS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.own:
        asyncio.run(own(options.own[0], int(options.own[1])))
        return
    figures, results = asyncio.run(measure(options.quick))
    for name, value in figures.items():
        print(f"{name:44} {value:10.2f}")
    print(f"{'transport':10} {'case':24} {'runs':>6} {'ms':>10} {'GB/s':>8}", end="")
    print(f" {'of raw':>8} {'best':>6} {'cpu ms':>9} {'by raw':>6} {'validate ms':>12}")
    for row in results:
        print(
            f"{row['transport']:10} {row['case']:24} {row['descriptors']:6} {row['ms']:10.3f} {row['gb_per_s']:8.2f} "
            f"{row.get('of_raw', ''):>8} {row.get('best_of_raw', ''):>6} {row['cpu_ms']:9.3f} "
            f"{row.get('cpu_by_raw', ''):>6} {row.get('validate_ms', ''):>12}"
        )
    if options.json:
        machine = {"cores": len(os.sched_getaffinity(0)), "load_1min": round(os.getloadavg()[0], 1)}
        told = {
            "bench": "transfer",
            "version": version(),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine,
            "versions": {name: metadata.version(name) for name in ("grpcio", "numpy", "nixl-cu12") if installed(name)},
            "figures": figures,
            "results": results,
        }
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
