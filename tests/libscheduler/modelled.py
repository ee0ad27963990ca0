"""A device that takes exactly as long as a linear cost says, on a clock of its own, and users whose tokens it times.

served = Served(config, Device(), steps_in_flight=2)
served.arrive(0, prompt=200, output=50)
served.run()
served.gaps(sequence_id)      # when its tokens came
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenrelay.libscheduler import Config, Plan, Scheduler


@dataclass(frozen=True)
class Device:
    """Microseconds per step, prefill row, prefill token, (query, key) pair, decode row and token of its context."""

    step: float = 2000.0
    prefill_row: float = 100.0
    prefill_token: float = 30.0
    prefill_pair: float = 0.005
    decode_row: float = 150.0
    decode_context_token: float = 0.05

    def run_us(self, plan: Plan) -> int:
        """How long a plan takes."""
        decodes = plan.decodes
        starts, lengths = plan.starts.astype(float), plan.lengths.astype(float)
        pairs = (lengths * (starts + (lengths + 1) / 2))[decodes:].sum()
        return int(
            self.step
            + self.prefill_row * (len(lengths) - decodes)
            + self.prefill_token * lengths[decodes:].sum()
            + self.prefill_pair * pairs
            + self.decode_row * decodes
            + self.decode_context_token * (starts + lengths)[:decodes].sum()
        )


@dataclass
class User:
    """One sequence: what was asked, and when its tokens came."""

    prompt: int
    output: int
    arrived_us: int
    priority: int = 0
    tenant: bytes = b""
    tps_floor: int = 0
    expected: int = 0
    admitted_us: int | None = None
    token_us: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether its last token came."""
        return len(self.token_us) == self.output

    def slowest_period_us(self, tokens: int) -> float:
        """The longest time per token over any `tokens` tokens in a row; 0 when it has no so many."""
        times = np.array(self.token_us)
        return float(((times[tokens:] - times[:-tokens]) / tokens).max()) if len(times) > tokens else 0.0


class Served:
    """A scheduler, the device and its users, on a virtual clock."""

    def __init__(self, config: Config, device: Device) -> None:
        self.scheduler = Scheduler(config)
        self.config = config
        self.device = device
        self.now_us = 0
        self.users: dict[int, User] = {}
        self.arrivals: list[tuple[int, int]] = []
        self.flights: deque[tuple[Plan, int]] = deque()  # with the instant each ends
        self.steps = 0

    def arrive(self, at_us: int, *, prompt: int, output: int, **asked: Any) -> int:
        """A user comes at an instant; its id. `asked`: more fields of User."""
        sequence_id = len(self.users) + 1
        self.users[sequence_id] = User(prompt, output, at_us, **asked)
        heapq.heappush(self.arrivals, (at_us, sequence_id))
        return sequence_id

    def run(self, until_us: int | None = None) -> None:
        """Until everybody has all tokens, or until an instant."""
        while until_us is None or self.now_us < until_us:
            while self.arrivals and self.arrivals[0][0] <= self.now_us:
                self._submit(heapq.heappop(self.arrivals)[1])
            while (plan := self.scheduler.plan(self.now_us)) is not None:
                self._launch(plan)
            if self.flights and (not self.arrivals or self.flights[0][1] <= self.arrivals[0][0]):
                self._commit()
            elif self.arrivals:
                self.now_us = self.arrivals[0][0]
            else:
                assert all(user.done for user in self.users.values()), "no progress"
                return

    def _submit(self, sequence_id: int) -> None:
        user = self.users[sequence_id]
        tokens = np.random.default_rng(sequence_id).integers(0, 1 << 20, user.prompt, dtype=np.uint32)
        answer = self.scheduler.submit(
            sequence_id,
            tokens,
            output_start=user.prompt,
            tokens_max=user.output,
            priority=user.priority,
            tenant=user.tenant,
            tps_floor=user.tps_floor,
            expected_tokens=user.expected,
            now_us=self.now_us,
        )
        assert answer is None, answer

    def _launch(self, plan: Plan) -> None:
        self.steps += 1
        begins_us = max(self.now_us, self.flights[-1][1] if self.flights else 0)
        self.flights.append((plan, begins_us + self.device.run_us(plan)))
        for sequence_id in plan.admitted_ids.tolist():
            self.users[sequence_id].admitted_us = self.now_us

    def _commit(self) -> None:
        plan, self.now_us = self.flights.popleft()
        tokens = np.zeros(plan.sampled, np.uint32)
        outcome = self.scheduler.commit(plan.step, tokens, self.now_us)
        for sequence_id in outcome.sequence_ids.tolist():
            self.users[sequence_id].token_us.append(self.now_us)
