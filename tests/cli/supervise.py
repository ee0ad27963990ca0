"""Runs a Supervisor over two fake children in a process of its own; prints what its observer hears, JSON lists.

supervise.py FOLDER LIMITS_JSON WORKER_BEHAVIOURS_JSON ROUTER_BEHAVIOURS_JSON

A limit `joined` is `fail` or `hang`: what becomes of the children's finding each other.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenrelay.cli.config import SupervisorConfig
from tokenrelay.cli.process import STATUS_FD, ChildFailed, ChildSpec
from tokenrelay.cli.supervisor import Observer, Supervisor


class Printer(Observer):
    """An observer that prints each call."""

    def progress(self, child: str, what: str, done: int, total: int) -> None:
        self._say("progress", child, what, done, total)

    def started(self, child: str, facts: Mapping[str, Any]) -> None:
        self._say("started", child, facts["life"])

    def serving(self, facts: Mapping[str, Mapping[str, Any]]) -> None:
        self._say("serving", *facts)

    def died(self, child: str, reason: str, retry_s: float) -> None:
        self._say("died", child, reason, retry_s)

    def failed(self, message: str) -> None:
        self._say("failed", message)

    def replacing(self, child: str) -> None:
        self._say("replacing", child)

    def draining(self) -> None:
        self._say("draining")

    def stopped(self, drained: bool) -> None:
        self._say("stopped", drained)

    def _say(self, *words: Any) -> None:
        print(json.dumps(words), flush=True)


async def main() -> int:
    folder, limits, worker, router = sys.argv[1:]
    child = str(Path(__file__).with_name("fake_child.py"))

    def spec(name: str, behaviours: str) -> ChildSpec:
        command = [sys.executable, child, STATUS_FD, folder, name, *json.loads(behaviours)]
        return ChildSpec(name, command, overlaps=name == "router")

    bounds = json.loads(limits)
    fate = bounds.pop("joined", "")

    async def joined() -> None:
        if fate == "fail":
            raise ChildFailed("they do not fit")
        await asyncio.sleep(60 if fate == "hang" else 0)

    stages = [[spec("worker", worker)], [spec("router", router)]]
    return await Supervisor(stages, SupervisorConfig(**bounds), Printer(), joined=joined).run()


sys.exit(asyncio.run(main()))
