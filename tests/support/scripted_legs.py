"""Two legs of a sequence on workers that say what a test has them say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.legs import TwoLegs
from tokenrelay.services.router.placement import Handovers
from tokenrelay.services.router.tokenize import pack_ids, unpack_ids


class Scripted:
    """What a WorkerClient is to its callers."""

    def __init__(self, target: str, role: str = "decode") -> None:
        self.target, self.ready, self.open_count = target, True, 0
        self.handshake = worker_pb2.HandshakeReply(role=role, block_tokens=64)
        self.stats = worker_pb2.Stats()
        self.submits: list[worker_pb2.Submit] = []
        self.aborted: list[int] = []
        self.withdrawn: list[int] = []
        self.refuses: TokenRelayError | None = None
        self._on_output: Callable[[worker_pb2.SequenceOutput], None] | None = None

    def submit(self, submit: worker_pb2.Submit, on_output: Callable[[worker_pb2.SequenceOutput], None]) -> int:
        if self.refuses is not None:
            raise self.refuses
        self.submits.append(submit)
        self._on_output = on_output
        return len(self.submits)

    def abort(self, sequence: int) -> None:
        self.aborted.append(sequence)

    def withdraw(self, sequence: int) -> None:
        self.withdrawn.append(sequence)

    def says(self, *token_ids: int, **fields: Any) -> None:
        assert self._on_output is not None
        self._on_output(worker_pb2.SequenceOutput(token_ids=pack_ids(token_ids), **fields))


class Sequence:
    """Two legs, and what came out of them."""

    def __init__(self) -> None:
        self.prefill, self.decode = Scripted("p", "prefill"), Scripted("d")
        self.handovers = Handovers()
        self.outputs: list[worker_pb2.SequenceOutput] = []
        self.ends_after: int | None = None  # the client has enough after so many tokens
        self.legs = TwoLegs(
            self.prefill,  # type: ignore[arg-type]
            self.decode,  # type: ignore[arg-type]
            lambda client: worker_pb2.Submit(request_id="r"),
            self.take,
            self.handovers,
            100,
        )

    def take(self, output: worker_pb2.SequenceOutput) -> None:
        self.outputs.append(output)
        if self.ends_after is not None and len(self.token_ids) >= self.ends_after:
            self.legs.abort()

    def offered(self) -> Sequence:
        self.prefill.says(offer=b"offer")
        return self

    @property
    def token_ids(self) -> list[int]:
        return [one for output in self.outputs for one in unpack_ids(output.token_ids)]

    @property
    def ends(self) -> list[int]:
        return [output.finish for output in self.outputs if output.finish]
