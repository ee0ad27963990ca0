"""The workers of one router: which of them a sequence goes to, and the model they serve.

A worker counts once its handshake is done and the model's folder is read. All workers serve one model: the first
that answers says which, and one that runs another is not used (and says so in /ready) until it is the only one left.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from tokenrelay.base.errors import TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import OnOutput, WorkerClient
from tokenrelay.services.chassis.security import Security
from tokenrelay.services.router.breakers import Breakers, RetryBudget
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.model import ServedModel, load_model
from tokenrelay.services.router.placement import Handovers, is_source
from tokenrelay.services.router.policies import Chooser, Pick, Wish
from tokenrelay.services.router.prefixes import Prefixes
from tokenrelay.services.router.sessions import Sessions
from tokenrelay.services.router.trails import Trails
from tokenrelay.services.router.turns import TurnMemory

log = get_logger("router")

NO_WISH: Wish[WorkerClient] = Wish()
LOAD_RETRY_S = 2.0  # a folder that cannot be used may be repaired


@dataclass(slots=True)
class Handle:
    """A sequence at a worker."""

    client: WorkerClient
    sequence: int

    def abort(self) -> None:
        """End it; nothing happens when it has ended."""
        self.client.abort(self.sequence)


class WorkerPool:
    """All workers. Event loop only."""

    def __init__(self, config: RouterConfig, executor: Executor, security: Security | None = None) -> None:
        self.config = config
        self._security = security or Security()
        self._started = False
        self._retired: set[str] = set()  # out of the fleet, and used as long as their connection holds
        self._closing: set[asyncio.Task[None]] = set()
        self._executor = executor
        self._clients = [self._client(target) for target in config.targets]
        self._loads: dict[str, asyncio.Task[None]] = {}
        self._problems: dict[str, str] = {}  # target -> why it is not used although it is connected
        self._usable: set[str] = set()
        self._chooser: Chooser[WorkerClient] = Chooser(config.policy)
        self.breakers = Breakers()
        self.retries = RetryBudget()
        self.sessions = Sessions()
        self._avoided: set[str] = set()  # they drain: used again when they come back
        self._last_usable_s = -math.inf  # when there was one, if there is none
        self._waiting: dict[Callable[[], None], None] = {}  # called when a worker becomes usable, in order
        self.model: ServedModel | None = None
        self.turns = TurnMemory(config.turn_memory_bytes)
        self.prefixes = Prefixes()  # filled by members.py
        self.handovers = Handovers()
        self.trails = Trails()

    def _client(self, target: str) -> WorkerClient:
        return WorkerClient(target, security=self._security, on_ready=lambda ready: self._changed(target, ready))

    @property
    def several(self) -> bool:
        """Whether another worker may go on where one ends."""
        return len(self._clients) > 1 or bool(self.config.kvstore)

    @property
    def clients(self) -> Sequence[WorkerClient]:
        """Every worker, ready or not."""
        return self._clients

    @property
    def usable(self) -> list[WorkerClient]:
        """Workers that take sequences now."""
        usable = self._usable - self._avoided
        return [client for client in self._clients if client.ready and client.target in usable]

    @property
    def decoders(self) -> list[WorkerClient]:
        """Where sequences go: the usable workers, without those for prompts unless there are no others."""
        usable = self.usable
        return [client for client in usable if not is_source(client)] or usable

    @property
    def sources(self) -> list[WorkerClient]:
        """Usable workers for prompts."""
        sources = [client for client in self.usable if is_source(client)]
        return [client for client in sources if not self.breakers.open(client.target)] if sources else sources

    async def start(self) -> None:
        """Begin to connect, in the background."""
        self._started = True
        for client in self._clients:
            await client.start()

    async def close(self) -> None:
        """End every connection; open sequences get their terminal error."""
        for task in self._loads.values():
            task.cancel()
        await asyncio.gather(*self._loads.values(), return_exceptions=True)
        await asyncio.gather(*self._closing, *(client.close() for client in self._clients))

    def add(self, target: str) -> None:
        """One more worker, or one that is back."""
        self._retired.discard(target)
        if all(client.target != target for client in self._clients):
            client = self._client(target)
            self._clients.append(client)
            log.info("worker found", target=target)
            if self._started:
                self._later(client.start())

    def retire(self, target: str) -> None:
        """It has left the fleet: forgotten at once, or when the connection that it still serves ends."""
        client = next((client for client in self._clients if client.target == target), None)
        if client is None:
            return
        self._retired.add(target)
        if not client.ready:
            self._drop(client)

    def _drop(self, client: WorkerClient) -> None:
        self._retired.discard(client.target)
        self._chooser.forget(client.target)
        self.breakers.forget(client.target)
        self._clients.remove(client)
        log.info("worker gone", target=client.target)
        self._later(client.close())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def why_not(self) -> str:
        """Why no worker is usable, for people."""
        return "; ".join(self.problem(client) for client in self._clients) or "none is known"

    def problem(self, client: WorkerClient) -> str:
        """Why this worker is not usable, for people."""
        if client.ready and client.target in self._avoided:
            return f"worker {client.target} drains"
        problem = self._problems.get(client.target) or (client.last_error.message if client.last_error else None)
        return problem or f"worker {client.target} is not connected yet"

    def require_model(self) -> ServedModel:
        """The model, even while its worker is restarting. Raises Unavailable before the first worker was there."""
        if self.model is None:
            raise Unavailable(f"no worker is ready: {self.why_not()}")
        return self.model

    def choose(self, without: Collection[str] = (), wish: Wish[WorkerClient] = NO_WISH) -> Pick[WorkerClient]:
        """The usable worker that the policy names, none of `without` (targets). Raises Unavailable.

        Workers for prompts alone are chosen when there is no other, those that fail again and again, too.
        """
        usable = [client for client in self.usable if client.target not in without]
        usable = [client for client in usable if not is_source(client)] or usable
        if not usable:
            raise Unavailable(f"no worker is ready: {self.why_not()}")
        pick = self._chooser.choose(self.breakers.allowed(usable), wish)
        self.breakers.sent(pick.worker.target)
        return pick

    def preferred(self, session: bytes) -> WorkerClient | None:
        """The usable worker that a session's last request went to."""
        target = self.sessions.get(session)
        return next((client for client in self.decoders if client.target == target), None)

    def require_usable(self) -> None:
        """Raises Unavailable where no worker is usable."""
        if not self.usable:
            raise Unavailable(f"no worker is ready: {self.why_not()}")

    def submit(self, client: WorkerClient, submit: worker_pb2.Submit, on_output: OnOutput) -> Handle:
        """Send one sequence to a worker. Raises Unavailable or Overloaded."""
        return Handle(client, client.submit(submit, on_output))

    @property
    def without_s(self) -> float:
        """For how long no worker has been usable, in seconds."""
        return 0.0 if self.usable else time.monotonic() - self._last_usable_s

    def avoid(self, target: str) -> None:
        """It drains: nothing new goes there in this life of it."""
        self._note_usable()
        self._avoided.add(target)

    def _note_usable(self) -> None:
        """To be called before one that is usable may cease to be."""
        if self._usable - self._avoided:
            self._last_usable_s = time.monotonic()

    def when_usable(self, call: Callable[[], None]) -> None:
        """Call once the next worker becomes usable."""
        self._waiting[call] = None

    async def wait_usable(self, timeout_s: float) -> bool:
        """Whether a worker was usable within this time."""
        usable = asyncio.Event()
        self.when_usable(usable.set)
        try:
            async with asyncio.timeout(timeout_s):
                if not self.usable:
                    await usable.wait()
        except TimeoutError:
            return False
        finally:
            self.forget(usable.set)
        return True

    def forget(self, call: Callable[[], None]) -> None:
        """Do not call any more; nothing happens when it is not waiting."""
        self._waiting.pop(call, None)

    # -- readiness ----------------------------------------------------------------------------------------------------
    def _changed(self, target: str, ready: bool) -> None:
        load = self._loads.pop(target, None)
        if load is not None:
            load.cancel()
        self._note_usable()
        self._usable.discard(target)
        self._avoided.discard(target)
        self._problems.pop(target, None)
        if ready:
            self._begin_load(next(client for client in self._clients if client.target == target))
            return
        if target in self._retired:
            self._drop(next(client for client in self._clients if client.target == target))
        if not self.usable:
            for client in self._clients:  # those that run another model may have their turn now
                if client.ready and client.target in self._problems:
                    self._begin_load(client)

    def _begin_load(self, client: WorkerClient) -> None:
        if client.handshake is not None:
            load = asyncio.create_task(self._load(client, client.handshake), name=f"load model of {client.target}")
            self._loads[client.target] = load

    async def _load(self, client: WorkerClient, reply: worker_pb2.HandshakeReply) -> None:
        """Make a connected worker usable: its model must be ours, or become ours. Tries until the worker is gone."""
        while self.model is None or self._differs(self.model, reply):
            if self.model is not None and self.usable:
                served, other = self.model.names[0], reply.model_name
                self._problems[client.target] = f"worker {client.target} runs {other!r}, the others run {served!r}"
                log.error("another model", target=client.target, served=served, other=other)
                return
            loop = asyncio.get_running_loop()
            try:
                model = await loop.run_in_executor(self._executor, load_model, reply, self.config, self._executor)
            except TokenRelayError as error:
                self._problems[client.target] = error.message
                log.error("the model's folder cannot be used", target=client.target, reason=error.message)
                await asyncio.sleep(LOAD_RETRY_S)
                continue
            if self.model is None or not self.usable:  # else another worker was faster, and the loop looks again
                self.model = model
                log.info("model loaded", model=model.names[0], incremental_tokenizer=model.tokenizer.incremental)
        self._problems.pop(client.target, None)
        self._usable.add(client.target)
        waiting, self._waiting = self._waiting, {}
        for call in waiting:
            call()

    def _differs(self, model: ServedModel, reply: worker_pb2.HandshakeReply) -> bool:
        return bool(
            model.identity != reply.model_identity
            or model.context_tokens != reply.context_tokens
            or (reply.vocab_size and model.vocabulary_size != reply.vocab_size)
            or (not self.config.model_dir and str(model.folder) != reply.model_path)
        )
