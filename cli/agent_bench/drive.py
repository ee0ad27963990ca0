"""Runs one load: users with sessions one after the other, or a trace at its pace, until the time is over.

    run = LoadRun(endpoint, settings, ruler, load=8, clock=…)
    await run.play(stop)                 # `stop`: an event that ends it early
    run.records

A run begins with a ramp, over which users come one by one; measurements count from its end. What is still open at the
end is cut: it counts neither as done nor as failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Coroutine
from typing import Any

from tokenrelay.cli.agent_bench.endpoint import Endpoint
from tokenrelay.cli.agent_bench.records import Record, Settings
from tokenrelay.cli.agent_bench.text import Ruler
from tokenrelay.cli.agent_bench.workload import Ideal, Session, TraceRow, trace_ideal, trace_messages

RAMP = 0.2  # of the time
OPEN_MAX = 2048  # requests of a trace at once; then its pace is not kept, and that is told
FAILURE_PAUSE_S = 0.5  # a user whose request failed does not hammer on


class LoadRun:
    """One load of one workload."""

    def __init__(
        self, endpoint: Endpoint, settings: Settings, ruler: Ruler, load: float, rows: list[TraceRow] | None = None
    ) -> None:
        self.load = load
        self.records: list[Record] = []
        self.open = 0
        self.held_back = 0  # requests of a trace that came late, because too many were open
        self.span_s = settings.seconds
        self._endpoint, self._settings, self._ruler = endpoint, settings, ruler
        self._rows = rows
        system = settings.scaled(settings.system_tokens)
        self._ideal = Ideal(system)
        self._began_s = 0.0
        if rows is not None:
            self.span_s = min(settings.seconds, max(rows[-1].at_s / load, 1.0))
        self._ramp_s = RAMP * self.span_s

    def clock(self) -> float:
        """Seconds since the run began."""
        return time.monotonic() - self._began_s

    @property
    def window_s(self) -> tuple[float, float]:
        """When measurements count."""
        return min(self._ramp_s, self.span_s / 2), self.span_s

    async def play(self, stop: asyncio.Event) -> None:
        """Until the time is over, or `stop`."""
        self._began_s = time.monotonic()
        work = self._users() if self._rows is None else [self._trace(self._rows)]
        tasks = [asyncio.create_task(one) for one in work]
        everything = asyncio.gather(*tasks)
        stopped = asyncio.create_task(stop.wait())
        waited: list[asyncio.Future[Any]] = [everything, stopped]
        try:
            await asyncio.wait(waited, timeout=self.span_s, return_when=asyncio.FIRST_COMPLETED)
            if everything.done() and not everything.cancelled():
                everything.result()
        finally:
            self.span_s = min(self.span_s, self.clock())
            for task in (*tasks, stopped):
                task.cancel()
            everything.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await everything
            await asyncio.gather(*tasks, stopped, return_exceptions=True)

    # -- closed -------------------------------------------------------------------------------------------------------
    def _users(self) -> list[Coroutine[Any, Any, None]]:
        count = round(self.load)
        return [self._user(user, self._ramp_s * user / count) for user in range(count)]

    async def _user(self, user: int, begins_s: float) -> None:
        source = random.Random(f"{self._settings.seed} user {user}")
        await asyncio.sleep(begins_s)
        number = 0
        while True:
            number += 1
            name = f"load {self.load:g} user {user} session {number} seed {self._settings.seed}"
            session = Session(name, self._settings, self._ruler, self._ideal)
            while await self._turn(session):
                if self._settings.pause_s > 0:
                    await asyncio.sleep(source.expovariate(1 / self._settings.pause_s))

    async def _turn(self, session: Session) -> bool:
        """One turn; False: the session is over, or failed."""
        record = Record(session.name, session.turn, self.clock(), ideal_tokens=session.asked())
        await self._ask(record, session.messages, session.output_tokens)
        if record.end != "done":
            await asyncio.sleep(FAILURE_PAUSE_S)
            return False
        return session.answered(record)

    # -- open ---------------------------------------------------------------------------------------------------------
    async def _trace(self, rows: list[TraceRow]) -> None:
        async with asyncio.TaskGroup() as group:
            for number, row in enumerate(rows):
                await asyncio.sleep(max(0.0, row.at_s / self.load - self.clock()))
                if self.open >= OPEN_MAX:
                    self.held_back += 1
                    while self.open >= OPEN_MAX:  # noqa: ASYNC110 - rare, and the measurement is spoilt already
                        await asyncio.sleep(0.01)
                messages = trace_messages(row, self._settings, self._ruler, f"load {self.load:g}")
                ideal = trace_ideal(row, self._settings, self._ideal)
                record = Record(f"request {number}", 0, self.clock(), ideal_tokens=ideal)
                tokens = self._settings.scaled(row.output_tokens)
                group.create_task(self._ask(record, messages, tokens))

    async def _ask(self, record: Record, messages: list[dict[str, str]], tokens: int) -> None:
        self.records.append(record)
        self.open += 1
        try:
            await self._endpoint.ask(record, messages, tokens, self.clock)
        finally:
            self.open -= 1
            record.ideal_tokens = min(record.ideal_tokens, max(0, record.prompt_tokens - 1))
