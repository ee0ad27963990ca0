"""Requests to a mesh whose services, all but the router, are killed at random.

A reply is the whole right text, or a clean error: nothing hangs, nothing is wrong. Random things come from the seed.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil
from load import Outcome, send
from serving import Server

PATH = "/v1/chat/completions"


@dataclass
class Tally:
    """What came of it."""

    texts: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)


class Chaos:
    """Clients and a killer."""

    def __init__(self, server: Server, seed: int, kinds: dict[str, str]) -> None:
        """`kinds`: a word of a victim's command line -> what it is."""
        self.server = server
        self.tally = Tally()
        self._kinds = kinds
        self._chosen = random.Random(seed)
        self._wanted: dict[int, str] = {}
        self._done = 0

    def body(self, number: int) -> dict[str, Any]:
        """Greedy where it is even, sampled with a seed where it is odd; some stream, some do not."""
        sampling = {"temperature": 0} if number % 2 == 0 else {"temperature": 1.0, "seed": number}
        message = {"role": "user", "content": f"number {number % 7} " * (4 + 9 * (number % 5)) + str(number)}
        more = {"max_tokens": 20 + 11 * (number % 9), "ignore_eos": True, "stream": number % 3 > 0}
        return {"model": self.server.model, "messages": [message], **sampling, **more}

    async def run(self, requests: int, kills: int, clients: int = 6) -> None:
        """So many requests at least, and so many kills."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            for number in range(requests):
                outcome = await send(session, self.server.url, PATH, self.body(number))
                assert outcome.kind == "completed", outcome
                self._wanted[number] = outcome.text
            killer = asyncio.create_task(self._kill(kills))
            await asyncio.gather(*(self._client(session, requests, killer) for _ in range(clients)))
            await killer

    async def _client(self, session: aiohttp.ClientSession, requests: int, killer: asyncio.Task[None]) -> None:
        while self._done < requests or not killer.done():
            number, self._done = self._done % requests, self._done + 1
            self._judge(number, await send(session, self.server.url, PATH, self.body(number)))
            await asyncio.sleep(0.05)

    def _judge(self, number: int, outcome: Outcome) -> None:
        if outcome.problems or outcome.kind == "broken":
            self.tally.wrong.append(f"request {number}: {outcome}")
        elif outcome.kind == "completed":
            if outcome.text == self._wanted[number]:
                self.tally.texts += 1
            else:
                self.tally.wrong.append(f"request {number}: {outcome.text!r} instead of {self._wanted[number]!r}")
        else:
            self.tally.errors[f"{outcome.status} {outcome.error[:60]}"] += 1

    def victims(self) -> list[tuple[str, int]]:
        """(kind, pid) of the present lives."""
        found = []
        for child in psutil.Process(self.server.own.process.pid).children():
            try:
                words = " ".join(child.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            found += [(kind, child.pid) for word, kind in self._kinds.items() if word in words]
        return found

    async def _kill(self, kills: int) -> None:
        for _ in range(kills):
            await asyncio.sleep(0.5 + 2.5 * self._chosen.random())
            while not (victims := self.victims()):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
            kind, pid = self._chosen.choice(victims)
            self.tally.kills[kind] += 1
            os.kill(pid, signal.SIGKILL)
