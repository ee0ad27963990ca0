"""The router beside smg and sglang-router, in front of mock workers of one pace, in one run.

    python bench/router_peers.py --setup           # the peers, each in an environment under .cache/bench/venvs
    python bench/router_peers.py --quick
    python bench/router_peers.py --json result.json

Rows: bodies of 1 kB and 200 kB, without tokenization and with it.

    without   ours: a prompt of token ids (/v1/completions) -> gRPC mock worker
              smg, sglang-router: a chat, whose bytes pass to a mock OpenAI server over HTTP
    with      ours: a chat -> template, tokens -> gRPC mock worker
              smg: the same chat -> template, tokens -> mock worker in SGLang's gRPC protocol, its tokenizer caches on

sglang-router's gRPC mode loads a vocabulary from the network when it starts, so it is measured without tokenization
only. Each body ends in words of its own, as a next turn does; what comes before them is the same. Figures of one row:
requests/s of replies of one token, 32 at once; how much one user's stream of one token takes beyond asking a mock
OpenAI server itself (p50, p99); and the CPU of the router's process alone, of a request and of a streamed token (32
streams of 64 tokens at 100 tokens/s; the request's own share is taken off). The mock workers are Python, too, and take
what they take: CPU of the router is what says most.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvloop

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "tests/support")]

from router import MOCK_WORKER, Chain, about, free_port, load, percentile  # noqa: E402 - its folder

MODEL = ROOT / "assets/tokenrelay-tiny"
VENVS = ROOT / ".cache/bench/venvs"
PACKAGES = {"smg": ["smg>=1.13,<2", "smg-grpc-proto"], "sglang-router": ["sglang-router>=0.3.2,<0.4"]}
SIZES = {"1 kB": 1_000, "200 kB": 200_000}
CONTEXT_TOKENS = 1 << 20
START_S = 60.0
WORDS = "Please read the file notes.txt and tell me what it says about the quick brown fox. "
TURN_CHARS = 2_000
TOKENS, STEP_MS = 64, 10.0


def setup() -> None:
    """Install the peers."""
    for name, packages in PACKAGES.items():
        subprocess.run([sys.executable, "-m", "venv", VENVS / name], check=True)
        subprocess.run([VENVS / name / "bin/pip", "install", "-q", *packages], check=True)


# -- bodies ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Bodies:
    """Requests of one size that differ in their last words."""

    path: str
    before: bytes
    after: bytes
    numbers: Iterator[int] = dataclasses.field(default_factory=itertools.count)

    def next(self) -> bytes:
        return self.before + b"%08d" % (next(self.numbers) % 10**8) + self.after


def chat_bodies(size: int, *, stream: bool, tokens: int) -> Bodies:
    """A conversation of so many bytes, turn after turn."""
    turns = max(1, size // TURN_CHARS)
    text = (WORDS * (size // len(WORDS) + 1))[: size // turns]
    messages = [{"role": ("user", "assistant")[n % 2], "content": f"{n}: {text}"} for n in range(turns - 1)]
    head = {"model": "mock", "stream": stream, "max_tokens": tokens, "ignore_eos": True}
    raw = json.dumps({**head, "messages": [*messages, {"role": "user", "content": f"{text} @"}]}).encode()
    before, _, after = raw.rpartition(b"@")
    return Bodies("/v1/chat/completions", before, after)


def token_bodies(size: int, *, stream: bool, tokens: int) -> Bodies:
    """A prompt of token ids in so many bytes; the last ones differ."""
    ids = [300 + n % 600 for n in range((size - 120) // 4)]
    head = {"model": "mock", "stream": stream, "max_tokens": tokens, "ignore_eos": True}
    raw = json.dumps({**head, "prompt": ids}, separators=(",", ":")).encode()
    return _Digits("/v1/completions", raw[:-2] + b",", b"]}")


class _Digits(Bodies):
    """The number as four token ids."""

    def next(self) -> bytes:
        number = next(self.numbers)
        ids = b",".join(b"%d" % (300 + number // 10**k % 10) for k in range(4))
        return self.before + ids + self.after


# -- chains ----------------------------------------------------------------------------------------------------------
@dataclass
class Peer:
    """One way to the tokens."""

    name: str
    chain: Chain
    bodies: Any  # size, stream, tokens -> Bodies


def _commands(ports: dict[str, int], address: str, step_ms: float) -> dict[str, list[str]]:
    """What to start, by name; the peers that are installed."""
    this, python, model = str(ROOT / "bench/router.py"), sys.executable, str(MODEL)
    pace, quiet = ["--tokens", str(TOKENS), "--step-ms", str(step_ms)], ["--log-level", "warning"]
    quiet += ["--worker", f"unix:{address}"]
    smg, sglang = VENVS / "smg/bin", VENVS / "sglang-router/bin"
    context = ["--context-tokens", str(CONTEXT_TOKENS)]
    found = {
        "worker": [python, str(MOCK_WORKER), "--socket", address, "--model", model, *pace, *context],
        "upstream": [python, this, "--serve", "upstream", "--port", str(ports["upstream"]), *pace],
        "ours": [python, "-m", "tokenrelay.services.router", "--port", str(ports["ours"]), *quiet],
    }

    def launch(program: Path, name: str, target: str, *more: str) -> list[str]:
        port, metrics = str(ports[name]), str(free_port())
        said = ["--policy", "round_robin", "--log-level", "error", "--prometheus-port", metrics]
        return [str(program), "launch", "--host", "127.0.0.1", "--port", port, "--worker-urls", target, *said, *more]

    http, grpc = f"http://127.0.0.1:{ports['upstream']}", f"grpc://127.0.0.1:{ports['sglang_worker']}"
    if (smg / "smg").exists():
        caches = ["--tokenizer-cache-enable-l0", "--tokenizer-cache-enable-l1"]
        script = str(ROOT / "bench/routers/sglang_worker.py")
        found["sglang_worker"] = [str(smg / "python"), script, "--port", str(ports["sglang_worker"]), "--model", model]
        found["sglang_worker"] += pace
        found["smg"] = launch(smg / "smg", "smg", http)
        found["smg, tokens"] = launch(smg / "smg", "smg, tokens", grpc, "--model-path", model, *caches)
    if (sglang / "sglang-router").exists():
        found["sglang-router"] = launch(sglang / "sglang-router", "sglang-router", http)
    return found


@contextlib.contextmanager
def chains(step_ms: float) -> Iterator[tuple[dict[str, list[Peer]], Chain]]:
    """(peers without and with tokenization, the mock server itself); their processes end with the context."""
    names = ("ours", "upstream", "sglang_worker", "smg", "smg, tokens", "sglang-router")
    ports = {name: free_port() for name in names}
    with tempfile.TemporaryDirectory(prefix="tr-bench-") as folder, contextlib.ExitStack() as stack:
        log = stack.enter_context((Path(folder) / "log").open("w"))
        started: dict[str, subprocess.Popen[bytes]] = {}
        for name, command in _commands(ports, f"{folder}/w", step_ms).items():
            started[name] = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
            stack.callback(started[name].wait)
            stack.callback(started[name].kill)
        found = {name: Chain(ports[name], started[name].pid) for name in names if name in started}
        for name, chain in found.items():
            if name != "sglang_worker":
                _wait_until_served(name, chain.port)
        without = [Peer("ours", found["ours"], token_bodies)]
        without += [Peer(name, found[name], chat_bodies) for name in ("smg", "sglang-router") if name in found]
        tokens = [Peer("ours", found["ours"], chat_bodies)]
        tokens += [Peer("smg", found["smg, tokens"], chat_bodies)] if "smg, tokens" in found else []
        yield {"without": without, "with": tokens}, found["upstream"]


def _wait_until_served(name: str, port: int) -> None:
    deadline_s = time.monotonic() + START_S
    bodies = chat_bodies(200, stream=False, tokens=1)
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, RuntimeError, EOFError):
            uvloop.run(load(port, concurrency=1, requests=1, bodies=bodies.next, path=bodies.path))
            return
        time.sleep(0.3)
    raise SystemExit(f"{name} did not answer within {START_S:.0f} s")


def cpu_s(pid: int) -> float:
    """What all threads of a process ran so far, to the microsecond (schedstat(5) of each)."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


# -- measurements ----------------------------------------------------------------------------------------------------
def once(chain: Chain, bodies: Bodies, *, concurrency: int, requests: int, tokens: int) -> dict[str, float]:
    """One closed loop."""
    used_s = cpu_s(chain.pid)
    work = load(chain.port, concurrency=concurrency, requests=requests, bodies=bodies.next, path=bodies.path)
    seconds, outcomes = uvloop.run(work)
    used_s = cpu_s(chain.pid) - used_s
    totals = [outcome.total_s for outcome in outcomes]
    return {
        "requests_per_s": len(outcomes) / seconds,
        "p50_ms": percentile(totals, 0.5) * 1e3,
        "p99_ms": percentile(totals, 0.99) * 1e3,
        "cpu_us_per_request": used_s / len(outcomes) * 1e6,
        "cpu_us_per_token": used_s / (len(outcomes) * tokens) * 1e6,
    }


FAST = {
    "unary": ({"stream": False, "tokens": 1}, {"concurrency": 32, "requests": 800}),
    "one": ({"stream": True, "tokens": 1}, {"concurrency": 1, "requests": 300}),
}
PACED = {
    "paced": ({"stream": True, "tokens": TOKENS}, {"concurrency": 32, "requests": 64}),
    "begun": ({"stream": True, "tokens": 1}, {"concurrency": 32, "requests": 128}),
}


def row(peers: list[Peer], shapes: dict[str, Any], size: int, rounds: int, scale: float) -> dict[str, dict[str, float]]:
    """Medians by peer of `rounds` rounds, in which they take turns."""
    found: dict[str, dict[str, list[float]]] = {}
    bodies = {(p.name, s): p.bodies(size, **shape) for p in peers for s, (shape, _) in shapes.items()}
    for _ in range(rounds):
        for peer in peers:
            values = found.setdefault(peer.name, {})
            for name, (shape, loop) in shapes.items():
                asked = {**loop, "requests": max(loop["concurrency"], int(loop["requests"] * scale))}
                measured = once(peer.chain, bodies[peer.name, name], tokens=shape["tokens"], **asked)
                for figure, value in measured.items():
                    values.setdefault(f"{name}_{figure}", []).append(value)
    return {name: {key: statistics.median(v) for key, v in values.items()} for name, values in found.items()}


def refine(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What one reads: added to `direct`, and of a token without its request's share."""
    alone = rows.pop("direct")
    for values in rows.values():
        for share in ("p50_ms", "p99_ms"):
            values[f"added_{share}"] = values[f"one_{share}"] - alone[f"one_{share}"]
        of_stream, of_request = values["paced_cpu_us_per_request"], values["begun_cpu_us_per_request"]
        values["token_cpu_us"] = max(0.0, of_stream - of_request) / (TOKENS - 1)
    return rows


SHOWN = {
    "unary_requests_per_s": "requests/s",
    "unary_cpu_us_per_request": "CPU us/request",
    "added_p50_ms": "added p50, ms",
    "added_p99_ms": "added p99, ms",
    "token_cpu_us": "CPU us/token",
}


def bench(quick: bool) -> dict[str, dict[str, dict[str, float]]]:
    """All rows: figures by peer."""
    rounds, scale = (3, 0.5) if quick else (7, 1.0)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for step_ms, shapes in ((0.0, FAST), (STEP_MS, PACED)):
        with chains(step_ms) as (modes, direct):
            for mode, peers in modes.items():
                for label, size in SIZES.items():
                    share = scale if size < 10_000 else scale / 4
                    everybody = [*peers, Peer("direct", direct, chat_bodies)]
                    some = found.setdefault(f"{label}, {mode} tokenization", {})
                    for name, values in row(everybody, shapes, size, rounds, share).items():
                        some.setdefault(name, {}).update(values)
    return {label: refine(rows) for label, rows in found.items()}


def main() -> None:
    """Measure, print, and write the JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setup", action="store_true", help="install the peers and end")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON")
    options = parser.parse_args()
    if options.setup:
        return setup()
    began_s = time.monotonic()
    rows = bench(options.quick)
    figures = {
        f"{label}, {peer}: {said}": values[key]
        for label, peers in rows.items()
        for peer, values in peers.items()
        for key, said in SHOWN.items()
    }
    result = {**about(), "peers": _versions(), "seconds": round(time.monotonic() - began_s), "figures": figures}
    for label, peers in rows.items():
        print(f"\n{label:<28}" + "".join(f"{said:>16}" for said in SHOWN.values()))
        for peer, values in peers.items():
            print(f"  {peer:<26}" + "".join(f"{values[key]:16.2f}" for key in SHOWN))
    if options.json:
        Path(options.json).write_text(json.dumps({**result, "rows": rows}, indent=1) + "\n")
    return None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        said = next(VENVS.glob(f"{name}/lib/*/site-packages/{name.replace('-', '_')}-*.dist-info"), None)
        found[name] = said.name.removesuffix(".dist-info").rpartition("-")[2] if said else "not installed"
    return found


if __name__ == "__main__":
    main()
