"""The local supervisor: services started in stages, kept alive, replaced one by one, drained and stopped together.

    supervisor = Supervisor([[worker_spec, other_worker_spec], [router_spec]], SupervisorConfig(), observer)
    exit_code = await supervisor.run()     # returns after SIGTERM or SIGINT, or when a start failed

States of a child: starting -> ready -> (died -> waiting -> starting)*. The first signal drains, the last stage first:
the router stops accepting and finishes what runs, then the workers end. A second signal stops all at once. SIGUSR2
replaces every child in turn: a worker drains, ends and starts again while the others serve; a router's next life takes
over the listening socket before the last one drains. Whatever ends the supervisor ends them all.
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
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrelay.base.errors import ConfigError
from tokenrelay.cli.config import SupervisorConfig
from tokenrelay.cli.machine import usable_cpus
from tokenrelay.cli.process import ChildFailed, ChildProcess, ChildSpec, describe_exit

BACKLOG = 512  # connections that wait while a router starts; the kernel bounds it too
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

    def replacing(self, child: str) -> None:
        """A child is about to be replaced by its next life."""

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
    """Runs its children until a signal or a failure ends them. For one `run`, on a main thread's loop."""

    def __init__(
        self,
        stages: Sequence[Sequence[ChildSpec]],
        limits: SupervisorConfig,
        observer: Observer,
        *,
        joined: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Stages are started in order, the children of one stage at once. `joined` returns when the children, each
        ready for itself, found each other. ChildFailed: they did not.
        """
        self._stages = [list(stage) for stage in stages]
        self._specs = [spec for stage in stages for spec in stage]
        assert len({spec.name for spec in self._specs}) == len(self._specs), "names are unique"
        self._heavy = sum(not spec.light for spec in self._specs)
        self._joined = joined
        self._limits = limits
        self._observer = observer
        self._lives: dict[str, ChildProcess] = {}  # by name; the present life
        self._leaving: list[ChildProcess] = []  # former lives that drain beside the present one
        self._replacing: dict[str, asyncio.Event] = {}  # being replaced: set when the next life is there, or failed
        self._signals = 0
        self._signal_number = 0
        self._stop = asyncio.Event()  # the first signal
        self._stop_now = asyncio.Event()  # the second
        self._replace = asyncio.Event()  # SIGUSR2

    async def run(self) -> int:
        """Start, keep, drain. Exit code: 0 drained, 1 a child failed for good, 128 + N stopped at once by signal N."""
        self._handle_signals()
        try:
            if not await self._start_all():
                return 128 + self._signal_number if self._stop.is_set() else 1
            return await self._keep_all()
        finally:
            for life in [*self._lives.values(), *self._leaving]:
                await life.kill()
            self._observer.stopped(drained=not self._stop_now.is_set())

    # -- start --------------------------------------------------------------------------------------------------------
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
        facts: dict[str, Mapping[str, Any]] = {}
        for stage in self._stages:
            starts = [asyncio.ensure_future(self._start(spec)) for spec in stage]
            try:
                started = await asyncio.gather(*starts)
            finally:
                for start in starts:
                    start.cancel()
                await asyncio.gather(*starts, return_exceptions=True)
            facts |= {spec.name: its for spec, its in zip(stage, started, strict=True)}
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

    async def _start(self, spec: ChildSpec) -> Mapping[str, Any]:
        """One start: spawn, follow, ready. Raises ChildFailed with the child gone."""
        cpus = max(1, usable_cpus() // max(1, self._heavy))
        life = ChildProcess.spawn(spec, child_environment(os.environ, cpus, light=spec.light))
        former = self._lives.get(spec.name)
        self._lives[spec.name] = life
        if former is not None and not former.exited.done():
            self._leaving.append(former)
        self._observer.starting(spec.name)
        try:
            facts = await life.wait_ready(
                lambda what, done, total: self._observer.progress(spec.name, what, done, total),
                stall_s=self._limits.stall_s,
            )
        except ChildFailed:
            await life.kill()
            if former is not None and not former.exited.done():  # it goes on as before
                self._leaving.remove(former)
                self._lives[spec.name] = former
            raise
        facts["pid"] = life.pid
        self._observer.started(spec.name, facts)
        return facts

    # -- keep ---------------------------------------------------------------------------------------------------------
    async def _keep_all(self) -> int:
        keepers = [asyncio.ensure_future(self._keep(spec)) for spec in self._specs]
        stop = asyncio.ensure_future(self._stop.wait())
        replacer = asyncio.ensure_future(self._replace_when_asked())
        await asyncio.wait({stop, *keepers}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stop, replacer, *keepers):
            task.cancel()
        await asyncio.gather(replacer, *keepers, return_exceptions=True)
        if not self._stop.is_set():  # a keeper gave up, and has said so
            return 1
        self._observer.draining()
        await self._drain()
        return 128 + self._signal_number if self._stop_now.is_set() else 0

    async def _keep(self, spec: ChildSpec) -> None:
        """Start a child again whenever it died; returns when it is given up."""
        backoff = Backoff(self._limits)
        loop = asyncio.get_running_loop()
        while True:
            ready_at_s = loop.time()
            life = self._lives[spec.name]
            code = await asyncio.shield(life.exited)
            replaced = self._replacing.get(spec.name)
            if replaced is not None:
                await replaced.wait()
            if self._lives[spec.name] is not life:
                continue
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

    # -- replace ------------------------------------------------------------------------------------------------------
    async def _replace_when_asked(self) -> None:
        """A rolling restart for each SIGUSR2 (those that come during one are one more)."""
        while True:
            await self._replace.wait()
            self._replace.clear()
            for spec in self._specs:
                self._replacing[spec.name] = replaced = asyncio.Event()
                try:
                    await self._replace_one(spec)
                    if self._joined is not None:
                        await self._joined()  # else the next one might drain before this one is used
                except ChildFailed as error:  # its keeper goes on trying
                    self._observer.died(spec.name, error.message, 0.0)
                finally:
                    del self._replacing[spec.name]
                    replaced.set()

    async def _replace_one(self, spec: ChildSpec) -> None:
        former = self._lives[spec.name]
        if former.exited.done():
            return  # it died, and its keeper is at work
        self._observer.replacing(spec.name)
        if spec.overlaps:
            await self._start(spec)
            await self._end(former, signal.SIGUSR1)
            self._leaving.remove(former)
        else:
            await self._end(former)
            await self._start(spec)

    async def _end(self, life: ChildProcess, ask: signal.Signals = signal.SIGTERM) -> None:
        """Drain one child (SIGUSR1: it hands over to its next life); it is killed when it takes longer than it may."""
        life.signal(ask)
        await asyncio.wait({life.exited}, timeout=self._limits.drain_s)
        if not life.exited.done():
            life.signal(signal.SIGTERM)
            await asyncio.wait({life.exited}, timeout=self._limits.stop_s)
        await life.kill()

    # -- drain --------------------------------------------------------------------------------------------------------
    async def _drain(self) -> None:
        """Ask the stages, the last one first, to finish and end; cut short by a second signal or the bound."""
        stop_now = asyncio.ensure_future(self._stop_now.wait())
        for stage in reversed(self._stages):
            names = {spec.name for spec in stage}
            lives = [self._lives[name] for name in names] + [life for life in self._leaving if life.name in names]
            for life in lives:
                life.signal(signal.SIGTERM)
            ended = asyncio.gather(*(asyncio.shield(life.exited) for life in lives))
            either: set[asyncio.Future[Any]] = {ended, stop_now}
            await asyncio.wait(either, timeout=self._limits.drain_s, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                ended.cancel()
                self._stop_now.set()
                break
        stop_now.cancel()
        if self._stop_now.is_set():
            await self._stop_at_once()

    async def _stop_at_once(self) -> None:
        """Another SIGTERM to each, so that open requests still get their terminal error; `run` kills what is left."""
        for stage in reversed(self._stages):
            lives = [self._lives[spec.name] for spec in stage if spec.name in self._lives]
            for life in lives:
                life.signal(signal.SIGTERM)
            await asyncio.wait({life.exited for life in lives}, timeout=self._limits.stop_s)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGUSR2, self._replace.set)

    def _on_signal(self, number: int) -> None:
        self._signals += 1
        self._signal_number = number
        self._stop.set()
        if self._signals > 1:
            self._stop_now.set()


def child_environment(inherited: Mapping[str, str], cpus: int, *, light: bool) -> dict[str, str]:
    """The environment of a child: ours, with thread pools sized by the CPUs this process may use.

    Idle threads sleep rather than spin: on a small machine a spinning pool takes the core that the router needs. What
    the user has set stays.
    """
    threads = cpus if cpus <= 4 else cpus - 1  # on larger machines one core is left to the router and the event loops
    if not light:
        ours = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
        # torch keeps a compiled bfloat16 matmul per shape, and each step has another number of tokens: by default 1024
        # of each kind, which took 700 MB more than these do, at the same speed (measured: bench/soak.py --quick).
        ours |= {"LRU_CACHE_CAPACITY": "64", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
        # torch asks the kernel for large pages: KV blocks lie anywhere, and attention read them 1.15 times as fast.
        ours["THP_MEM_ALLOC_ENABLE"] = "1"
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


def claim_port(host: str, port: int) -> socket.socket:
    """A listening socket that the routers inherit: while one is being replaced or restarted, connections wait in it
    rather than being refused. Port 0 finds a free one. Raises ConfigError that says what is in the way.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise ConfigError(f"--host {host} is no address of this machine: {error.strerror}") from error
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        raise ConfigError(_why_not(host, port, error)) from error
    return listening


def _why_not(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is in use by another process; stop that one, or choose a port with --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} on {host} needs privileges this user lacks; choose a port above 1023 with --port"
    return f"cannot listen on {host} port {port}: {error.strerror}"
