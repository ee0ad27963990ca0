"""The local supervisor: one worker and one router, started in order, kept alive, drained and stopped together.

    supervisor = Supervisor(worker_spec, router_spec, SupervisorConfig(), observer)
    exit_code = await supervisor.run()     # returns after SIGTERM or SIGINT, or when a start failed

States of a child: starting -> ready -> (died -> waiting -> starting)*. The first signal drains: the router stops
accepting and finishes what runs, then the worker ends. A second signal stops both at once. Whatever ends the supervisor
ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.config import SupervisorConfig
from tokenrelay.cli.machine import usable_cpus
from tokenrelay.cli.process import ChildFailed, ChildProcess, ChildSpec, describe_exit

SOCKET_PATH_BYTES_MAX = 107  # unix(7): sun_path holds 108 with its terminator


class Observer:
    """Who tells the user; this one tells nobody. Called on the event loop; must not block."""

    def starting(self, child: str) -> None:
        """A child was spawned."""

    def progress(self, child: str, what: str, done: int, total: int) -> None:
        """`done` of `total` of `what` stand in a child that starts."""

    def started(self, child: str, facts: Mapping[str, Any]) -> None:
        """A child is ready, for the first time or again."""

    def serving(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Every child is ready for the first time; facts by child."""

    def died(self, child: str, reason: str, retry_s: float) -> None:
        """A child died, or failed to start again; the next try is in `retry_s` seconds."""

    def failed(self, message: str) -> None:
        """The supervisor gives up for this reason."""

    def draining(self) -> None:
        """A signal came: no new requests; a second signal stops at once."""

    def stopped(self, drained: bool) -> None:
        """Every child is gone; `drained`: every request had finished."""


class Backoff:
    """Bounded exponential waits between the starts of one child."""

    def __init__(self, limits: SupervisorConfig) -> None:
        self._limits = limits
        self.failures = 0  # in a row

    def next_s(self, lived_s: float) -> float | None:
        """Seconds until the next try, after a life of `lived_s` ready seconds; None: give up."""
        self.failures = 1 if lived_s >= self._limits.healthy_s else self.failures + 1
        if self.failures > self._limits.restarts_max:
            return None
        doublings = min(self.failures - 1, 30)
        return min(self._limits.backoff_max_s, self._limits.backoff_first_s * float(2**doublings))


class Supervisor:
    """Runs the worker and the router until a signal or a failure ends them. For one `run`, on a main thread's loop."""

    def __init__(
        self,
        worker: ChildSpec,
        router: ChildSpec,
        limits: SupervisorConfig,
        observer: Observer,
        *,
        joined: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`joined` returns when the children, each ready for itself, found each other. ChildFailed: they did not."""
        self._specs = (worker, router)  # in start order
        self._joined = joined
        self._limits = limits
        self._observer = observer
        self._lives: dict[str, ChildProcess] = {}  # by name; at most one life each
        self._signals = 0
        self._signal_number = 0
        self._stop = asyncio.Event()  # the first signal
        self._stop_now = asyncio.Event()  # the second

    async def run(self) -> int:
        """Start, keep, drain. Exit code: 0 drained, 1 a child failed for good, 128 + N stopped at once by signal N."""
        self._handle_signals()
        try:
            if not await self._start_all():
                return 128 + self._signal_number if self._stop.is_set() else 1
            return await self._keep_all()
        finally:
            for life in list(self._lives.values()):
                await life.kill()
            self._observer.stopped(drained=not self._stop_now.is_set())

    async def _start_all(self) -> bool:
        """The first start of each child, in order. False: one failed (told), or a signal came meanwhile."""
        stop = asyncio.ensure_future(self._stop.wait())
        start = asyncio.ensure_future(self._start_in_order())
        either: set[asyncio.Future[Any]] = {start, stop}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        for task in either:
            task.cancel()
        await asyncio.gather(*either, return_exceptions=True)
        if start.cancelled():
            return False
        try:
            self._observer.serving(start.result())
        except ChildFailed as error:
            self._observer.failed(error.message)
            return False
        return True

    async def _start_in_order(self) -> dict[str, Mapping[str, Any]]:
        facts = {spec.name: await self._start(spec) for spec in self._specs}
        if self._joined is not None:
            await self._join(self._joined())
        return facts

    async def _join(self, joined: Awaitable[None]) -> None:
        """Until the children found each other. Raises ChildFailed when they do not, or one dies meanwhile."""
        joining = asyncio.ensure_future(joined)
        first: set[asyncio.Future[Any]] = {joining, *(life.exited for life in self._lives.values())}
        try:
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if joining.done():
                return joining.result()
            dead = next(life for life in self._lives.values() if life.exited.done())
            raise ChildFailed(f"the {dead.name} {describe_exit(dead.exited.result())} before it served")
        finally:
            joining.cancel()

    async def _keep_all(self) -> int:
        keepers = [asyncio.ensure_future(self._keep(spec)) for spec in self._specs]
        stop = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait({stop, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stop, *keepers):
            task.cancel()
        await asyncio.gather(*keepers, return_exceptions=True)
        if not self._stop.is_set():  # a keeper gave up, and has said so
            return 1
        self._observer.draining()
        await self._drain()
        return 128 + self._signal_number if self._stop_now.is_set() else 0

    async def _start(self, spec: ChildSpec) -> Mapping[str, Any]:
        """One start: spawn, follow, ready. Raises ChildFailed with the child gone."""
        life = ChildProcess.spawn(spec, child_environment(spec.name, os.environ, usable_cpus()))
        self._lives[spec.name] = life
        self._observer.starting(spec.name)
        try:
            facts = await life.wait_ready(
                lambda what, done, total: self._observer.progress(spec.name, what, done, total),
                stall_s=self._limits.stall_s,
            )
        except ChildFailed:
            await life.kill()
            raise
        facts["pid"] = life.pid
        self._observer.started(spec.name, facts)
        return facts

    async def _keep(self, spec: ChildSpec) -> None:
        """Start a child again whenever it died; returns when it is given up."""
        backoff = Backoff(self._limits)
        loop = asyncio.get_running_loop()
        while True:
            ready_at_s = loop.time()
            code = await asyncio.shield(self._lives[spec.name].exited)
            reason, lived_s = f"the {spec.name} {describe_exit(code)}", loop.time() - ready_at_s
            while True:
                retry_s = backoff.next_s(lived_s)
                if retry_s is None:
                    self._observer.failed(f"{reason}; it failed {self._limits.restarts_max + 1} times in a row")
                    return
                self._observer.died(spec.name, reason, retry_s)
                await asyncio.sleep(retry_s)
                try:
                    await self._start(spec)
                    break
                except ChildFailed as error:
                    reason, lived_s = error.message, 0.0

    async def _drain(self) -> None:
        """Ask the router, then the worker, to finish and end; cut short by a second signal or the bound."""
        stop_now = asyncio.ensure_future(self._stop_now.wait())
        for spec in reversed(self._specs):
            life = self._lives[spec.name]
            life.signal(signal.SIGTERM)
            either: set[asyncio.Future[Any]] = {life.exited, stop_now}
            await asyncio.wait(either, timeout=self._limits.drain_s, return_when=asyncio.FIRST_COMPLETED)
            if not life.exited.done():
                self._stop_now.set()
                break
        stop_now.cancel()
        if self._stop_now.is_set():
            await self._stop_at_once()

    async def _stop_at_once(self) -> None:
        """Another SIGTERM to each, so that open requests still get their terminal error; `run` kills what is left."""
        for spec in reversed(self._specs):
            life = self._lives[spec.name]
            life.signal(signal.SIGTERM)
            await asyncio.wait({life.exited}, timeout=self._limits.stop_s)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        self._signal_number = number
        self._stop.set()
        if self._signals > 1:
            self._stop_now.set()


def child_environment(name: str, inherited: Mapping[str, str], cpus: int) -> dict[str, str]:
    """The environment of a child: ours, with thread pools sized by the CPUs this process may use.

    Idle threads sleep rather than spin: on a small machine a spinning pool takes the core that the router needs. What
    the user has set stays.
    """
    threads = cpus if cpus <= 4 else cpus - 1  # on larger machines one core is left to the router and the event loops
    if name == "worker":
        ours = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        # torch keeps a compiled bfloat16 matmul per shape, and each step has another number of tokens: by default 1024
        # of each kind, which took 700 MB more than these do, at the same speed (measured: bench/soak.py --quick).
        ours |= {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
    else:  # no tensor work: libraries that make pools on import get one thread
        ours = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
        ours["TOKENIZERS_PARALLELISM"] = "false"
    return {**ours, **inherited}


@contextlib.contextmanager
def private_folder() -> Any:
    """A folder only this user can enter, short enough for a unix socket's path, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tokenrelay-"))
    if len(os.fsencode(folder / "worker.sock")) > SOCKET_PATH_BYTES_MAX:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="tokenrelay-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def claim_port(host: str, port: int) -> int:
    """Check, before a model is loaded, that the router will be able to listen there; port 0 finds a free one.

    Raises ConfigError that says what is in the way.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            probe.listen(1)
        except OSError as error:
            raise ConfigError(_why_not(host, port, error)) from error
        return int(probe.getsockname()[1])


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another process; stop that one, or choose a port with --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} on {host} needs privileges this user lacks; choose a port above 1023 with --port"
    return f"cannot listen on {host} port {port}: {error.strerror}"
