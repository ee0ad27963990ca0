"""The live table of `tokenrelay up`: every service, its state, its load, its KV pool, as the router sees them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import ssl
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tokenrelay.cli.console import TerminalObserver

REFRESH_S = 1.0
READ_S = 2.0
BAR_CELLS = 16
WIDE_COLUMNS = 110  # of the terminal: room for all of the table
STYLES = {"ready": "green", "starting": "yellow", "replacing": "yellow", "draining": "yellow", "died": "red"}


@dataclass
class Service:
    """One child, as the table shows it."""

    state: str = "starting"
    pid: int | None = None
    starts: int = 0
    since_s: float = field(default_factory=time.monotonic)
    tokens: tuple[float, int] | None = None  # (when, output tokens) at the last look
    rate: float = 0.0  # tokens per second since

    def become(self, state: str) -> None:
        """Enter a state now."""
        self.state, self.since_s = state, time.monotonic()


class MeshObserver(TerminalObserver):
    """The start-up display, then a table that is drawn anew each second until the end."""

    def __init__(self, console: Console, url: str) -> None:
        super().__init__(console, url)
        self._services: dict[str, Service] = {}
        self._live: Live | None = None
        self._watch: asyncio.Task[None] | None = None

    def starting(self, child: str) -> None:
        """A new life."""
        service = self._services.setdefault(child, Service())
        service.become("starting")
        service.starts += 1
        if self._live is None:
            super().starting(child)

    def progress(self, child: str, what: str, done: int, total: int) -> None:
        """Bars only before the table is there."""
        if self._live is None:
            super().progress(child, what, done, total)

    def started(self, child: str, facts: Mapping[str, Any]) -> None:
        """It serves."""
        service = self._services[child]
        service.become("ready")
        service.pid = facts.get("pid")
        service.tokens = None
        if self._live is None:
            super().started(child, facts)

    def serving(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """The panel, and below it the table from now on."""
        super().serving(facts)
        self._live = Live(self.table({}), console=self._console, auto_refresh=False)
        self._live.start()
        self._watch = asyncio.ensure_future(self._follow())

    def died(self, child: str, reason: str, retry_s: float) -> None:
        """A line above the table."""
        self._services[child].become("died")
        super().died(child, reason, retry_s)

    def replacing(self, child: str) -> None:
        """It drains, to be started again."""
        self._services[child].become("replacing")

    def draining(self) -> None:
        """The end begins."""
        for service in self._services.values():
            service.become("draining")
        super().draining()

    def stopped(self, drained: bool) -> None:
        """Leave the last table standing."""
        if self._watch is not None:
            self._watch.cancel()
        if self._live is not None:
            self._live.stop()
            self._live = None
        super().stopped(drained)

    async def _follow(self) -> None:
        while True:
            seen: dict[str, Any] = {}
            with contextlib.suppress(OSError, TimeoutError, ValueError, KeyError, IndexError):
                async with asyncio.timeout(READ_S):
                    seen = await read_workers(self._url)
            if self._live is not None:
                self._live.update(self.table(seen), refresh=True)
            await asyncio.sleep(REFRESH_S)

    def table(self, seen: Mapping[str, Mapping[str, Any]]) -> RenderableType:
        """A row a service. `seen`: what /workers said of each, by the name of its socket."""
        table = Table(box=None, header_style="bold", pad_edge=False)
        wide = self._console.width >= WIDE_COLUMNS
        for column in ("service", "state", "for", "pid", "restarts") if wide else ("service", "state", "for"):
            table.add_column(column, no_wrap=True)
        for column in ("running", "waiting", "tokens/s", "cached") if wide else ("run", "wait", "tok/s", "cached"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("KV: active, cached, free" if wide else "KV pool", no_wrap=True)
        now_s = time.monotonic()
        for name, service in self._services.items():
            stats = seen.get(name, {}).get("stats", {})
            table.add_row(
                name,
                Text(service.state, style=STYLES.get(service.state, "")),
                duration(now_s - service.since_s),
                *([str(service.pid or ""), str(service.starts - 1) if service.starts > 1 else ""] if wide else []),
                *self._load(service, stats, now_s),
            )
        hint = f"kill -USR2 {os.getpid()}: a rolling restart   Ctrl-C: finish what runs, then stop"
        return Group(table, Text(hint, style="dim"))

    def _load(self, service: Service, stats: Mapping[str, Any], now_s: float) -> tuple[RenderableType, ...]:
        if not stats:
            return ("", "", "", "", "")
        tokens = int(stats["output_tokens"])
        if service.tokens is not None and now_s > service.tokens[0]:
            service.rate = max(0.0, (tokens - service.tokens[1]) / (now_s - service.tokens[0]))
        service.tokens = (now_s, tokens)
        prompt = int(stats["prompt_tokens"])
        hits = f"{100 * int(stats['cached_tokens']) / prompt:.0f} %" if prompt else ""
        running, waiting = str(stats["sequences_running"]), str(stats["sequences_waiting"])
        return running, waiting, f"{service.rate:.0f}", hits, pool_bar(stats)


def pool_bar(stats: Mapping[str, Any]) -> Text:
    """The KV pool as a bar of cells, and the share that is active."""
    active, cached, free = (int(stats[f"blocks_{state}"]) for state in ("active", "cached", "free"))
    blocks = max(1, active + cached + free)
    filled = -(-BAR_CELLS * active // blocks)
    kept = min(BAR_CELLS - filled, -(-BAR_CELLS * cached // blocks))
    bar = Text("█" * filled, style="cyan")
    bar.append("▒" * kept, style="blue").append("·" * (BAR_CELLS - filled - kept), style="dim")
    return bar.append(f" {100 * active / blocks:.0f} %", style="")


def duration(seconds: float) -> str:
    """`42 s`, `3 min`, `5 h`."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection to our own child at an address that we listen on: with HTTPS its certificate proves nothing more."""
    parts = urlsplit(url)
    context = None
    if parts.scheme == "https":
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return await asyncio.open_connection(parts.hostname, parts.port, ssl=context)


async def read_workers(url: str) -> dict[str, Any]:
    """/workers of a router on this machine, by the name of each worker's socket. Raises OSError, ValueError."""
    reader, writer = await connect(url)
    try:
        writer.write(b"GET /workers HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        _, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    return {worker["target"].rpartition("/")[2].removesuffix(".sock"): worker for worker in json.loads(body)["workers"]}
