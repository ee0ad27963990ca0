"""How `tokenrelay serve` shows itself: bars and a panel on a terminal, one log line each elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from tokenrelay.base.logging import get_logger
from tokenrelay.base.status import StatusPipe
from tokenrelay.cli.supervisor import Observer


class TerminalObserver(Observer):
    """For a person: a progress bar while the worker loads, then a panel with all that is needed for a first request."""

    def __init__(self, console: Console, url: str) -> None:
        self._console = console
        self._url = url
        self._began_s = time.monotonic()
        self._served = False
        self._tasks: dict[str, TaskID] = {}  # by what is loading
        self._bars = bars(console)

    def starting(self, child: str) -> None:
        """A line without a measure until the first news: Python and torch are being imported."""
        self._bars.start()
        self._tasks[""] = self._bars.add_task(f"starting the {child}", total=None)

    def progress(self, child: str, what: str, done: int, total: int) -> None:
        """Advance the bar of `what`."""
        self._forget("")
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(f"loading {what}", total=total)
        self._bars.update(self._tasks[what], completed=done, total=total)

    def started(self, child: str, facts: Mapping[str, Any]) -> None:
        """Take the bars away."""
        self._stop_bars()
        if self._served:
            self._console.print(f"the {child} is ready again", style="green")

    def serving(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """The panel."""
        self._served = True
        worker = next((its for its in facts.values() if "model" in its), {})
        self._console.print(panel(self._url, worker, time.monotonic() - self._began_s))
        self._console.print("Try it, or talk to it in another terminal:", style="dim")
        # Outside of any frame and unwrapped, so that it can be copied.
        for command in (curl(self._url, str(worker.get("model", ""))), f"tokenrelay chat --url {self._url}"):
            self._console.print(f"  {command}", style="green", markup=False, soft_wrap=True)

    def died(self, child: str, reason: str, retry_s: float) -> None:
        """Say why and when it is tried again."""
        self._stop_bars()
        self._console.print(f"{reason}; starting it again in {retry_s:.1f} s", style="yellow", markup=False)

    def replacing(self, child: str) -> None:
        """Say so."""
        self._console.print(f"replacing the {child}", style="dim")

    def draining(self) -> None:
        """Say what happens and how to hurry it."""
        self._console.print("finishing what runs; nothing new is accepted (Ctrl-C again stops at once)", style="dim")

    def stopped(self, drained: bool) -> None:
        """The last word."""
        self._stop_bars()
        if self._served:
            self._console.print("stopped" if drained else "stopped before every request had ended", style="dim")

    def _forget(self, what: str) -> None:
        if what in self._tasks:
            self._bars.remove_task(self._tasks.pop(what))

    def _stop_bars(self) -> None:
        for what in list(self._tasks):
            self._forget(what)
        self._bars.stop()


class LogObserver(Observer):
    """For a log: one structured line each."""

    def __init__(self) -> None:
        self._log = get_logger("supervisor")

    def started(self, child: str, facts: Mapping[str, Any]) -> None:
        """A child is ready."""
        self._log.info("child ready", child=child, **facts)

    def died(self, child: str, reason: str, retry_s: float) -> None:
        """A child died."""
        self._log.warning("child died", child=child, reason=reason, retry_s=retry_s)

    def replacing(self, child: str) -> None:
        """A rolling restart reached it."""
        self._log.info("replacing", child=child)

    def draining(self) -> None:
        """A signal came."""
        self._log.info("draining")

    def stopped(self, drained: bool) -> None:
        """The end."""
        self._log.info("stopped", drained=drained)


class StatusObserver(Observer):
    """For a parent process: the same status lines that children send, so that serve can be a child itself."""

    def __init__(self, fd: int, url: str) -> None:
        self._pipe = StatusPipe(fd)
        self._url = url

    def progress(self, child: str, what: str, done: int, total: int) -> None:
        """Passed on."""
        self._pipe.progress(what, done=done, total=total)

    def serving(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """`ready` with the URL and the worker's facts. Failures are told by the command, which knows all of them."""
        pids = {f"{child}_pid": its["pid"] for child, its in facts.items()}
        worker = next((its for its in facts.values() if "model" in its), {})
        self._pipe.ready(**{**worker, **pids, "url": self._url})


class Observers(Observer):
    """Several observers as one; it keeps the message of a failure for the command to print."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self.failure: str | None = None

    def starting(self, child: str) -> None:
        """To each."""
        for observer in self._observers:
            observer.starting(child)

    def progress(self, child: str, what: str, done: int, total: int) -> None:
        """To each."""
        for observer in self._observers:
            observer.progress(child, what, done, total)

    def started(self, child: str, facts: Mapping[str, Any]) -> None:
        """To each."""
        for observer in self._observers:
            observer.started(child, facts)

    def serving(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """To each."""
        for observer in self._observers:
            observer.serving(facts)

    def died(self, child: str, reason: str, retry_s: float) -> None:
        """To each."""
        for observer in self._observers:
            observer.died(child, reason, retry_s)

    def failed(self, message: str) -> None:
        """To each, and kept."""
        self.failure = message
        for observer in self._observers:
            observer.failed(message)

    def replacing(self, child: str) -> None:
        """To each."""
        for observer in self._observers:
            observer.replacing(child)

    def draining(self) -> None:
        """To each."""
        for observer in self._observers:
            observer.draining()

    def stopped(self, drained: bool) -> None:
        """To each."""
        for observer in self._observers:
            observer.stopped(drained)


class _KnownBar(BarColumn):
    """A bar where the end is known, nothing where it is not."""

    def render(self, task: Task) -> Any:
        """Called at each refresh."""
        return "" if task.total is None else super().render(task)


def bars(console: Console) -> Progress:
    """Progress lines that vanish when they are done; a task without a total only spins."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        _KnownBar(40),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def panel(url: str, facts: Mapping[str, Any], seconds: float) -> Panel:
    """What a person wants to see first: where, what, how much, and a request to paste."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("URL", Text(f"{url}/v1", style="bold cyan"))
    table.add_row("model", f"{facts.get('model', '?')}  ({facts.get('dtype', '?')} on {facts.get('device', '?')})")
    if "context_tokens" in facts:
        table.add_row("context", f"{int(facts['context_tokens']):,} tokens")
    if "blocks" in facts and "block_tokens" in facts:
        blocks, block_tokens = int(facts["blocks"]), int(facts["block_tokens"])
        table.add_row("KV pool", f"{blocks:,} blocks of {block_tokens} tokens = {blocks * block_tokens:,} tokens")
    if "slots" in facts:
        table.add_row("at once", f"{int(facts['slots']):,} sequences")
    return Panel(table, title=f"TokenRelay is ready ({seconds:.1f} s)", title_align="left", border_style="cyan")


def curl(url: str, model: str) -> str:
    """A first request to paste into a shell."""
    body = {"model": model, "messages": [{"role": "user", "content": "Hello! Who are you?"}]}
    return f"curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
