"""One NIXL agent and the one thread that may touch it (https://github.com/ai-dynamo/nixl, docs/nixl.md, Python API).

NIXL's own progress thread spins, which starves a small machine; instead this thread polls every 50 us while something
is under way and sleeps on a condition while nothing is. "Under way" is a read of ours, or of a peer that told us so:
over some of UCX's transports a read needs its target to make progress.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tokenrelay.base.errors import ConfigError, TransferFailed
from tokenrelay.base.logging import get_logger

log = get_logger("transfer")

POLL_S = 50e-6
WORKED_S = 20e-6  # a poll that took longer has moved data (UCX copies in it), so the next one follows at once
SLOW_POLL_S = 1e-3  # once nothing was heard for FAST_S: a peer is stopped, or the network is
FAST_S = 5.0
COMMANDS_MAX = 4096
Descriptors = npt.NDArray[np.uint64]  # [n, 3]: address, bytes, device
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class _Read:
    """A posted transfer."""

    handle: Any
    future: Future[None]
    gate: contextlib.AbstractContextManager[None]


class NixlAgent:
    """An agent with the UCX backend. Every public method may be called from any thread."""

    def __init__(self, name: str) -> None:
        """Raises ConfigError when NIXL or its UCX plugin does not load."""
        self._condition = threading.Condition()
        self._commands: deque[tuple[Callable[[], None], Future[Any]]] = deque()
        self._reads: list[_Read] = []  # of the thread
        self._peers_read = False
        self._fast_until_s = 0.0
        self._closing = False
        self.polls = 0  # rounds of the loop, for tests: none while idle
        self._thread = threading.Thread(target=self._run, name="transfer-nixl", daemon=True)
        self._thread.start()
        try:
            self._agent = self.call(lambda: _make_agent(name)).result(timeout=60)
        except BaseException:
            self.close()
            raise

    # Commands.

    def call(self, command: Callable[[], Result]) -> Future[Result]:
        """Run in the agent's thread. NIXL's errors become TransferFailed."""
        future: Future[Result] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = command()
            except BaseException as error:
                future.set_exception(_translated(error))
            else:
                future.set_result(result)

        with self._condition:
            if self._closing or len(self._commands) >= COMMANDS_MAX:
                raise TransferFailed("the NIXL agent is closed or overrun", reason="transport")
            self._commands.append((run, future))
            self._condition.notify()
        return future

    def register(self, descriptors: Descriptors, memory: str) -> Any:
        """Of `DRAM` or `VRAM`. What `deregister` takes; waits for it."""

        def register() -> Any:
            rows = [(int(address), int(size), int(device), "") for address, size, device in descriptors]
            return self._agent.register_memory(self._agent.get_reg_descs(rows, mem_type=memory))

        return self.call(register).result(timeout=60)

    def deregister(self, registration: Any) -> None:
        """No read into or out of it may be under way."""
        self.call(lambda: self._agent.deregister_memory(registration)).result(timeout=60)

    def metadata(self) -> bytes:
        """For `add_peer` of another process: everything that is registered now."""
        return bytes(self.call(lambda: self._agent.get_agent_metadata()).result(timeout=60))

    def add_peer(self, metadata: bytes) -> Future[str]:
        """Its agent's name."""

        def add() -> str:
            name = self._agent.add_remote_agent(metadata)
            return str(name.decode() if isinstance(name, bytes) else name)

        return self.call(add)

    def remove_peer(self, name: str) -> Future[None]:
        """Disconnect. No read from it may be under way."""
        return self.call(lambda: self._agent.remove_remote_agent(name))

    def read(
        self,
        peer: str,
        source: tuple[str, Descriptors],
        target: tuple[str, Descriptors],
        gate: contextlib.AbstractContextManager[None],
    ) -> Future[None]:
        """Start a read, inside `gate`; done when the data is here, or nothing of it will come any more."""
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()  # it cannot be taken back

        def started(command: Future[None]) -> None:
            error = command.exception()
            if error is not None:
                done.set_exception(error)

        self.call(lambda: self._start(peer, source, target, gate, done)).add_done_callback(started)
        return done

    def peers_read(self, reading: bool) -> None:
        """Whether a peer has reads under way that may need us; it says so with each of them."""
        with self._condition:
            self._peers_read = reading
            self._fast_until_s = time.monotonic() + FAST_S
            self._condition.notify()

    def close(self) -> None:
        """End the thread. Reads under way end as failed."""
        with self._condition:
            self._closing = True
            self._condition.notify()
        self._thread.join(timeout=10)

    # The thread.

    def _start(
        self,
        peer: str,
        source: tuple[str, Descriptors],
        target: tuple[str, Descriptors],
        gate: contextlib.AbstractContextManager[None],
        done: Future[None],
    ) -> None:
        agent = self._agent
        self._fast_until_s = time.monotonic() + FAST_S
        there = agent.get_xfer_descs(source[1], mem_type=source[0])
        here = agent.get_xfer_descs(target[1], mem_type=target[0])
        handle = agent.initialize_xfer("READ", here, there, peer)
        with contextlib.ExitStack() as stack:
            stack.enter_context(gate)
            read = _Read(handle, done, gate)
            state = agent.transfer(handle)
            if state == "PROC":
                stack.pop_all()  # the gate stays ours until the read is done
                self._reads.append(read)
                return
        self._end(read, state, gated=False)

    def _end(self, read: _Read, state: str, error: BaseException | None = None, gated: bool = True) -> None:
        """DONE or ERR: NIXL does nothing for this read any more."""
        if gated:
            read.gate.__exit__(None, None, None)
        with _logged("release of a read"):
            read.handle.release()
        if state == "DONE":
            read.future.set_result(None)
        else:
            failure = error or TransferFailed(
                "NIXL could not read: the peer or the network is gone", reason="peer_gone"
            )
            read.future.set_exception(_translated(failure))

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._commands or self._reads or self._peers_read or self._closing):
                    self._condition.wait()
                if self._closing:
                    break
                commands = list(self._commands)
                self._commands.clear()
            for command, _ in commands:
                command()
            if self._reads or self._peers_read:
                began_s = time.monotonic()
                self._poll()
                ended_s = time.monotonic()
                if ended_s - began_s < WORKED_S:
                    time.sleep(POLL_S if ended_s < self._fast_until_s else SLOW_POLL_S)
        closed = TransferFailed("the NIXL agent was closed", reason="closed")
        for read in self._reads:
            read.future.set_exception(closed)
        for _, future in self._commands:
            if future.set_running_or_notify_cancel():
                future.set_exception(closed)
        self._reads.clear()
        self._commands.clear()

    def _poll(self) -> None:
        self.polls += 1
        if self._peers_read:
            with _logged("progress"):
                self._agent.get_new_notifs()  # nobody sends any: this is what makes UCX go on
        still: list[_Read] = []
        for read in self._reads:
            try:
                state = self._agent.check_xfer_state(read.handle)
            except Exception as error:  # nixlRemoteDisconnectError and its like
                self._end(read, "ERR", error)
                continue
            if state == "PROC":
                still.append(read)
            else:
                self._end(read, state)
        self._reads = still


def _make_agent(name: str) -> Any:
    shown = logging.raiseExceptions
    try:
        from nixl_cu12._api import nixl_agent, nixl_agent_config
    except ImportError as error:
        raise ConfigError(f"NIXL does not import: {error}") from error
    finally:
        logging.raiseExceptions = shown  # it turns that off, and logs to stdout, which is not its to write on
        logger = logging.getLogger("nixl")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    agent = nixl_agent(name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
    if "UCX" not in agent.backends:
        raise ConfigError("NIXL has no UCX plugin here")
    return agent


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    """NIXL's refusals of what only tidies up."""
    try:
        yield
    except Exception as error:
        log.warning("NIXL refused", what=what, error=str(error))


def _translated(error: BaseException) -> BaseException:
    """NIXL's errors in the one tree; others as they are."""
    kind = type(error).__name__
    if not kind.startswith("nixl"):
        return error
    reason = {
        "nixlRemoteDisconnectError": "peer_gone",
        "nixlNotFoundError": "corrupt",
        "nixlInvalidParamError": "corrupt",
        "nixlMismatchError": "corrupt",
    }.get(kind, "transport")
    return TransferFailed(f"NIXL: {kind}: {error}", reason=reason)
