"""Random load with aborts against a server, and whether it stays whole: no leaked block, one terminal reply a request,
flat memory.

    python bench/soak.py                       # 30 minutes against a server of its own with the bundled model
    python bench/soak.py --quick               # 20 seconds
    python bench/soak.py --url http://host:8000 --minutes 5 --json result.json

Agents run sessions of growing conversations; some stream, some ask for several choices, some hang up at random, some
send nonsense. Exit code 1 when an invariant broke. Everything random comes from --seed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from tokenrelay.cli.machine import look
from tokenrelay.cli.own import OwnServer

sys.path.insert(0, str(Path(__file__).parent))
from load import Outcome, Pool, pool, send, settled_pool

TEXT = "the agent reads a file and writes its answer then calls a tool that lists what changed since last time"
WORDS = TEXT.split()
NONSENSE: tuple[dict[str, Any], ...] = (
    {"messages": []},
    {"messages": [{"role": "nobody", "content": "x"}]},
    {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
    {"messages": [{"role": "user", "content": "x"}], "n": 10_000},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": "many"},
)
FLAT_FRACTION, FLAT_BYTES = 0.05, 24 * 2**20  # growth of a process's memory over the second half that still is flat
FLAT_S = 300.0


@dataclass
class Tally:
    """What happened so far."""

    kinds: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    first_s: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome, expected: Sequence[str], what: str) -> None:
        """Take in a reply; one of a kind that is not expected is a problem."""
        self.kinds[outcome.kind] += 1
        self.problems += [f"{what}: {problem}" for problem in outcome.problems]
        if outcome.kind not in expected and not outcome.problems:
            self.problems.append(f"{what}: {outcome.kind} with status {outcome.status}: {outcome.error}")
        self.prompt_tokens += outcome.prompt_tokens
        self.cached_tokens += outcome.cached_tokens
        self.output_tokens += outcome.completion_tokens
        if outcome.first_s:
            self.first_s.append(outcome.first_s)


@dataclass(frozen=True)
class Sample:
    """The server at one moment."""

    at_s: float
    pool: Pool
    rss_bytes: dict[str, int]  # by process


class Soak:
    """Agents, a sampler, and the verdict."""

    def __init__(self, url: str, model: str, seed: int, pids: dict[str, int]) -> None:
        self._url = url
        self._model = model
        self._seed = seed
        self._pids = pids
        self.tally = Tally()
        self.samples: list[Sample] = []
        self._began_s = time.monotonic()

    async def run(self, seconds: float, agents: int) -> None:
        """The load, then quiet, then a last sample."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
            end_s = time.monotonic() + seconds
            sampler = asyncio.ensure_future(self._sample_until(session, end_s, min(10.0, max(1.0, seconds / 40))))
            async with asyncio.TaskGroup() as group:
                for number in range(agents):
                    group.create_task(self._agent(session, random.Random(f"{self._seed}/{number}"), end_s))
            await sampler
            self.samples.append(await self._sample(session, await settled_pool(session, self._url)))
        self._check_pool()

    async def _agent(self, session: aiohttp.ClientSession, rng: random.Random, end_s: float) -> None:
        while time.monotonic() < end_s:
            messages: list[dict[str, str]] = [{"role": "system", "content": _text(rng, rng.choice((8, 40)))}]
            for _ in range(rng.randint(1, 8)):
                messages.append({"role": "user", "content": _text(rng, rng.choice((4, 30, 120)))})
                outcome = await self._turn(session, rng, messages)
                messages.append({"role": "assistant", "content": outcome.text})
                await asyncio.sleep(min(2.0, rng.expovariate(4.0)))
                if time.monotonic() >= end_s:
                    return

    async def _turn(self, session: aiohttp.ClientSession, rng: random.Random, messages: list[Any]) -> Outcome:
        if rng.random() < 0.05:
            body: dict[str, Any] = {"model": self._model, **rng.choice(NONSENSE)}
            outcome = await send(session, self._url, "/v1/chat/completions", body)
            self.tally.add(outcome, ["errored"], f"nonsense {json.dumps(body)[:120]}")
            return outcome
        body = {
            "model": self._model,
            "max_tokens": rng.choice((1, 8, 32, 96)),
            "temperature": rng.choice((0, 0.7, 1.0)),
            "seed": rng.randrange(2**32),
            "n": rng.choice((1, 1, 1, 2)),
        }
        stream = rng.random() < 0.8
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if rng.random() < 0.2:
            body["ignore_eos"] = True
        if rng.random() < 0.2:
            body["stop"] = rng.sample(WORDS, 2)
        abort_after = rng.choice((0, 1, 2, 8)) if stream and rng.random() < 0.33 else None
        if rng.random() < 0.8:
            path, body["messages"] = "/v1/chat/completions", messages
        else:
            path, body["prompt"] = "/v1/completions", _text(rng, 60)
        outcome = await send(session, self._url, path, body, abort_after=abort_after)
        expected = ["completed", "refused"] + ([] if abort_after is None else ["aborted"])
        self.tally.add(outcome, expected, f"{path} {json.dumps(body)[:200]}")
        return outcome

    async def _sample_until(self, session: aiohttp.ClientSession, end_s: float, every_s: float) -> None:
        while time.monotonic() < end_s:
            self.samples.append(await self._sample(session, await pool(session, self._url)))
            await asyncio.sleep(every_s)

    async def _sample(self, session: aiohttp.ClientSession, found: Pool) -> Sample:
        rss = {name: rss_bytes(pid) for name, pid in self._pids.items()}
        return Sample(round(time.monotonic() - self._began_s, 1), found, rss)

    def _check_pool(self) -> None:
        totals = {sample.pool.total for sample in self.samples}
        if len(totals) != 1:
            self.tally.problems.append(f"free + cached + active was {sorted(totals)}, expected one constant pool")
        last = self.samples[-1].pool
        if last.active:
            self.tally.problems.append(f"{last.active} blocks are active though nothing runs: a leak")

    def growth(self) -> dict[str, dict[str, float]]:
        """Per process: memory at the middle and at the end (medians of an eighth of a run), and whether it is flat.

        A run of less than FLAT_S is still warming up: its growth is told, not judged.
        """
        found = {}
        window = max(1, len(self.samples) // 8)
        for name in self._pids:
            series = [sample.rss_bytes[name] for sample in self.samples]
            middle = statistics.median(series[len(series) // 2 :][:window])
            last = statistics.median(series[-window:])
            grown = last - middle
            flat = grown <= max(FLAT_BYTES, FLAT_FRACTION * middle)
            found[name] = {
                "middle_mib": round(middle / 2**20, 1),
                "last_mib": round(last / 2**20, 1),
                "peak_mib": round(max(series) / 2**20, 1),
                "flat": float(flat),
            }
            if not flat and self.samples[-1].at_s >= FLAT_S:
                self.tally.problems.append(f"{name} grew by {grown / 2**20:.0f} MiB over the second half")
        return found


def rss_bytes(pid: int) -> int:
    """Resident memory of a process (proc(5), VmRSS). 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS:")), 0)


def _text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def report(soak: Soak, seconds: float, agents: int, seed: int, commit: str) -> dict[str, Any]:
    """The result as it is printed and stored."""
    tally = soak.tally
    memory = soak.growth()
    first = sorted(tally.first_s)
    last = soak.samples[-1].pool
    return {
        "bench": "soak",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": look().summary(),
        "commit": commit,
        "seed": seed,
        "agents": agents,
        "figures": {
            "seconds": round(seconds, 1),
            "requests": sum(tally.kinds.values()),
            **{kind: tally.kinds[kind] for kind in sorted(tally.kinds)},
            "requests_per_s": round(sum(tally.kinds.values()) / seconds, 2),
            "output_tokens_per_s": round(tally.output_tokens / seconds, 1),
            "cached_share_of_prompts": round(tally.cached_tokens / max(1, tally.prompt_tokens), 3),
            "first_token_p50_ms": round(1000 * first[len(first) // 2], 1) if first else None,
            "first_token_p99_ms": round(1000 * first[len(first) * 99 // 100], 1) if first else None,
            "blocks_free": last.free,
            "blocks_cached": last.cached,
            "blocks_active": last.active,
            "problems": len(tally.problems),
        },
        "memory": memory,
        "problems": tally.problems[:50],
        "samples": [dataclasses.asdict(sample) for sample in soak.samples],
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


async def _model_name(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v1/models") as response:
        return str((await response.json())["data"][0]["id"])


def main() -> int:
    """Run it; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; without it one is started")
    parser.add_argument("--model", help="model folder for the server that is started; default: the bundled one")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="20 seconds")
    parser.add_argument("--agents", type=int, default=16, help="sessions at once")
    parser.add_argument(
        "--blocks", type=int, default=512, help="KV pool of the server that is started: small, so that it is soon full"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--pid", action="append", default=[], metavar="NAME=PID", help="with --url: sample its memory")
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="the result as JSON, by default to stdout")
    options = parser.parse_args()
    seconds = 20.0 if options.quick else options.minutes * 60
    commit = _commit()  # now: it may change while this runs
    with ExitStack() as stack:
        pids = {name: int(pid) for name, _, pid in (item.partition("=") for item in options.pid)}
        url = options.url
        if url is None:
            arguments = [options.model] if options.model else []
            arguments += ["--blocks", str(options.blocks), "--log-level", "warning"]
            server = stack.enter_context(OwnServer(arguments, quiet=True))
            url, pids = server.url, {name: server.facts[f"{name}_pid"] for name in ("worker", "router")}
            pids["supervisor"] = server.process.pid
        soak = Soak(url, asyncio.run(_model_name(url)), options.seed, pids)
        began_s = time.monotonic()
        asyncio.run(soak.run(seconds, options.agents))
        result = report(soak, time.monotonic() - began_s, options.agents, options.seed, commit)
    _print(result, options.json)
    return 1 if soak.tally.problems else 0


def _print(result: dict[str, Any], target: str | None) -> None:
    if target == "-":
        print(json.dumps(result))
        return
    for name, value in result["figures"].items():
        print(f"{name:<26} {value}")
    for name, memory in result["memory"].items():
        print(f"{name + ' memory':<26} {memory['middle_mib']} MiB in the middle, {memory['last_mib']} at the end")
    for problem in result["problems"]:
        print(f"PROBLEM {problem}")
    if target:
        Path(target).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
