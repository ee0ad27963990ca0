"""One HTTP request's sequences at the workers: from packed prompts to text, in callbacks, with no task of its own.

    run = Run(pool, metrics, wanted, model, request_id, prompts, make_text)
    run.start()                   # submits prompts x n sequences
    await run.first               # a token, an end or a failure is there
    await run.done                # every choice ended, or `run.error` says why not
    run.close("disconnect")       # aborts whatever is still open; always called

Exactly one end: the first error fails the whole run, and outputs that come after an end are ignored.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenrelay.base.errors import DeadlineExceeded, InvalidRequest, Overloaded, TokenRelayError, Unavailable
from tokenrelay.base.logging import get_logger
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import decode_error
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.ceiling import Ceiling
from tokenrelay.services.router.legs import TwoLegs
from tokenrelay.services.router.metrics import Metrics
from tokenrelay.services.router.model import ServedModel, context_exceeded
from tokenrelay.services.router.policies import HASH_BYTES, Wish
from tokenrelay.services.router.relocate import HANDOVERS_MAX, NEAREST, Relocation
from tokenrelay.services.router.sessions import session_key
from tokenrelay.services.router.stops import StopMatcher
from tokenrelay.services.router.text import Delta, TextSink
from tokenrelay.services.router.tokenize import unpack_ids
from tokenrelay.services.router.turns import Inherited, Turn
from tokenrelay.services.router.validate import Wanted
from tokenrelay.services.router.workers import NO_WISH, Handle, WorkerPool

log = get_logger("router")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: packed ids, and the name of the parameter it came from."""

    packed: bytes
    param: str

    @property
    def tokens(self) -> int:
        """How many tokens it has."""
        return len(self.packed) // 4


class OnStep(Protocol):
    """Who writes what a choice has gathered, after each step that brought it something."""

    def __call__(self, choice: Choice) -> None:
        """Called on the event loop; must not raise."""


class Choice:
    """One sequence of a run. `delta` is what nobody took yet."""

    __slots__ = (
        "_detokenizer",
        "_eager",
        "_last_s",
        "_run",
        "_stops",
        "cached_tokens",
        "delta",
        "emitted",
        "finish_reason",
        "handle",
        "handovers_left",
        "index",
        "moves",
        "output_tokens",
        "prompt_index",
        "refused_by",
        "sent",
        "sent_end",
        "stop_reason",
        "text",
        "whole",
    )

    def __init__(self, run: Run, index: int, prompt_index: int, text: TextSink) -> None:
        wanted = run.wanted
        self._run: Run | None = run
        self.index = index
        self.prompt_index = prompt_index
        self.text = text
        self.delta = Delta()
        self.handle: Handle | TwoLegs | None = None
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.output_tokens = 0
        self.cached_tokens = 0
        self.emitted = bytearray()  # every token so far, packed: another worker may have to go on from here
        self.moves = 0
        self.handovers_left = HANDOVERS_MAX
        self.refused_by: set[str] = set()
        self.whole = False
        self.sent = False  # a chunk of it has left
        self.sent_end = False  # the one with its finish_reason, too
        self._last_s = 0.0
        self._detokenizer = run.model.vocabulary.detokenizer(
            skip_special=wanted.skip_special, keep_ids=run.model.tag_ids if text.needs_tags else ()
        )
        self._stops = StopMatcher(wanted.stops, include=wanted.include_stop) if wanted.stops is not None else None
        # A unary reply without stop strings is detokenized once, at its end.
        self._eager = wanted.stream or self._stops is not None or text.may_end

    # -- from the worker ----------------------------------------------------------------------------------------------
    def on_output(self, output: worker_pb2.SequenceOutput) -> None:
        """Take what one step made. Never raises: what nobody foresaw fails this request, and leaves no client
        waiting.
        """
        run = self._run
        if run is None or self.finish_reason is not None or run.error is not None:
            return
        try:
            self._take(output, run)
        except Exception:
            log.exception("an output could not be handled", request_id=run.request_id)
            run.fail(TokenRelayError("the server failed; its log says why"), "error")

    def release(self) -> None:
        """Nothing further is wanted. Choice and run refer to each other: without this they would wait for a
        collection.
        """
        self._run = None

    def _take(self, output: worker_pb2.SequenceOutput, run: Run) -> None:
        finish = output.finish
        if finish >= worker_pb2.FINISH_ABORT:
            if not run.taken_up(self, output):
                self.handle = None  # it has ended there
                run.fail(_failure(output, run, self), "worker")
            return
        packed = output.token_ids
        stop_id = None
        if packed:
            self.emitted += packed
            self._observe(len(packed) // 4, output, run)
            token_ids = unpack_ids(packed)
            if run.wanted.logprobs is not None:
                self.delta.logprobs.extend(output.logprobs)
            self.delta.token_ids.extend(token_ids)
            if finish == worker_pb2.FINISH_STOP:
                stop_id = token_ids[-1]
            if self._eager:
                self._advance(run, token_ids, 0 if stop_id is None or run.wanted.include_stop else 1)
        if finish and self.finish_reason is None:
            if stop_id is not None and stop_id not in run.wanted.end_token_ids:
                self.stop_reason = stop_id
            self._finish(run, "stop" if finish == worker_pb2.FINISH_STOP else "length")
        run.stepped(self)

    def _observe(self, tokens: int, output: worker_pb2.SequenceOutput, run: Run) -> None:
        now, metrics = time.monotonic(), run.metrics
        metrics.output_tokens += tokens
        if self.output_tokens:
            metrics.inter_token_s.observe((now - self._last_s) / tokens, tokens)
        else:
            self.cached_tokens = output.cached_tokens
            metrics.queue_s.observe(output.waited_us / 1e6)
            run.admitted(self, now, output.waited_us)
        self._last_s = now
        self.output_tokens += tokens

    def _advance(self, run: Run, token_ids: Sequence[int], silent: int) -> None:
        """Text of these tokens, but for the last `silent` ones: the token that stopped a sequence is no part of it.

        A stop string is looked for token by token, so that how steps were merged cannot matter.
        """
        spoken = token_ids[: len(token_ids) - silent] if silent else token_ids
        if self._stops is None and not self.text.may_end:
            text = self._detokenizer.push(spoken)
            if text:
                self.text.feed(text, self.delta)
            return
        for position, token_id in enumerate(spoken):
            text = self._detokenizer.push((token_id,))
            if text and self._feed(text):
                self._drop_tokens(len(token_ids) - 1 - position)
                self._end_early(run)
                return

    def _feed(self, text: str) -> bool:
        """Stop strings, then the parsers. True: the sequence ends here."""
        found = None
        if self._stops is not None:
            text, found = self._stops.push(text)
        if text:
            self.text.feed(text, self.delta)
        if found is not None:
            self.stop_reason = found
        return found is not None or self.text.ended

    def _drop_tokens(self, count: int) -> None:
        """Tokens behind the end are none of the answer: no ids, no log-probabilities, no usage."""
        if count:
            del self.delta.token_ids[-count:]
            del self.delta.logprobs[-count:]
            self.output_tokens -= count

    def _end_early(self, run: Run) -> None:
        run.abort(self, "stop")
        self.text.finish(self.delta)
        self.finish_reason = self.text.finish_reason("stop")

    def _finish(self, run: Run, reason: str) -> None:
        """The worker ended it: everything held back may leave."""
        if not self._eager:
            ids = self.delta.token_ids
            stopped = reason == "stop" and not run.wanted.include_stop
            self.text.feed(self._detokenizer.push(ids[:-1] if stopped else ids), self.delta)
        rest = self._detokenizer.finish()
        ended = bool(rest) and self._feed(rest)
        held = self._stops.finish() if self._stops is not None and not ended else ""
        if held:
            self.text.feed(held, self.delta)
        if isinstance(self.stop_reason, str):
            reason = "stop"
        self.text.finish(self.delta)
        self.finish_reason = self.text.finish_reason(reason)


def _failure(output: worker_pb2.SequenceOutput, run: Run, choice: Choice) -> TokenRelayError:
    """Why a worker refused or failed a sequence, as the client should hear it."""
    reason, text = output.reject_reason, output.error
    if output.finish == worker_pb2.FINISH_REJECTED:
        prompt = run.prompts[choice.prompt_index]
        if reason == worker_pb2.REJECT_QUEUE_FULL:
            return Overloaded(text.partition(": ")[2] or text or "the queue is full; try again", retry_after_s=1.0)
        if reason == worker_pb2.REJECT_PROMPT_TOO_LONG:
            return context_exceeded(str(prompt.tokens), run.model.context_tokens, prompt.param)
        if reason == worker_pb2.REJECT_INVALID:
            return InvalidRequest(decode_error(text).message or "the worker refused the request")
        return Unavailable(decode_error(text).message or "the worker takes no requests now")
    if output.finish == worker_pb2.FINISH_ABORT:
        return Unavailable("the worker aborted the request")
    return Unavailable(decode_error(text).message or "the worker failed")


class Run:
    """All sequences of one HTTP request."""

    def __init__(
        self,
        pool: WorkerPool,
        metrics: Metrics,
        wanted: Wanted,
        model: ServedModel,
        request_id: str,
        prompts: Sequence[Prompt],
        make_text: Callable[[], TextSink],
        arrived_s: float,
        tenant: bytes = b"",
    ) -> None:
        loop = asyncio.get_running_loop()
        self._arrived_s = arrived_s
        self._ends_s = math.inf
        self._open = 0  # choices that have not ended
        self._ended = False
        self._deadline: asyncio.TimerHandle | None = None
        self.metrics = metrics
        self.wanted = wanted
        self.model = model
        self.request_id = request_id
        self.tenant = tenant
        self.prompts = prompts
        self.error: TokenRelayError | None = None
        self.first: asyncio.Future[None] = loop.create_future()
        self.done: asyncio.Future[None] = loop.create_future()
        self.on_step: OnStep | None = None
        self.traceparent = ""  # of its span, for the workers' spans; empty: it is not traced
        prompt_tokens = sum(prompt.tokens for prompt in prompts)
        self.trail = pool.trails.begin(
            request_id, prompt_tokens=prompt_tokens, choices=len(prompts) * wanted.n, arrived_s=arrived_s
        )
        self._places: Relocation[Choice] = Relocation(pool, metrics)
        self._turns = pool.turns
        self._inherited: list[Inherited | None] = [None] * len(prompts)
        self._cached: list[dict[str, int] | None] = [None] * len(prompts)  # asked once
        self.choices = [
            Choice(self, prompt_index * wanted.n + choice, prompt_index, make_text())
            for prompt_index in range(len(prompts))
            for choice in range(wanted.n)
        ]

    def start(self, timeout_s: float) -> None:
        """Submit everything to one worker, so that the choices share their prompt's KV. Raises what refuses it."""
        pool = self._places.pool
        self._deadline = asyncio.get_running_loop().call_later(timeout_s, self._expire, timeout_s)
        self._ends_s = time.monotonic() + timeout_s
        self._inherited = [self._turns.find(prompt.packed, self.wanted.salt) for prompt in self.prompts]
        pool.retries.earn()
        if len(workers := pool.decoders) > 1:
            self._places.wish = self._wish(pool, workers)
        for choice in self.choices:
            self._places.begin(self, choice)
            self._open += 1

    def _wish(self, pool: WorkerPool, workers: list[WorkerClient]) -> Wish[WorkerClient]:
        """What a policy may know of this request."""
        wanted, packed = self.wanted, self.prompts[0].packed
        session = self._places.session = session_key(wanted.session, wanted.salt) if wanted.session else b""
        if pool.config.policy == "consistent-hash":
            return Wish(key=session or session_key(packed[:HASH_BYTES], wanted.salt))
        if pool.config.policy != "cache-aware":
            return NO_WISH
        found = next((one for one in self._inherited if one is not None), None)
        if found is not None and found.turn.at(found.turn.client):
            return Wish(found.turn.client, f"computed its first {found.tokens} tokens in a turn before")
        if session and (client := pool.preferred(session)) is not None:
            return Wish(client, "had its session's last request")
        client = pool.prefixes.nearest(packed, wanted.salt, workers)  # some worker may have its beginning
        return Wish(client, NEAREST) if client is not None else NO_WISH

    def submission(self, choice: Choice, client: WorkerClient) -> worker_pb2.Submit:
        """What this worker must know to go on with a choice from where it stands."""
        wanted, prompt = self.wanted, self.prompts[choice.prompt_index]
        room = self.model.tokens_left(prompt.tokens, prompt.param)
        left_ms = 1000 * (self._ends_s - time.monotonic())
        submit = worker_pb2.Submit(
            request_id=self.request_id,
            token_ids=prompt.packed + choice.emitted if choice.emitted else prompt.packed,
            output_start=prompt.tokens,
            tokens_max=room if wanted.tokens_max is None else min(room, wanted.tokens_max),
            sampling=wanted.sampling,
            choice=choice.index % wanted.n,
            seed=wanted.seed,
            priority=wanted.priority,
            salt=wanted.salt,
            tenant=self.tenant,
            tools=wanted.tools,
            expected_tokens=wanted.expected_tokens,
            tps_floor=wanted.tps_floor,
            deadline_left_ms=max(1, min(int(left_ms), 0xFFFFFFFF)),
        )
        if self.traceparent:
            submit.traceparent = self.traceparent
        inherited = self._inherited[choice.prompt_index]
        if inherited is not None and not choice.whole and inherited.turn.at(client):
            submit.parent, submit.parent_tokens = inherited.turn.sequence, inherited.tokens
            submit.token_ids = submit.token_ids[4 * inherited.tokens :]
            self.metrics.turns["sent"] += 1
        return submit

    def nearest(self, choice: Choice) -> WorkerClient | None:
        """Among those that decode."""
        prompt, pool = self.prompts[choice.prompt_index], self._places.pool
        return pool.prefixes.nearest(prompt.packed + choice.emitted, self.wanted.salt, pool.decoders)

    def outlook(self, choice: Choice) -> tuple[int, Mapping[str, int]]:
        """For the decision where it is computed."""
        prompt, inherited = self.prompts[choice.prompt_index], self._inherited[choice.prompt_index]
        cached = self._cached[choice.prompt_index]
        if cached is None:
            cached = self._cached[choice.prompt_index] = self._places.pool.prefixes.cached_tokens(
                prompt.packed, self.wanted.salt
            )
            if inherited is not None and inherited.turn.at(client := inherited.turn.client):
                cached[client.target] = max(cached.get(client.target, 0), inherited.tokens)
        return prompt.tokens + len(choice.emitted) // 4, cached

    @property
    def route(self) -> str:
        """Which worker it went to, and why, for people."""
        return f"{self._places.pick}{'; ' if self.placement else ''}{self.placement}"

    @property
    def placement(self) -> str:
        """Why its prompt is computed where it is, for people; empty where there was no choice."""
        decision = self._places.decision
        return decision.text if decision is not None else ""

    def taken_up(self, choice: Choice, output: worker_pb2.SequenceOutput) -> bool:
        """Whether another worker goes on where one ended a sequence without being asked."""
        return self._places.move(self, choice, output)

    def _expire(self, timeout_s: float) -> None:
        self.fail(DeadlineExceeded(f"the request was not done in {timeout_s:g} s"), "deadline")

    def admitted(self, choice: Choice, now_s: float, waited_us: int = 0) -> None:
        """A choice has its first token."""
        if choice.index % self.wanted.n == 0:
            self.metrics.prompt_tokens += self.prompts[choice.prompt_index].tokens
            self.metrics.cached_tokens += choice.cached_tokens
        self.trail.first_token(choice.cached_tokens, choice.index, waited_us)
        if not self.first.done():
            self.metrics.ttft_s.observe(now_s - self._arrived_s)
            self.first.set_result(None)

    def stepped(self, choice: Choice) -> None:
        """A choice got something new, or ended. What the last end leaves is for who waits for `done`."""
        if choice.finish_reason is not None:
            if choice.handle is not None:
                self._places.pool.breakers.succeeded(choice.handle.client.target)
            self._remember(choice)
            self._open -= 1
            if self._open == 0:
                self._settle()
                return
        if self.on_step is not None:
            self.on_step(choice)

    def _remember(self, choice: Choice) -> None:
        """A next turn may begin with what this choice was."""
        handle, prompt = choice.handle, self.prompts[choice.prompt_index]
        if handle is None or handle.client.handshake is None or not handle.client.handshake.next_turns:
            return
        inherited = self._inherited[choice.prompt_index]
        text, salt = prompt.packed + choice.emitted, self.wanted.salt
        turn = Turn(handle.client, handle.client.connections, handle.sequence, text, len(prompt.packed), salt)
        self._turns.remember(turn, inherited.turn if inherited is not None else None)

    def count_ceiling(self, ceiling: Ceiling) -> None:
        """What an infinite cache would have had of its prompts, and has of its choices from now on."""
        for choice in self.choices:
            handle, prompt = choice.handle, self.prompts[choice.prompt_index]
            if choice.index % self.wanted.n == 0 and handle is not None and handle.client.handshake is not None:
                text, block_tokens = prompt.packed + choice.emitted, handle.client.handshake.block_tokens
                ceiling.ended(prompt.tokens, text, self.wanted.salt, block_tokens)

    def fail(self, error: TokenRelayError, reason: str) -> None:
        """End everything with this error; the first one counts."""
        if not self._ended:
            self.error = error
            self._abort_open(reason)
            self._settle()

    def abort(self, choice: Choice, reason: str) -> None:
        """The worker need not go on with a choice."""
        if choice.handle is not None:
            self.metrics.aborts[reason] += 1
            choice.handle.abort()

    def close(self, reason: str) -> None:
        """The client is served, or gone: abort what is open. Idempotent."""
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self.on_step = None
        self.fail(Unavailable("the request was given up"), reason)
        for choice in self.choices:
            choice.release()

    def _abort_open(self, reason: str) -> None:
        for choice in self.choices:
            if choice.finish_reason is None:
                self.abort(choice, reason)

    def _settle(self) -> None:
        self._places.close()
        outcome = self.error.code if self.error is not None else self.choices[0].finish_reason
        self.trail.end(str(outcome or "given_up"), sum(choice.output_tokens for choice in self.choices))
        self._ended = True  # the futures cannot say so: a handler that is cancelled cancels the one it waits for
        for future in (self.first, self.done):
            if not future.done():
                future.set_result(None)

    # -- usage --------------------------------------------------------------------------------------------------------
    @property
    def tokens(self) -> tuple[int, int, int]:
        """Of its prompts, of those in a cache, and of the output until now."""
        return (
            sum(prompt.tokens for prompt in self.prompts),
            sum(choice.cached_tokens for choice in self.choices if choice.index % self.wanted.n == 0),
            sum(choice.output_tokens for choice in self.choices),
        )

    def usage(self) -> dict[str, object]:
        """`usage`: a prompt counts once however many choices it has; cached tokens are those of its first choice."""
        prompt_tokens, cached_tokens, output_tokens = self.tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        }
