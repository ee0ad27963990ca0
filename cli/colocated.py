"""Colocated: both roles on one engine in one process, with the ledger embedded. The host behind the worker's Session.

Every sequence passes the handle transitions that a disaggregated one passes (docs/kv-ownership.md), with an identity
transfer; that costs some microseconds a request and nothing per token. Event loop only, but for `post` and `failed`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from tokenrelay.base.errors import DeadlineExceeded
from tokenrelay.base.logging import get_logger
from tokenrelay.ledger.directory import CacheEvent, CacheFeed, PrefixDirectory
from tokenrelay.ledger.ledger import Actor, EmbeddedLedger, Handle
from tokenrelay.proto import worker_pb2
from tokenrelay.runtime.engine import Engine
from tokenrelay.runtime.explain import Answer
from tokenrelay.runtime.requests import EngineOutput, EngineStats
from tokenrelay.services.chassis.mailbox import LoopMailbox
from tokenrelay.services.chassis.session import WorkerServicer
from tokenrelay.services.decode.service import DecodeRole
from tokenrelay.services.prefill.config import PrefillConfig
from tokenrelay.services.prefill.service import PrefillRole

log = get_logger("colocated")

EXPLAIN_TIMEOUT_S = 4.0  # less than what a router waits
Posts = list[tuple[list[EngineOutput], EngineStats]]


class EngineLink:
    """What an engine calls from its thread, carried over to the event loop. Made before the engine and the roles."""

    def __init__(self, loop: asyncio.AbstractEventLoop, on_fatal: Callable[[BaseException], None]) -> None:
        """`on_fatal(error)` is called on the loop."""
        self._loop = loop
        self._on_fatal = on_fatal
        self._take: Callable[[Posts], None] | None = None
        self._publish: Callable[[list[CacheEvent]], None] | None = None
        self._mailbox = LoopMailbox[list[EngineOutput], EngineStats](loop, self._deliver)

    def bind(self, take: Callable[[Posts], None], publish: Callable[[list[CacheEvent]], None]) -> None:
        """Who reads, on the loop."""
        self._take, self._publish = take, publish

    def on_step(self, outputs: list[EngineOutput], stats: EngineStats) -> None:
        """Engine's thread."""
        self._mailbox.post(outputs, stats)

    def on_cache_events(self, events: list[CacheEvent]) -> None:
        """Engine's thread."""
        assert self._publish is not None
        self._loop.call_soon_threadsafe(self._publish, events)

    def on_fatal(self, error: BaseException) -> None:
        """Engine's thread."""
        self._loop.call_soon_threadsafe(self._on_fatal, error)

    def close(self) -> None:
        """Nothing reaches the loop any more."""
        self._mailbox.close()

    def _deliver(self, posts: Posts) -> None:
        assert self._take is not None
        self._take(posts)


def mount_roles(
    engine: Engine,
    link: EngineLink,
    handshake: worker_pb2.HandshakeReply,
    *,
    layers: int,
    claim_deadline_s: float,
    prefill_config: PrefillConfig | None = None,
) -> Colocated:
    """Both roles on `engine`, whose callbacks are `link`'s, with a ledger and a directory of their own."""
    ledger, incarnation = EmbeddedLedger(), handshake.incarnation
    prefill = PrefillRole(
        engine,
        ledger,
        Actor("prefill", incarnation),
        layers=layers,
        eos_token_ids=tuple(handshake.eos_token_ids),
        config=prefill_config,
    )
    decode = DecodeRole(ledger, Actor("decode", incarnation), claim_deadline_s=claim_deadline_s)
    host = Colocated(engine, prefill, decode, ledger, handshake, link)
    link.bind(host.take, host.publish)
    return host


class Colocated:
    """Implements chassis.session.WorkerHost."""

    def __init__(
        self,
        engine: Engine,
        prefill: PrefillRole,
        decode: DecodeRole,
        ledger: EmbeddedLedger,
        handshake: worker_pb2.HandshakeReply,
        link: EngineLink,
    ) -> None:
        self.ledger = ledger
        self.directory = PrefixDirectory()
        self._feed = CacheFeed("colocated", handshake.incarnation)
        self._link = link
        self._engine = engine
        self._prefill = prefill
        self._decode = decode
        self._handshake = handshake
        self._deliver: Callable[[list[worker_pb2.SequenceOutput], worker_pb2.Stats], None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    def bind(self, servicer: WorkerServicer) -> None:
        """Where outputs go."""
        self._deliver = servicer.deliver

    def start(self) -> None:
        """Begin to run."""
        self._engine.start()

    def close(self) -> None:
        """Stop the engine; what is open gets its answer if the loop still reads. Any thread."""
        self._engine.close()
        self._link.close()

    # -- WorkerHost ---------------------------------------------------------------------------------------------------
    def handshake(self) -> worker_pb2.HandshakeReply:
        """Who this worker is."""
        return self._handshake

    def submit(self, sequence_id: int, submit: worker_pb2.Submit) -> worker_pb2.SequenceOutput | None:
        """Begin a sequence: reserve, offer, claim."""
        handle = self._prefill.admit(sequence_id, submit)
        if not isinstance(handle, Handle):
            return handle
        self._decode.claim(sequence_id, handle)
        if self._timer is None:
            self._set_timer()
        return None

    def abort(self, sequence_id: int) -> None:
        """End a sequence; the engine answers."""
        self._engine.abort(sequence_id)

    def stats(self) -> worker_pb2.Stats:
        """Counters as of the last step."""
        return stats_message(self._engine.stats)

    async def explain(self, request_id: str) -> worker_pb2.ExplainReply:
        """What the scheduler says about the open sequences of a request, or about all. Raises TokenRelayError."""
        return await explain(self._engine, request_id)

    # -- from the engine ----------------------------------------------------------------------------------------------
    def take(self, posts: Posts) -> None:
        """Outputs of the steps since the last call (the mailbox's reader)."""
        assert self._deliver is not None
        for outputs, stats in posts:
            self._deliver([self._pass_on(output) for output in outputs], stats_message(stats))

    def publish(self, events: list[CacheEvent]) -> None:
        """What became cache, or ceased to be, goes to the directory."""
        self._feed.publish(self.directory, events)

    def _pass_on(self, output: EngineOutput) -> worker_pb2.SequenceOutput:
        """Hand the sequence over with its first token; the role that has it emits."""
        sequence_id = output.sequence_id
        if not self._prefill.owns(sequence_id):
            return self._decode.emit(output)
        if output.first:
            self._prefill.sealed(sequence_id)
        if output.first and not output.finish:
            self._decode.adopt(sequence_id)
            self._prefill.adopted(sequence_id)
        elif output.finish:  # nothing to hand over
            self._decode.decline(sequence_id)
            self._prefill.over(sequence_id)
        return self._prefill.emit(output)

    # -- deadlines of handles -----------------------------------------------------------------------------------------
    def _set_timer(self) -> None:
        left_s = self.ledger.next_deadline_s()
        self._timer = None
        if left_s is not None:
            self._timer = asyncio.get_running_loop().call_later(left_s + 0.01, self._act_on_deadlines)

    def _act_on_deadlines(self) -> None:
        """Law 3: someone acts. Both sides are this process: the sequence is aborted, and its end closes the handle."""
        for handle, duty in self.ledger.expired():
            sequence_id = self._prefill.sequence_of(handle)
            log.warning("a handle is past its deadline", sequence=sequence_id, duty=duty.value)
            if sequence_id is not None:
                self._engine.abort(sequence_id, DeadlineExceeded("the first token was not there in time"))
        self._timer = None
        if self.ledger.open_count:  # what was aborted just now stays listed until the engine has answered
            self._timer = asyncio.get_running_loop().call_later(1.0, self._set_timer)


async def explain(engine: Engine, request_id: str) -> worker_pb2.ExplainReply:
    """What an engine's scheduler says about a request's open sequences, or about all. Raises TokenRelayError."""
    future = asyncio.wrap_future(engine.explain(request_id))
    try:
        return explain_reply(await asyncio.wait_for(future, EXPLAIN_TIMEOUT_S))
    except TimeoutError:
        raise DeadlineExceeded(f"the engine did not answer in {EXPLAIN_TIMEOUT_S:.0f} s") from None


def explain_reply(answer: Answer) -> worker_pb2.ExplainReply:
    """The engine's answer for the wire."""
    return worker_pb2.ExplainReply(
        sequences=[
            worker_pb2.SequenceExplanation(
                request_id=one.request_id,
                choice=one.choice,
                text=one.explanation["text"],
                json=json.dumps({name: value for name, value in one.explanation.items() if name != "text"}),
            )
            for one in answer.sequences
        ],
        left_out=answer.left_out,
    )


def stats_message(stats: EngineStats) -> worker_pb2.Stats:
    """The wire's counters."""
    return worker_pb2.Stats(
        blocks_free=stats.blocks_free,
        blocks_cached=stats.blocks_cached,
        blocks_active=stats.blocks_active,
        blocks_writable=stats.blocks_writable,
        blocks_in_flight=stats.blocks_in_flight,
        blocks_quarantined=stats.blocks_quarantined,
        blocks_sealed=stats.blocks_sealed,
        sequences_waiting=stats.sequences_waiting,
        sequences_running=stats.sequences_running,
        steps=stats.steps,
        prompt_tokens=stats.prompt_tokens,
        cached_tokens=stats.cached_tokens,
        output_tokens=stats.output_tokens,
        preemptions=stats.preemptions,
        aborts=stats.aborts,
        step_time_us=stats.step_time_us,
        integrity_checks=stats.integrity_checks,
        integrity_failures=stats.integrity_failures,
        integrity_check_us=stats.integrity_check_us,
        tps_floor=worker_pb2.TpsFloor(
            configured=stats.floor.configured,
            in_force=stats.floor.in_force,
            batch_1=stats.floor.batch_1,
            users_below=stats.floor.users_below,
            tokens=stats.floor.tokens,
            tokens_late=stats.floor.tokens_late,
            overrides=stats.floor.overrides,
        ),
        host_tier=worker_pb2.HostTier(
            blocks=stats.host.blocks,
            blocks_used=stats.host.blocks_used,
            copies_late=stats.host.copies_late,
            blocks_stored=stats.host.blocks_stored,
            blocks_loaded=stats.host.blocks_loaded,
            loads=stats.host.loads,
            tokens_loaded=stats.host.tokens_loaded,
            copies_failed=stats.host.copies_failed,
            copies_expired=stats.host.copies_expired,
            block_bytes=stats.host.block_bytes,
        ),
        drafts=worker_pb2.Drafts(
            drafts=stats.drafts.drafts,
            tokens=stats.drafts.tokens,
            accepted=stats.drafts.accepted,
            proposer=stats.drafts.proposer,
        ),
    )
