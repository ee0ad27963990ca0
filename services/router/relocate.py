"""Where the sequences of one request run, and where they go on when their worker dies, drains or is full.

Where that pays its prompt is computed at another worker than the one that decodes it (placement.py, legs.py).

A sequence that moves is submitted again with its prompt and every token it emitted so far. Random numbers are keyed by
(seed, choice, output position), so that the other worker goes on with the same text, and the client's stream has no
token twice and none missing. Moves are bounded: a request that kills whoever runs it must not end the whole fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Generic, Protocol, TypeVar

from tokenrelay.base.errors import Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import decode_error
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.legs import TwoLegs
from tokenrelay.services.router.metrics import Metrics
from tokenrelay.services.router.placement import Decision, decide
from tokenrelay.services.router.policies import Pick, Wish
from tokenrelay.services.router.trails import ChoiceTrail, Trail
from tokenrelay.services.router.workers import NO_WISH, Handle, WorkerPool

log = get_logger("router")

NEAREST = "has most of its beginning, by the prefix directory"
HANDOVERS_MAX = 2  # of one sequence that may fail; then one worker does all of it


class Movable(Protocol):
    """A sequence, as far as this file is concerned."""

    index: int
    handle: Handle | TwoLegs | None
    output_tokens: int
    refused_by: set[str]  # targets that had no room for it
    moves: int
    handovers_left: int
    whole: bool  # submit all its tokens: its worker does not have its parent's text

    def on_output(self, output: worker_pb2.SequenceOutput) -> None:
        """Where its outputs go."""


SequenceT = TypeVar("SequenceT", bound=Movable)
ContraT = TypeVar("ContraT", bound=Movable, contravariant=True)


class Owner(Protocol[ContraT]):
    """The request. Handed over with each call and kept only while something waits: it refers to its relocation."""

    request_id: str
    trail: Trail

    def submission(self, choice: ContraT, client: WorkerClient) -> worker_pb2.Submit:
        """What to submit to this worker for a sequence as it stands now."""

    def outlook(self, choice: ContraT) -> tuple[int, Mapping[str, int]]:
        """Tokens of its text, and how many of them workers have in their caches, by target."""

    def nearest(self, choice: ContraT) -> WorkerClient | None:
        """The usable worker that has most of its text in its cache; None: nobody has any of it."""

    def fail(self, error: TokenRelayError, reason: str) -> None:
        """End the whole request."""


class Relocation(Generic[SequenceT]):
    """One request's sequences. Event loop only; `close` must be called."""

    def __init__(self, pool: WorkerPool, metrics: Metrics) -> None:
        self.pool = pool
        self._metrics = metrics
        self.decision: Decision | None = None  # of the last sequence that was placed, where there was a choice
        self.wish: Wish[WorkerClient] = NO_WISH  # who has the beginning of the prompt in its cache
        self.session = b""  # the session that its request is of
        self.pick: Pick[WorkerClient] | None = None  # the last one
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
            if client is not None:  # it goes on elsewhere: with what others have of it by now
                self.wish = replace(self.wish, preferred=owner.nearest(sequence), because=NEAREST)
            self.pick = self.pool.choose(without=refused, wish=self.wish)
            client = self._client = self.pick.worker
            if self.session:
                self.pool.sessions.put(self.session, client.target)
        source = self._source_for(owner, sequence, client)
        if source is not None:
            assert self.decision is not None
            make_submit, tokens = partial(owner.submission, sequence), self.decision.tokens
            with contextlib.suppress(Overloaded, Unavailable):  # the prefill worker does not take it
                take, handovers = sequence.on_output, self.pool.handovers
                trail = ChoiceTrail(owner.trail, sequence.index)
                sequence.handle = TwoLegs(source, client, make_submit, take, handovers, tokens, trail)
                return
        sequence.handle = self.pool.submit(client, owner.submission(sequence, client), sequence.on_output)
        owner.trail.note("submitted", choice=sequence.index, worker=client.target)

    def _source_for(
        self, owner: Owner[SequenceT], sequence: SequenceT, destination: WorkerClient
    ) -> WorkerClient | None:
        """The worker that computes its prompt for `destination`; None: that one does."""
        sources = self.pool.sources
        if not sources:  # colocated: there is nothing to decide
            return None
        sources = [client for client in sources if client.target not in sequence.refused_by]
        if sequence.handovers_left == 0:
            self.decision = Decision(None, "failed", "handing its KV over failed: one worker does all of it")
        else:
            tokens, cached = owner.outlook(sequence)
            self.decision = decide(tokens, cached, destination, sources, self.pool.handovers, self.pool.config)
        where = "alone" if self.decision.source is None else "remote"
        self.pool.handovers.decisions[where, self.decision.reason] += 1
        return self.decision.source

    def move(self, owner: Owner[SequenceT], sequence: SequenceT, output: worker_pb2.SequenceOutput) -> bool:
        """Take up a sequence whose worker ended it without being asked. False: this is its end."""
        if output.reject_reason == worker_pb2.REJECT_PARENT_UNKNOWN and not sequence.whole:
            sequence.whole = True
            self._metrics.turns["unknown"] += 1
            self._place_or_park(owner, sequence)
            return True
        handle, cause = sequence.handle, _cause(output)
        if isinstance(handle, TwoLegs):
            cause = handle.cause(output, cause)
            if not handle.decoding:
                sequence.handovers_left = 0 if cause == "handover" else max(0, sequence.handovers_left - 1)
        target = handle.client.target if handle is not None else ""
        if output.finish == worker_pb2.FINISH_ERROR and cause != "drain":
            self.pool.breakers.failed(target)
        if cause is None or not self.pool.several:
            return False
        if (cause == "full" or sequence.moves) and cause != "drain" and not self.pool.retries.spend():
            return False
        if cause == "full":
            if len(sequence.refused_by) + 1 >= len(self.pool.clients):
                return False  # everybody refused it: the client hears of the last refusal
            sequence.refused_by.add(target)
        elif cause != "handover":  # which has its own bound
            sequence.moves += 1
            if sequence.moves > self.pool.config.moves_max:
                return False
        if cause == "drain":
            self.pool.avoid(target)
        sequence.handle = None
        self._metrics.moves[cause] += 1
        owner.trail.note("moved", choice=sequence.index, worker=target, detail=cause)
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
        owner.trail.note("parked", choice=sequence.index, detail=error.message)
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
