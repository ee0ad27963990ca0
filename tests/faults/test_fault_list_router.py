"""Case 12 of the fault list: what the router does with one leg when the other cannot begin, or is gone."""

from __future__ import annotations

from typing import Any

import pytest
from guards import fault
from scripted_legs import Scripted, Sequence

from tokenrelay.base.errors import Unavailable
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.channel import encode_error
from tokenrelay.services.router.config import RouterConfig
from tokenrelay.services.router.legs import Leg, TwoLegs
from tokenrelay.services.router.placement import Handovers, decide

REFUSALS = (worker_pb2.REJECT_QUEUE_FULL, worker_pb2.REJECT_DRAINING)


def the_offer_before_the_second_leg(patch: pytest.MonkeyPatch) -> None:
    """Both legs are dispatched at once."""
    init = TwoLegs.__init__

    def at_once(self: TwoLegs, source: Any, destination: Any, make_submit: Any, *given: Any) -> None:
        destination.submit(make_submit(destination), lambda output: None)
        init(self, source, destination, make_submit, *given)

    patch.setattr(TwoLegs, "__init__", at_once)


def the_end_of_the_other_leg(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leg, "abort", lambda self: None)


@fault(the_offer_before_the_second_leg, the_end_of_the_other_leg)
async def test_12_decode_is_not_dispatched_while_prefill_is_not_to_be_had() -> None:
    """No prefill worker, a ledger that refuses, a source that refuses: one worker does it. A source that is gone: both
    legs are over."""
    decode, prefill, handovers = Scripted("d"), Scripted("p", "prefill"), Handovers()
    assert decide(5000, {}, decode, [], handovers, RouterConfig()).source is None  # type: ignore[arg-type]
    handovers.pause("the ledger refused a handle")
    assert decide(5000, {}, decode, [prefill], handovers, RouterConfig()).source is None  # type: ignore[arg-type,list-item]
    prefill.refuses = Unavailable("its breaker is open")
    try:
        TwoLegs(prefill, decode, lambda one: worker_pb2.Submit(), lambda output: None, Handovers(), 10)  # type: ignore[arg-type]
    except Unavailable:
        assert decode.submits == []
    else:
        raise AssertionError("it began without its first leg")
    for reason in REFUSALS:
        refused = Sequence()
        refused.prefill.says(finish=worker_pb2.FINISH_REJECTED, reject_reason=reason, error="unavailable: not now")
        assert refused.decode.submits == [] and refused.ends == [worker_pb2.FINISH_REJECTED]
    gone = Sequence().offered()
    gone.prefill.says(finish=worker_pb2.FINISH_ERROR, error=encode_error(Unavailable("it is gone")))
    assert gone.decode.aborted == [1] and gone.ends == [worker_pb2.FINISH_ERROR]
