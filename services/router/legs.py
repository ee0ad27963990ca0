"""A sequence with two legs: a prefill worker computes its prompt and first token, a decode worker goes on.

To the choice whose handle this is it looks like one sequence at one worker: the first token, then the others, then one
end. The destination gets the request when the source's offer is there. Its outputs may overtake the source's first
token (two connections): they are held back. The first error of either leg ends both and is passed on as the sequence's
end; whether it goes on elsewhere is relocate.py's business. See docs/handover.md.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenrelay.base.errors import TokenRelayError, Unavailable
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import decode_error, encode_error
from tokenrelay.services.chassis.client import OnOutput, WorkerClient
from tokenrelay.services.router.placement import Handovers
from tokenrelay.services.router.trails import NO_TRAIL, ChoiceTrail

MakeSubmit = Callable[[WorkerClient], worker_pb2.Submit]


class Leg:
    """One of them, for as long as it is open."""

    __slots__ = ("client", "open", "sequence")

    def __init__(self, client: WorkerClient) -> None:
        self.client = client
        self.sequence = 0
        self.open = False

    def submit(self, submit: worker_pb2.Submit, on_output: OnOutput) -> None:
        """Send it. Raises Unavailable or Overloaded."""
        self.sequence = self.client.submit(submit, on_output)
        self.open = True

    def abort(self) -> None:
        """End it; nothing happens when it has ended."""
        if self.open:
            self.open = False
            self.client.abort(self.sequence)

    def withdraw(self) -> None:
        """It has ended, and what it offers is not wanted any more."""
        if self.sequence and not self.open:
            self.client.withdraw(self.sequence)


class TwoLegs:
    """Takes the place of a workers.Handle. Event loop only; gone when its last leg is."""

    def __init__(
        self,
        source: WorkerClient,
        destination: WorkerClient,
        make_submit: MakeSubmit,
        on_output: OnOutput,
        handovers: Handovers,
        tokens: int,
        trail: ChoiceTrail = ChoiceTrail(NO_TRAIL, 0),
    ) -> None:
        """Submits to the source. `tokens`: to be computed there. Raises Unavailable or Overloaded."""
        self._trail = trail
        self._source, self._destination = Leg(source), Leg(destination)
        self._make_submit: MakeSubmit | None = make_submit
        self._on_output: OnOutput | None = on_output
        self._handovers = handovers
        self._tokens = tokens
        self._held: list[worker_pb2.SequenceOutput] = []  # of the destination, which the first token must precede
        self._relayed = False  # the first token has been passed on
        self.decoding = False  # so have some of the destination's: its KV has been handed over
        self._leg = self._destination  # where the sequence counts as being: the one that failed, once one has
        submit = make_submit(source)
        submit.handover.role = worker_pb2.Handover.ROLE_SOURCE
        self._source.submit(submit, self._from_source)
        handovers.queued[source.target] += tokens
        trail.note("prefill", worker=source.target, to=destination.target, detail=f"{tokens} tokens")

    @property
    def client(self) -> WorkerClient:
        """The worker that goes on with it, that has ended it, or that failed."""
        return self._leg.client

    @property
    def sequence(self) -> int:
        """Its id there."""
        return self._leg.sequence

    def abort(self) -> None:
        """End both legs; nothing happens when they have ended."""
        if self._on_output is not None:
            self._end("aborted")

    # -- from the workers ---------------------------------------------------------------------------------------------
    def _from_source(self, output: worker_pb2.SequenceOutput) -> None:
        if output.finish:
            self._source.open = False
            self._computed()
        if output.offer and self._on_output is not None:  # its end may be in the same message: a reader that lags
            self._join(output.offer)
        if self._on_output is None:
            return
        if output.finish == worker_pb2.FINISH_HANDOVER:
            self._relay(output)
        elif output.finish >= worker_pb2.FINISH_ABORT:
            self._fail(self._source, output)
        elif output.finish:  # the first token was the last: nothing is handed over
            self._leg = self._source
            self._pass_last(output, "first_token")

    def _from_destination(self, output: worker_pb2.SequenceOutput) -> None:
        if output.finish:
            self._destination.open = False
        if self._on_output is None:
            return
        if self._relayed:
            self._decodes(output)
            self._pass(output)
        elif output.finish in (worker_pb2.FINISH_REJECTED, worker_pb2.FINISH_ERROR):
            self._fail(self._destination, output)
        else:  # an abort, too: the source may be about to say that its first token was the last
            self._held.append(output)

    def _join(self, offer: bytes) -> None:
        """The destination's leg begins."""
        assert self._make_submit is not None
        try:
            submit = self._make_submit(self._destination.client)
            submit.handover.role = worker_pb2.Handover.ROLE_DESTINATION
            submit.handover.offer = offer
            self._destination.submit(submit, self._from_destination)
            self._trail.note("offered", worker=self._source.client.target, to=self._destination.client.target)
        except TokenRelayError as error:
            failure = worker_pb2.SequenceOutput(finish=worker_pb2.FINISH_ERROR, error=encode_error(error))
            self._fail(self._destination, failure)

    def _relay(self, output: worker_pb2.SequenceOutput) -> None:
        """The first token, then what has overtaken it."""
        if not self._destination.sequence:
            text = "the source ended its leg without an offer"
            failure = worker_pb2.SequenceOutput(finish=worker_pb2.FINISH_ERROR, error=encode_error(Unavailable(text)))
            self._fail(self._source, failure)
            return
        self._relayed = True
        output.finish = worker_pb2.FINISH_NONE
        held, self._held = self._held, []
        for one in (output, *held):
            if self._on_output is not None:  # the first token may have completed a stop string
                self._pass(one)

    def _pass(self, output: worker_pb2.SequenceOutput) -> None:
        assert self._on_output is not None
        if output.finish >= worker_pb2.FINISH_ABORT:
            self._fail(self._destination, output)
        elif output.finish:
            self._pass_last(output, "done")
        else:
            self._on_output(output)

    def _pass_last(self, output: worker_pb2.SequenceOutput, end: str) -> None:
        on_output = self._end(end)
        on_output(output)

    def _decodes(self, output: worker_pb2.SequenceOutput) -> None:
        """The destination's first token says that the KV is there."""
        if output.token_ids and not self.decoding:
            self.decoding = True
            self._trail.note("handed_over", worker=self._source.client.target, to=self._destination.client.target)

    # -- ends ---------------------------------------------------------------------------------------------------------
    def _fail(self, leg: Leg, output: worker_pb2.SequenceOutput) -> None:
        self._leg = leg
        if not self.decoding:
            why = decode_error(output.error).message
            self._trail.note("handover_failed", worker=leg.client.target, detail=why)
        self._pass_last(output, "failed")

    def _end(self, end: str) -> OnOutput:
        """Both legs, at once. Sequence and legs refer to each other: afterwards they do not."""
        on_output = self._on_output
        assert on_output is not None, "it has ended"
        self._on_output = self._make_submit = None
        self._held.clear()
        self._handovers.ends[end] += 1
        if end in ("aborted", "failed") and not self.decoding:
            self._source.withdraw()
        self._source.abort()
        self._destination.abort()
        self._computed()
        return on_output

    def _computed(self) -> None:
        """The source is not busy with it any more."""
        self._handovers.queued[self._source.client.target] -= self._tokens
        self._tokens = 0

    def cause(self, output: worker_pb2.SequenceOutput, otherwise: str | None) -> str | None:
        """Why a failed leg may go on elsewhere: `otherwise` as for a sequence at one worker, "handover" where the
        worker lives and only the passing of its KV failed, None where every worker would refuse the request.
        """
        rejected = output.finish == worker_pb2.FINISH_REJECTED
        if self.decoding:
            return otherwise
        if self._leg is self._source:
            if rejected and output.reject_reason == worker_pb2.REJECT_QUEUE_FULL:
                if isinstance(decode_error(output.error), Unavailable):
                    self._handovers.pause(decode_error(output.error).message)
                return "handover"
            if rejected:
                return otherwise
        elif rejected and output.reject_reason != worker_pb2.REJECT_INVALID:
            return otherwise
        return "lost" if otherwise == "lost" and not self.client.ready else "handover"
