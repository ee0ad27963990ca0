"""What waits to be sent to one router: coalesced per sequence, bounded, never in the way of a step.

    outbox = Outbox(tokens_max=1 << 18)
    outbox.add(output)            # False: over the bound, the reader must be cut
    await outbox.wait()
    message = outbox.take(stats)  # everything that waited, as one StepOutput

While the stream does not take a message, further steps pile up here: two outputs of one sequence become one.
"""

from __future__ import annotations

import asyncio

from tokenrelay.proto import worker_pb2

_TOKEN_BYTES = 4
_MESSAGE_TOKENS = 8  # what an output costs beside its tokens: a flood of refusals is bounded too


class Outbox:
    """Outputs of one Session, oldest sequence first, `tokens_max` of them and their equals. Event loop only."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._tokens = 0  # ids and log-probabilities held, in tokens
        self._outputs: dict[int, worker_pb2.SequenceOutput] = {}
        self._waiting = asyncio.Event()
        self.coalesced = 0  # outputs that were merged into an earlier one, ever

    def __len__(self) -> int:
        return len(self._outputs)

    def add(self, output: worker_pb2.SequenceOutput) -> bool:
        """Take an output over (it belongs to the outbox now). False when that goes over the bound."""
        self._tokens += len(output.token_ids) // _TOKEN_BYTES
        if output.logprobs:
            self._tokens += sum(1 + len(entry.top_token_ids) for entry in output.logprobs)
        earlier = self._outputs.get(output.id)
        if earlier is None:
            self._outputs[output.id] = output
            self._tokens += _MESSAGE_TOKENS + len(output.error) // _TOKEN_BYTES
        else:
            token_ids = earlier.token_ids + output.token_ids
            earlier.MergeFrom(output)
            earlier.token_ids = token_ids
            self.coalesced += 1
        self._waiting.set()
        return self._tokens <= self._tokens_max

    def discard(self) -> None:
        """Forget everything: the reader is gone."""
        self._outputs.clear()
        self._tokens = 0

    def wake(self) -> None:
        """Let `wait` return although nothing may be there: the session is to end."""
        self._waiting.set()

    async def wait(self) -> None:
        """Until something waits to be sent, or `wake`."""
        await self._waiting.wait()
        self._waiting.clear()

    def take(self, stats: worker_pb2.Stats) -> worker_pb2.StepOutput:
        """Everything that waits, as one message; empty afterwards."""
        message = worker_pb2.StepOutput(step=stats.steps, outputs=self._outputs.values(), stats=stats)
        self._outputs.clear()
        self._tokens = 0
        return message
