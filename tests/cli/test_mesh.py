"""The live table of `tokenrelay up`, drawn from what the router says."""

from __future__ import annotations

import asyncio
import io
import json

import pytest
from rich.console import Console

from tokenrelay.cli.mesh import MeshObserver, duration, pool_bar, read_workers

STATS = {
    "output_tokens": 100,
    "prompt_tokens": 200,
    "cached_tokens": 150,
    "sequences_running": 3,
    "sequences_waiting": 1,
    "blocks_active": 4,
    "blocks_cached": 4,
    "blocks_free": 8,
}


def drawn(observer: MeshObserver, seen: dict[str, object]) -> str:
    console = Console(width=150, file=io.StringIO(), force_terminal=False)
    console.print(observer.table(seen))  # type: ignore[arg-type]
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_row_a_service_with_its_load() -> None:
    observer = MeshObserver(Console(file=io.StringIO(), width=150), "http://127.0.0.1:1")
    for name in ("worker-1", "worker-2", "router"):
        observer.starting(name)
        observer.started(name, {"pid": 42})
    observer.died("worker-2", "the worker-2 was killed by SIGKILL", 0.5)
    observer.starting("worker-2")
    drawn(observer, {"worker-1": {"stats": STATS}})
    rows = drawn(observer, {"worker-1": {"stats": {**STATS, "output_tokens": 100}}}).splitlines()
    first, second = (next(row for row in rows if row.startswith(name)) for name in ("worker-1", "worker-2"))
    assert first.split()[:5] == ["worker-1", "ready", "0", "s", "42"]
    for word in ("3", "1", "75 %", "████▒▒▒▒········ 25 %"):
        assert word in first
    assert "starting" in second
    assert " 1 " in second, "one restart"


def test_it_fits_a_terminal_of_80_columns() -> None:
    observer = MeshObserver(Console(file=io.StringIO(), width=80), "http://127.0.0.1:1")
    observer.starting("worker-12")
    observer.started("worker-12", {"pid": 4194303})
    busy = {**STATS, "output_tokens": 12345, "sequences_running": 256, "sequences_waiting": 1024}
    drawn(observer, {"worker-12": {"stats": STATS}})
    console = Console(width=80, file=io.StringIO())
    console.print(observer.table({"worker-12": {"stats": busy}}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_the_bar_is_as_long_whatever_the_pool() -> None:
    for active, cached, free in ((0, 0, 10), (10, 0, 0), (1, 9999, 0), (1, 1, 1), (0, 0, 0)):
        bar = pool_bar({"blocks_active": active, "blocks_cached": cached, "blocks_free": free}).plain
        assert len(bar.split(" ")[0]) == 16


@pytest.mark.parametrize(("seconds", "said"), [(3.2, "3 s"), (119, "119 s"), (180, "3 min"), (7200, "2 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


async def test_workers_are_read_by_the_name_of_their_socket() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        body = json.dumps({"workers": [{"target": "unix:/tmp/x/worker-1.sock", "ready": True}]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        seen = await read_workers(f"http://127.0.0.1:{port}")
    assert seen["worker-1"]["ready"] is True
