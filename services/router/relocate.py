"""Where the sequences of one request run, and where they go on when their worker dies, drains or is full.

A sequence that moves is submitted again with its prompt and every token it emitted so far. Random numbers are keyed by
(seed, choice, output position), so that the other worker goes on with the same text, and the client's stream has no
token twice and none missing. Moves are bounded: a request that kills whoever runs it must not end the whole fleet.
"""

from __future__ import annotations

import asyncio
import time
from typing import Generic, Protocol, TypeVar

from tokenrelay.base.errors import Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import decode_error
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.metrics import Metrics
from tokenrelay.services.router.workers import Handle, WorkerPool

log = get_logger("router")


class Movable(Protocol):
    """A sequence, as far as this file is concerned."""

    index: int
    handle: Handle | None
    output_tokens: int
    refused_by: set[str]  # targets that had no room for it
    moves: int
    whole: bool  # submit all its tokens: its worker does not have its parent's text

    def on_output(self, output: worker_pb2.SequenceOutput) -> None:
        """Where its outputs go."""


SequenceT = TypeVar("SequenceT", bound=Movable)
ContraT = TypeVar("ContraT", bound=Movable, contravariant=True)


class Owner(Protocol[ContraT]):
    """The request. Handed over with each call and kept only while something waits: it refers to its relocation."""

    request_id: str

    def submission(self, choice: ContraT, client: WorkerClient) -> worker_pb2.Submit:
        """What to submit to this worker for a sequence as it stands now."""

    def fail(self, error: TokenRelayError, reason: str) -> None:
        """End the whole request."""


class Relocation(Generic[SequenceT]):
    """One request's sequences. Event loop only; `close` must be called."""

    def __init__(self, pool: WorkerPool, metrics: Metrics) -> None:
        self.pool = pool
        self._metrics = metrics
        self.preferred: WorkerClient | None = None  # it has the beginning of the prompt in its cache
        self._client: WorkerClient | None = None  # where this request's sequences go: they share their prompt's KV
        self._parked: list[tuple[Owner[SequenceT], SequenceT]] = []  # no worker is usable, but one may come back
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, owner: Owner[SequenceT], sequence: SequenceT) -> None:
        """Submit a sequence for the first time. In a fleet whose last worker went a moment ago (a rolling restart), it
        waits for one to come back. Raises Unavailable or Overloaded.
        """
        try:
            self.place(owner, sequence)
        except Unavailable as error:
            if not self.pool.several or self.pool.without_s >= self.pool.config.move_wait_s:
                raise
            self._park(owner, sequence, error)

    def place(self, owner: Owner[SequenceT], sequence: SequenceT) -> None:
        """Submit a sequence, beside the others of its request where that can be. Raises Unavailable or Overloaded."""
        refused = sequence.refused_by
        client = self._client
        if client is None or client.target in refused or client not in self.pool.usable:
            client = self._client = self.pool.choose(without=refused, preferred=self.preferred)
        sequence.handle = self.pool.submit(client, owner.submission(sequence, client), sequence.on_output)

    def move(self, owner: Owner[SequenceT], sequence: SequenceT, output: worker_pb2.SequenceOutput) -> bool:
        """Take up a sequence whose worker ended it without being asked. False: this is its end."""
        if output.reject_reason == worker_pb2.REJECT_PARENT_UNKNOWN and not sequence.whole:
            sequence.whole = True
            self._metrics.turns["unknown"] += 1
            self._place_or_park(owner, sequence)
            return True
        cause, target = _cause(output), sequence.handle.client.target if sequence.handle is not None else ""
        if cause is None or not self.pool.several:
            return False
        if cause == "full":
            if len(sequence.refused_by) + 1 >= len(self.pool.clients):
                return False  # everybody refused it: the client hears of the last refusal
            sequence.refused_by.add(target)
        else:
            sequence.moves += 1
            if sequence.moves > self.pool.config.moves_max:
                return False
        if cause == "drain":
            self.pool.avoid(target)
        sequence.handle = None
        self._metrics.moves[cause] += 1
        log.info("sequence moves", request_id=owner.request_id, choice=sequence.index, cause=cause, worker=target)
        self._place_or_park(owner, sequence)
        return True

    def close(self) -> None:
        """Nothing further is wanted. Idempotent."""
        self._parked.clear()
        self.pool.forget(self._retry)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _place_or_park(self, owner: Owner[SequenceT], sequence: SequenceT) -> None:
        try:
            self.place(owner, sequence)
        except Unavailable as error:
            if sequence.refused_by:
                owner.fail(Overloaded("every worker is full or unavailable; try again"), "worker")
            else:
                self._park(owner, sequence, error)
        except TokenRelayError as error:
            owner.fail(error, "worker")

    def _park(self, owner: Owner[SequenceT], sequence: SequenceT, error: TokenRelayError) -> None:
        self._parked.append((owner, sequence))
        if self._timer is None:
            wait_s, loop = self.pool.config.move_wait_s, asyncio.get_running_loop()
            self._timer = loop.call_later(wait_s, self._give_up, error, time.monotonic())
            self.pool.when_usable(self._retry)

    def _retry(self) -> None:
        """A worker became usable."""
        parked = list(self._parked)
        self.close()
        for owner, sequence in parked:
            self._place_or_park(owner, sequence)

    def _give_up(self, error: TokenRelayError, since_s: float) -> None:
        waited_s = time.monotonic() - since_s
        owner = self._parked[0][0]
        self.close()
        message = f"its worker was lost and no other came in {waited_s:.0f} s: {error.message}"
        owner.fail(Unavailable(message), "worker")


def _cause(output: worker_pb2.SequenceOutput) -> str | None:
    """Why another worker may do better: "lost", "drain", "full", or None where it would not."""
    if output.finish == worker_pb2.FINISH_REJECTED:
        return {worker_pb2.REJECT_DRAINING: "drain", worker_pb2.REJECT_QUEUE_FULL: "full"}.get(output.reject_reason)
    if output.finish == worker_pb2.FINISH_ERROR and isinstance(decode_error(output.error), Unavailable):
        return "lost"
    return None
