"""What the router costs: requests/s, added latency, CPU microseconds per streamed token, next to a plain reverse proxy.

    python bench/router.py --quick
    python bench/router.py --json result.json         # or --json alone: the object to stdout

Two chains in one run, on one machine, turn by turn so that a busy machine hurts both:

    load -> router -> mock worker (gRPC, canned tokens)              all of the router's work: template, tokenizer,
                                                                     sampling checks, detokenizer, stop strings, SSE
    load -> aiohttp reverse proxy -> mock OpenAI server (aiohttp)    bytes through, nothing else
    load -> mock OpenAI server                                       the floor that "added" latency is measured from

Both backends stream the same number of tokens at the same pace, in chunks of about the same size. CPU is that of the
router's, or the proxy's, process alone (/proc/PID/stat); it is per token that reached the client. Server processes
run on uvloop.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import os
import platform
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from aiohttp import web

ROOT = Path(__file__).resolve().parents[1]
MOCK_WORKER = ROOT / "tests/support/mock_worker.py"
CONTENT = "Please read the file notes.txt and tell me what it says about the quick brown fox. " * 4
CHUNK = {
    "id": "chatcmpl-0123456789abcdef01234567",
    "object": "chat.completion.chunk",
    "created": 1_790_000_000,
    "model": "mock",
    "choices": [{"index": 0, "delta": {"content": " brown"}, "logprobs": None, "finish_reason": None}],
}


# -- the mock OpenAI server and the proxy, as processes of their own
# -----------------------------------------------------
def upstream_app(tokens: int, step_s: float) -> web.Application:
    """An OpenAI server without a model: `max_tokens` chunks, one every `step_s` seconds."""
    chunk = b"data: " + json.dumps(CHUNK, separators=(",", ":")).encode() + b"\n\n"
    message = {"role": "assistant", "content": " brown" * tokens}
    unary = json.dumps({**CHUNK, "choices": [{"index": 0, "message": message, "finish_reason": "length"}]}).encode()

    async def chat(request: web.Request) -> web.StreamResponse:
        head = (await request.read())[:200]  # where requests say it: a large body is not parsed here
        asked = re.search(rb'"max_tokens": ?(\d+)', head)
        count = int(asked[1]) if asked else tokens
        if re.search(rb'"stream": ?true', head) is None:
            return web.Response(body=unary, content_type="application/json")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(count):
            await response.write(chunk)
            await asyncio.sleep(step_s)
        await response.write_eof(b"data: [DONE]\n\n")
        return response

    async def about_it(_: web.Request) -> web.Response:  # routers ask who it is
        return web.json_response({"object": "list", "data": [{"id": "mock", "object": "model"}], "model_path": "mock"})

    app = web.Application(client_max_size=64 << 20)
    app.router.add_post("/v1/chat/completions", chat)
    for path in ("/health", "/v1/models", "/get_model_info", "/get_server_info", "/model_info", "/server_info"):
        app.router.add_get(path, about_it)
    return app


def proxy_app(target: str) -> web.Application:
    """The plain reverse proxy: the body up, the bytes down as they come."""

    async def session(app: web.Application) -> Any:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as client:
            app["client"] = client
            yield

    async def forward(request: web.Request) -> web.StreamResponse:
        data = await request.read()
        headers = {"Content-Type": "application/json"}
        async with request.app["client"].post(target + request.path, data=data, headers=headers) as reply:
            response = web.StreamResponse(status=reply.status, headers={"Content-Type": reply.content_type})
            await response.prepare(request)
            async for piece in reply.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application()
    app.cleanup_ctx.append(session)
    app.router.add_post("/{path:.*}", forward)
    return app


async def serve(app: web.Application, port: int) -> None:
    """Until killed."""
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


# -- load
# ----------------------------------------------------------------------------------------------------------------
@dataclass
class Outcome:
    """One request: seconds to its first byte of body and to its end, and how many tokens it brought."""

    first_s: float
    total_s: float
    tokens: int


class Connection:
    """A keep-alive HTTP connection that does no more than it must: the load must not be what is measured."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def open(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)

    def close(self) -> None:
        self._writer.close()

    async def request(self, body: bytes, path: bytes = b"/v1/chat/completions") -> Outcome:
        """One request. Raises RuntimeError for anything but a 200."""
        head = b"POST %b HTTP/1.1\r\nHost: b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        began_s = time.perf_counter()
        self._writer.write(head % (path, len(body)) + body)
        headers = await self._reader.readuntil(b"\r\n\r\n")
        if b" 200 " not in headers.split(b"\r\n", 1)[0]:
            raise RuntimeError(headers.decode())
        length = next((line for line in headers.lower().split(b"\r\n") if line.startswith(b"content-length:")), None)
        if length is not None:
            await self._reader.readexactly(int(length.split(b":")[1]))
            first_s = total_s = time.perf_counter() - began_s
            return Outcome(first_s, total_s, 0)
        data = await self._reader.read(1 << 18)
        first_s = time.perf_counter() - began_s
        events, tail = data.count(b"data: "), data[-6:]
        while not tail.endswith(b"\r\n0\r\n\r\n"[-len(tail) :]) or not tail.endswith(b"0\r\n\r\n"):
            data = await self._reader.read(1 << 18)
            if not data:
                raise RuntimeError(f"the stream broke off: {tail!r}")
            events += (tail[-5:] + data).count(b"data: ")
            tail = (tail + data)[-7:]
        return Outcome(first_s, time.perf_counter() - began_s, events - 1)


def body_of(stream: bool, tokens: int) -> bytes:
    """A chat request of some 100 prompt tokens."""
    messages = [{"role": "user", "content": CONTENT}]
    return json.dumps({"stream": stream, "max_tokens": tokens, "ignore_eos": True, "messages": messages}).encode()


async def load(
    port: int,
    *,
    concurrency: int,
    requests: int,
    body: bytes = b"",
    bodies: Callable[[], bytes] | None = None,
    path: str = "/v1/chat/completions",
    seconds_max: float = 60.0,
) -> tuple[float, list[Outcome]]:
    """(seconds, outcomes) of a closed loop; none begins after `seconds_max`, so that a busy machine takes no longer.
    `bodies`: makes one for each request.
    """
    connections = [Connection(port) for _ in range(concurrency)]
    await asyncio.gather(*(connection.open() for connection in connections))
    left = iter(range(requests))
    outcomes: list[Outcome] = []

    async def worker(connection: Connection) -> None:
        for _ in left:
            outcomes.append(await connection.request(bodies() if bodies is not None else body, path.encode()))
            if time.perf_counter() - began_s > seconds_max:
                return

    began_s = time.perf_counter()
    await asyncio.gather(*map(worker, connections))
    seconds = time.perf_counter() - began_s
    for connection in connections:
        connection.close()
    return seconds, outcomes


# -- processes
# -----------------------------------------------------------------------------------------------------------
def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cpu_s(pid: int) -> float:
    """User and system time of a process so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Chain:
    """One way to the tokens: where to send requests, and whose CPU to count."""

    port: int
    pid: int


@contextlib.contextmanager
def chains(folder: Path, *, tokens: int, step_ms: float, per_step: int = 1) -> Iterator[dict[str, Chain]]:
    """Router and proxy, each with its backend; they end with the context."""
    router_port, proxy_port, upstream_port = free_port(), free_port(), free_port()
    address, target = f"{folder}/w{router_port}", f"http://127.0.0.1:{upstream_port}"
    this = str(Path(__file__).resolve())
    pace = f"--tokens {tokens} --step-ms {step_ms}"
    commands = {
        "worker": f"{MOCK_WORKER} --socket {address} --model {folder}/model {pace} --per-step {per_step}",
        "upstream": f"{this} --serve upstream --port {upstream_port} {pace}",
        "router": f"-m tokenrelay.services.router --port {router_port} --worker unix:{address} --log-level warning",
        "proxy": f"{this} --serve proxy --port {proxy_port} --target {target}",
    }
    started = {
        name: subprocess.Popen([sys.executable, *command.split()], stdout=subprocess.DEVNULL)
        for name, command in commands.items()
    }
    try:
        for port in (upstream_port, proxy_port, router_port):
            _wait_until_served(port)
        yield {
            "router": Chain(router_port, started["router"].pid),
            "proxy": Chain(proxy_port, started["proxy"].pid),
            "direct": Chain(upstream_port, started["upstream"].pid),
        }
    finally:
        for process in started.values():
            process.kill()
        for process in started.values():
            process.wait()


def _wait_until_served(port: int) -> None:
    """Until a request passes; 30 s at most."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError, RuntimeError, asyncio.IncompleteReadError):
            asyncio.run(load(port, concurrency=1, requests=1, body=body_of(False, 1)))
            return
        time.sleep(0.1)
    raise SystemExit(f"port {port} did not answer within 30 s")


# -- measurements
# --------------------------------------------------------------------------------------------------------
def percentile(values: list[float], share: float) -> float:
    """The value below which this share of them lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(
    chain: Chain, *, concurrency: int, requests: int, stream: bool, tokens: int, seconds_max: float
) -> dict[str, float]:
    """One closed loop through one chain."""
    used_s = cpu_s(chain.pid)
    body = body_of(stream, tokens)
    work = load(chain.port, concurrency=concurrency, requests=requests, body=body, seconds_max=seconds_max)
    seconds, outcomes = uvloop.run(work)
    used_s = cpu_s(chain.pid) - used_s
    return {
        "requests_per_s": len(outcomes) / seconds,
        "tokens_per_s": len(outcomes) * tokens / seconds if stream else 0.0,
        "events": sum(outcome.tokens for outcome in outcomes),
        "cpu_us_per_request": used_s / len(outcomes) * 1e6,
        "cpu_us_per_token": used_s / (len(outcomes) * tokens) * 1e6 if stream else 0.0,
        "first_p50_ms": percentile([outcome.first_s for outcome in outcomes], 0.5) * 1e3,
        "first_p99_ms": percentile([outcome.first_s for outcome in outcomes], 0.99) * 1e3,
        "total_p50_ms": percentile([outcome.total_s for outcome in outcomes], 0.5) * 1e3,
        "total_p99_ms": percentile([outcome.total_s for outcome in outcomes], 0.99) * 1e3,
    }


def rounds(chains_: dict[str, Chain], names: list[str], count: int, **shape: Any) -> dict[str, dict[str, float]]:
    """Medians of `count` rounds; the chains take turns."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(count):
        for name in names:
            found[name].append(measure(chains_[name], **shape))
    return {
        name: {key: statistics.median(one[key] for one in results) for key in results[0]}
        for name, results in found.items()
    }


def bench(quick: bool) -> dict[str, Any]:
    """All scenarios."""
    from mock_worker import write_model_folder

    count, scale, seconds_max = (3, 1, 1.0) if quick else (7, 4, 5.0)
    result: dict[str, Any] = {"tokenize": uvloop.run(next_turn(100))}
    with tempfile.TemporaryDirectory(prefix="tr-bench-") as name:
        folder = Path(name)
        write_model_folder(folder / "model")
        with chains(folder, tokens=128, step_ms=10.0) as paced:
            # 64 users at 100 tokens/s each: what a token costs when it leaves by itself, as in real serving.
            shape = {"concurrency": 64, "requests": 64 * scale, "stream": True, "tokens": 128}
            result["paced_streams"] = rounds(paced, ["router", "proxy"], count, seconds_max=seconds_max, **shape)
        with chains(folder, tokens=32, step_ms=5.0) as crowded:
            # 256 users at 200 tokens/s each: more than two cores carry, so how much leaves is what counts.
            shape = {"concurrency": 256, "requests": 512 * scale, "stream": True, "tokens": 32}
            result["crowded_streams"] = rounds(crowded, ["router", "proxy"], count, seconds_max=seconds_max, **shape)
        with chains(folder, tokens=32, step_ms=0.0, per_step=32) as fast:
            shape = {"concurrency": 1, "requests": 150 * scale, "stream": True, "tokens": 1}
            result["one_user"] = rounds(fast, ["router", "proxy", "direct"], count, seconds_max=seconds_max, **shape)
            shape = {"concurrency": 32, "requests": 800 * scale, "stream": False, "tokens": 32}
            result["unary"] = rounds(fast, ["router", "proxy"], count, seconds_max=seconds_max, **shape)
    return result


async def next_turn(turns: int) -> dict[str, float]:
    """Milliseconds to tokenize a long conversation, by the plain tokenizer and by the router's, and its next turn."""
    from tokenizers import Tokenizer

    from tokenrelay.services.router.tokenize import PromptTokenizer

    file = ROOT / "assets/tokenrelay-tiny/tokenizer.json"
    tokenizer = PromptTokenizer(Tokenizer.from_file(str(file)), json.loads(file.read_text()), cache_bytes=64 << 20)
    text = "".join(
        f"<|im_start|>user\nturn {n}: {' '.join(f'word{n * k % 997}' for k in range(150))}<|im_end|>\n"
        for n in range(turns)
    )
    found: dict[str, list[float]] = {}

    async def timed(name: str, work: Any, text: str) -> Any:
        began_s = time.perf_counter()
        answer = await work(text)
        found.setdefault(name, []).append((time.perf_counter() - began_s) * 1e3)
        return answer

    async def plain(text: str) -> bytes:
        return tokenizer.encode_whole(text)

    expected = await timed("plain_ms", plain, text)
    assert await timed("first_turn_ms", tokenizer.encode, text) == expected
    for turn in range(9):
        text += f"<|im_start|>user\nand now for number {turn}<|im_end|>\n<|im_start|>assistant\n"
        packed = await timed("next_turn_ms", tokenizer.encode, text)
    assert packed == tokenizer.encode_whole(text)
    return {**{name: statistics.median(values) for name, values in found.items()}, "tokens": len(expected) / 4}


def figures(result: dict[str, Any]) -> dict[str, float]:
    """The few numbers that say it."""
    one, paced, crowded, unary = (result[name] for name in ("one_user", "paced_streams", "crowded_streams", "unary"))

    def added(name: str, key: str) -> float:
        return one[name][key] - one["direct"][key]

    found = {}
    for name in ("router", "proxy"):
        found |= {
            f"{name}: CPU us/token, 64 streams of 100 tokens/s": paced[name]["cpu_us_per_token"],
            f"{name}: added latency p50, ms": added(name, "total_p50_ms"),
            f"{name}: added latency p99, ms": added(name, "total_p99_ms"),
            f"{name}: streams/s, 256 at once, 32 tokens each": crowded[name]["requests_per_s"],
            f"{name}: unary requests/s": unary[name]["requests_per_s"],
            f"{name}: unary CPU us/request": unary[name]["cpu_us_per_request"],
        }
    tokenize = result["tokenize"]
    conversation = f"{tokenize['tokens'] / 1e3:.0f}k-token conversation"
    found[f"tokenize a {conversation}, plain, ms"] = tokenize["plain_ms"]
    found["tokenize its next turn, ms"] = tokenize["next_turn_ms"]
    ratios = {
        "router / proxy: CPU us/token": (paced, "cpu_us_per_token"),
        "router / proxy: streams/s": (crowded, "requests_per_s"),
        "router / proxy: unary requests/s": (unary, "requests_per_s"),
    }
    found |= {figure: one["router"][key] / one["proxy"][key] for figure, (one, key) in ratios.items()}
    return found


def about() -> dict[str, Any]:
    """What was measured, where and with what."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ("aiohttp", "uvloop", "grpcio", "protobuf", "msgspec", "tokenizers")
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
    parser.add_argument("--quick", action="store_true", help="less than 50 s")
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="write the result as JSON (- or no FILE: stdout)"
    )
    parser.add_argument("--serve", choices=["upstream", "proxy"], help=argparse.SUPPRESS)
    for name in ("--port", "--tokens"):
        parser.add_argument(name, type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--step-ms", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--target", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve == "upstream":
        uvloop.run(serve(upstream_app(options.tokens, options.step_ms / 1000), options.port))
    if options.serve == "proxy":
        uvloop.run(serve(proxy_app(options.target), options.port))
    result = {**about()}
    began_s = time.monotonic()
    scenarios = bench(options.quick)
    result |= {"seconds": round(time.monotonic() - began_s, 1), "figures": figures(scenarios), "scenarios": scenarios}
    out = sys.stderr if options.json == "-" else sys.stdout
    for key in ("date", "commit", "machine", "load_average", "versions", "seconds"):
        print(f"{key}: {result[key]}", file=out)
    for figure, value in result["figures"].items():
        print(f"{figure:<50} {value:10.2f}", file=out)
    if options.json == "-":
        print(json.dumps(result))
    elif options.json:
        Path(options.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(MOCK_WORKER.parent))
    main()
