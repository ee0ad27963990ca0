"""libscheduler in the simulation of bench/replay.py, with the configuration that `policy` names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from core import BLOCK_TOKENS, CONTEXT_TOKENS, Emitted, Step, serve
from device import Device
from workload import OUTPUT_TOKEN, Request

from tokenrelay.libscheduler import Config, Finish, Scheduler


class Ours:
    """`settings` go to Config as they are; an `eviction` only where this build has a choice of it."""

    def __init__(self, settings: dict[str, Any], device: Device) -> None:
        if not hasattr(Config, "eviction"):
            settings = {name: value for name, value in settings.items() if name != "eviction"}
        self._scheduler = Scheduler(
            Config(
                block_tokens=BLOCK_TOKENS,
                blocks=device.kv_blocks(BLOCK_TOKENS),
                context_tokens=CONTEXT_TOKENS,
                waiting_max=65_536,
                hash_key=bytes(range(16)),
                model_identity=bytes(16),
                steps_in_flight=1,
                **{"slots": 256, **settings},
            )
        )

    def submit(self, request: Request, now_s: float) -> None:
        """Queue it."""
        refused = self._scheduler.submit(
            request.number,
            request.prompt,
            output_start=len(request.prompt),
            tokens_max=request.output,
            now_us=round(now_s * 1e6),
        )
        assert refused is None, refused

    def plan(self, now_s: float) -> Step | None:
        """The arrays, summed up."""
        plan = self._scheduler.plan(round(now_s * 1e6))
        if plan is None:
            return None
        decodes = plan.decodes
        prefills = list(zip(plan.starts[decodes:].tolist(), plan.lengths[decodes:].tolist(), strict=True))
        return Step(decodes, int(plan.starts[:decodes].sum()) + decodes, prefills, plan)

    def apply(self, step: Step, now_s: float, ran_s: float) -> Iterable[Emitted]:
        """Commit it, with the time that the device took."""
        sampled = np.full(step.payload.sampled, OUTPUT_TOKEN, np.uint32)
        outcome = self._scheduler.commit(step.payload.step, sampled, round(now_s * 1e6), round(ran_s * 1e6))
        for number, finish, cached in zip(
            outcome.sequence_ids.tolist(), outcome.finish.tolist(), outcome.cached_tokens.tolist(), strict=True
        ):
            yield Emitted(number, cached, finish != Finish.NONE)

    def facts(self) -> dict[str, float]:
        """Preemptions, and how the floor fared."""
        counts = self._scheduler.counts()
        floor = counts.floor
        return {
            "preemptions": counts.preemptions,
            "late_share": floor.tokens_late / max(1, floor.tokens),
            "overrides": floor.overrides,
        }


if __name__ == "__main__":
    serve(Ours)
