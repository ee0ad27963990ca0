"""A sequence with two legs, and whether it gets two: scripted workers, every order of their outputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from scripted_legs import Scripted, Sequence

from tokenrelay.base.errors import Overloaded, TokenRelayError, TransferFailed, Unavailable
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.placement import Handovers, decide

HANDOVER, STOP, LENGTH = worker_pb2.FINISH_HANDOVER, worker_pb2.FINISH_STOP, worker_pb2.FINISH_LENGTH
ERROR, ABORT, REJECTED = worker_pb2.FINISH_ERROR, worker_pb2.FINISH_ABORT, worker_pb2.FINISH_REJECTED


def test_the_destination_is_asked_when_the_offer_is_there() -> None:
    sequence = Sequence()
    assert sequence.prefill.submits[0].handover.role == worker_pb2.Handover.ROLE_SOURCE
    assert sequence.decode.submits == []
    assert sequence.handovers.queued["p"] == 100
    sequence.offered()
    assert sequence.decode.submits[0].handover.role == worker_pb2.Handover.ROLE_DESTINATION
    assert sequence.decode.submits[0].handover.offer == b"offer"
    sequence.prefill.says(7, finish=HANDOVER)
    assert sequence.handovers.queued["p"] == 0
    assert (sequence.token_ids, sequence.ends) == ([7], []), "the client need not wait for the destination"
    sequence.decode.says(8)
    sequence.decode.says(9, finish=STOP)
    assert (sequence.token_ids, sequence.ends) == ([7, 8, 9], [STOP])
    assert sequence.legs.client is sequence.decode, "its KV is there: the next turn goes there"
    assert sequence.handovers.ends == {"done": 1}
    assert sequence.prefill.aborted == sequence.decode.aborted == []


def test_an_offer_and_the_end_of_the_leg_in_one_message() -> None:
    """A worker's outbox merges what waits for a router that lags."""
    sequence = Sequence()
    sequence.prefill.says(7, offer=b"offer", finish=HANDOVER)
    assert len(sequence.decode.submits) == 1
    sequence.decode.says(8, finish=STOP)
    assert (sequence.token_ids, sequence.ends) == ([7, 8], [STOP])
    refused = Sequence()
    refused.decode.refuses = Overloaded("it does not read")
    refused.prefill.says(7, offer=b"offer", finish=HANDOVER)
    assert refused.ends == [ERROR], "one end"


@pytest.mark.parametrize("end", [STOP, LENGTH])
def test_what_overtakes_the_first_token_is_held_back(end: int) -> None:
    sequence = Sequence().offered()
    sequence.decode.says(8)
    sequence.decode.says(9, finish=end)
    assert sequence.outputs == []
    sequence.prefill.says(7, finish=HANDOVER)
    assert (sequence.token_ids, sequence.ends) == ([7, 8, 9], [end])


def test_the_first_token_completes_what_the_client_wanted() -> None:
    sequence = Sequence().offered()
    sequence.ends_after = 1
    sequence.decode.says(8)
    sequence.prefill.says(7, finish=HANDOVER)
    assert sequence.token_ids == [7], "held tokens behind the end are none of the answer"
    assert sequence.decode.aborted == [1]


@pytest.mark.parametrize("first", ["source", "destination"])
@pytest.mark.parametrize("end", [STOP, LENGTH])
def test_the_first_token_is_the_last(first: str, end: int) -> None:
    sequence = Sequence().offered()
    if first == "destination":  # its leg ends as aborted, which may be told before
        sequence.decode.says(finish=ABORT)
        assert sequence.outputs == []
    sequence.prefill.says(7, finish=end)
    assert (sequence.token_ids, sequence.ends) == ([7], [end])
    assert sequence.decode.aborted == ([] if first == "destination" else [1])
    assert sequence.legs.client is sequence.prefill


def test_the_clients_abort_ends_both() -> None:
    sequence = Sequence().offered()
    sequence.legs.abort()
    assert sequence.prefill.aborted == sequence.decode.aborted == [1]
    sequence.prefill.says(7, finish=HANDOVER)
    sequence.decode.says(8)
    sequence.legs.abort()
    assert sequence.outputs == []
    assert sequence.handovers.ends == {"aborted": 1}
    assert sequence.handovers.queued["p"] == 0


@pytest.mark.parametrize("how", ["client", "destination"])
def test_an_offer_that_nobody_will_take_is_withdrawn(how: str) -> None:
    sequence = Sequence().offered()
    sequence.prefill.says(7, finish=HANDOVER)
    assert sequence.prefill.withdrawn == []
    if how == "client":
        sequence.legs.abort()
    else:
        sequence.decode.says(finish=REJECTED, reject_reason=worker_pb2.REJECT_DRAINING)
    assert sequence.prefill.withdrawn == [1]
    assert sequence.prefill.aborted == []


def test_an_offer_that_was_taken_is_not_withdrawn() -> None:
    sequence = Sequence().offered()
    sequence.prefill.says(7, finish=HANDOVER)
    sequence.decode.says(8)
    sequence.legs.abort()
    assert sequence.prefill.withdrawn == []


def test_an_offer_after_the_abort_begins_nothing() -> None:
    sequence = Sequence()
    sequence.legs.abort()
    sequence.offered()
    assert sequence.decode.submits == []


@pytest.mark.parametrize("failing", ["prefill", "decode"])
def test_the_first_error_ends_both_at_once(failing: str) -> None:
    sequence = Sequence().offered()
    worker, other = sequence.prefill, sequence.decode
    if failing == "decode":
        worker, other = other, worker
    worker.ready = False
    output: dict[str, Any] = {"finish": ERROR, "error": encode_error(Unavailable("it is gone"))}
    worker.says(**output)
    assert sequence.ends == [ERROR]
    assert other.aborted == [1]
    assert sequence.legs.client is worker
    assert sequence.legs.cause(sequence.outputs[-1], "lost") == "lost"
    other.says(7, finish=HANDOVER if failing == "decode" else STOP)
    assert sequence.ends == [ERROR], "one end"


def test_a_destination_that_cannot_be_asked() -> None:
    sequence = Sequence()
    sequence.decode.refuses = Overloaded("it does not read")
    sequence.offered()
    assert sequence.ends == [ERROR]
    assert sequence.prefill.aborted == [1]


@pytest.mark.parametrize(
    ("failing", "fields", "otherwise", "cause"),
    [
        ("prefill", {"finish": REJECTED, "reject_reason": worker_pb2.REJECT_QUEUE_FULL}, "full", "handover"),
        ("prefill", {"finish": REJECTED, "reject_reason": worker_pb2.REJECT_DRAINING}, "drain", "drain"),
        ("prefill", {"finish": REJECTED, "reject_reason": worker_pb2.REJECT_INVALID}, None, None),
        ("prefill", {"finish": ERROR, "error": encode_error(Unavailable("declined"))}, "lost", "handover"),
        ("decode", {"finish": REJECTED, "reject_reason": worker_pb2.REJECT_QUEUE_FULL}, "full", "full"),
        ("decode", {"finish": REJECTED, "reject_reason": worker_pb2.REJECT_INVALID}, None, "handover"),
        ("decode", {"finish": ERROR, "error": encode_error(TransferFailed("x", reason="corrupt"))}, None, "handover"),
    ],
)
def test_why_it_may_go_on(failing: str, fields: dict[str, Any], otherwise: str | None, cause: str | None) -> None:
    sequence = Sequence().offered()
    getattr(sequence, failing).says(**fields)
    assert sequence.legs.cause(sequence.outputs[-1], otherwise) == cause


def test_a_ledger_that_refuses_is_left_alone_for_a_moment() -> None:
    sequence = Sequence()
    refusal = encode_error(Unavailable("no handle: no kvstore"))
    sequence.prefill.says(finish=REJECTED, reject_reason=worker_pb2.REJECT_QUEUE_FULL, error=refusal)
    assert sequence.legs.cause(sequence.outputs[-1], "full") == "handover"
    assert "no kvstore" in sequence.handovers.why_not


def test_a_decoding_sequence_fails_as_any_other() -> None:
    sequence = Sequence().offered()
    sequence.prefill.says(7, finish=HANDOVER)
    sequence.decode.says(8)
    sequence.decode.says(finish=ERROR, error=encode_error(TokenRelayError("a bug")))
    assert sequence.legs.cause(sequence.outputs[-1], None) is None


# -- the decision -----------------------------------------------------------------------------------------------------
def place(tokens: int, cached: dict[str, int] | None = None, **change: Any) -> Any:
    """A decision between two prefill workers and the decode worker d, which has one sequence open."""
    sources = [Scripted("p1", "prefill"), Scripted("p2", "prefill")]
    destination = change.pop("destination", None) or Scripted("d")
    destination.open_count = change.pop("open_count", 1)
    handovers = Handovers()
    handovers.queued.update(change.pop("queued", {}))
    handovers.suspended = change.pop("suspended", "")
    config = dataclasses.replace(RouterConfig(), **change)
    return decide(tokens, cached or {}, destination, sources, handovers, config)  # type: ignore[arg-type]


def test_long_prompts_go_to_the_prefill_worker_that_is_done_first() -> None:
    assert place(5000).source.target == "p1"
    assert place(5000, queued={"p1": 1}).source.target == "p2"
    assert place(5000, {"p1": 4096}, queued={"p1": 4000}).source.target == "p1", "it has most of it"
    assert place(5000, {"p1": 4096}, queued={"p1": 4000}).tokens == 904


def test_what_its_decode_worker_has_need_not_be_computed() -> None:
    decision = place(5000, {"d": 4992})
    assert (decision.source, decision.reason) == (None, "short")
    assert "8 of 5000 tokens" in decision.text
    assert place(200).source is None
    assert place(256).source is not None


def test_a_queue_at_the_prefill_workers() -> None:
    busy = {"p1": 10_000, "p2": 12_000}
    assert place(1000, queued=busy).reason == "busy"
    assert "p1, has 11000 tokens" in place(1000, queued=busy).text
    assert place(4000, queued=busy).reason == "pays"
    assert place(4000, queued=busy, open_count=0).reason == "busy", "nobody decodes there who could be disturbed"


def test_a_decode_worker_behind_its_floor_computes_no_prompts() -> None:
    behind = Scripted("d")
    behind.stats.tps_floor.users_below = 3
    assert place(1000, queued={"p1": 10_000, "p2": 12_000}, destination=behind).reason == "pays"
    assert place(100, destination=behind).reason == "pays"
    assert place(63, destination=behind).reason == "short", "less than a block cannot be handed over in a better way"


def test_what_forbids_it() -> None:
    assert place(5000, remote_prefill="never").reason == "never"
    assert place(5, remote_prefill="always").source is not None
    assert place(5000, destination=Scripted("p3", "prefill")).reason == "no_decode"
    assert place(5000, suspended="it is gone", remote_prefill="always").reason == "ledger"
