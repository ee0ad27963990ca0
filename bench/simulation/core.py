"""The event loop of bench/replay.py: requests in, steps of the modelled device, and what users felt. Needs numpy.

A policy is a scheduler with an adapter; this file knows none. Scripts that have one call `serve`: they read a line of
JSON for each run (`workload`, `load`, `device`, `policy`) and answer with one line.
"""

from __future__ import annotations

import heapq
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, TextIO

import numpy as np
from device import DEVICES, Device
from workload import Request, Workload, make

BLOCK_TOKENS = 64
CONTEXT_TOKENS = 262_144
RATE_TOKENS_MIN = 16  # a request with fewer tokens says nothing about the rate


@dataclass(slots=True)
class Step:
    """What the device runs at once, and whatever the policy needs to take its result."""

    decode_rows: int
    decode_context: int  # tokens read by them together
    prefills: list[tuple[int, int]]  # (tokens before, tokens)
    payload: Any = None


@dataclass(slots=True)
class Emitted:
    """A token of one request."""

    number: int
    cached: int
    ended: bool


class Policy(Protocol):
    """A scheduler. One step runs at a time."""

    def submit(self, request: Request, now_s: float) -> None:
        """It is in the queue."""

    def plan(self, now_s: float) -> Step | None:
        """The next step; None when nothing can run."""

    def apply(self, step: Step, now_s: float, ran_s: float) -> Iterable[Emitted]:
        """The step has ended."""

    def facts(self) -> dict[str, float]:
        """Its own counters."""


@dataclass
class Outcome:
    """What a run came to."""

    requests: list[Request] = field(default_factory=list)  # that ended
    steps: int = 0
    busy_s: float = 0.0
    ended_s: float = 0.0
    unfinished: int = 0


def simulate(workload: Workload, policy: Policy, device: Device, limit_s: float) -> Outcome:
    """Until everything ended, or `limit_s` is over (a load that the policy cannot carry never ends)."""
    order = itertools.count()
    arrivals = [(request.arrives_s, next(order), request) for request in workload.begin()]
    heapq.heapify(arrivals)
    live: dict[int, Request] = {}
    outcome, now_s = Outcome(), 0.0
    while (arrivals or live) and now_s < limit_s:
        while arrivals and arrivals[0][0] <= now_s:
            request = heapq.heappop(arrivals)[2]
            live[request.number] = request
            policy.submit(request, now_s)
        step = policy.plan(now_s)
        if step is None:
            if not arrivals:
                break
            now_s = max(now_s + 1e-6, arrivals[0][0])
            continue
        ran_s = device.step_s(step.decode_rows, step.decode_context, step.prefills)
        now_s += ran_s
        outcome.steps += 1
        outcome.busy_s += ran_s
        for emitted in policy.apply(step, now_s, ran_s):
            request = live[emitted.number]
            if request.emitted == 0:
                request.first_s, request.cached = now_s, emitted.cached
            request.emitted += 1
            request.last_s = now_s
            if emitted.ended:
                outcome.requests.append(live.pop(emitted.number))
                following = workload.after(request)
                if following is not None:
                    heapq.heappush(arrivals, (following.arrives_s, next(order), following))
    outcome.ended_s, outcome.unfinished = now_s, len(live)
    return outcome


def report(outcome: Outcome, window_s: tuple[float, float]) -> dict[str, float]:
    """Per device: tokens a minute of the requests that ended in the window; what the slowest users felt."""
    begin_s, end_s = window_s
    done = [r for r in outcome.requests if begin_s <= r.last_s < end_s]
    arrived = [r for r in outcome.requests if begin_s <= r.arrives_s < end_s]
    minutes = (end_s - begin_s) / 60
    rates = np.array([r.rate for r in arrived if r.emitted >= RATE_TOKENS_MIN] or [math.nan])
    waits = np.array([r.first_s - r.arrives_s for r in arrived] or [math.nan])
    prompt = sum(len(r.prompt) for r in done)
    return {
        "requests": len(done),
        "unfinished": outcome.unfinished,
        "requests_per_s": len(done) / minutes / 60,
        "tpm": (prompt + sum(r.emitted for r in done)) / minutes,
        "output_tpm": sum(r.emitted for r in done) / minutes,
        "tps_p5": float(np.percentile(rates, 5)),
        "tps_p1": float(np.percentile(rates, 1)),
        "tps_p50": float(np.percentile(rates, 50)),
        "ttft_p50_s": float(np.percentile(waits, 50)),
        "ttft_p95_s": float(np.percentile(waits, 95)),
        "cached_share": sum(r.cached for r in done) / max(1, prompt),
        "busy_share": outcome.busy_s / max(1e-9, outcome.ended_s),
        "steps": outcome.steps,
    }


def run(spec: dict[str, Any], make_policy: Callable[[dict[str, Any], Device], Policy]) -> dict[str, Any]:
    """One simulation, as described."""
    device = DEVICES[spec["device"]]
    workload = make(spec["workload"], spec["load"])
    policy = make_policy(spec["policy"], device)
    # A load that cannot be carried is seen by then: the queue has grown for as long as requests came.
    outcome = simulate(workload, policy, device, limit_s=1.5 * workload.window_s[1] + 60)
    return {"load": spec["load"], **report(outcome, workload.window_s), **policy.facts()}


def serve(make_policy: Callable[[dict[str, Any], Device], Policy], commands: TextIO = sys.stdin) -> None:
    """Answer specs until the input ends. What the libraries print goes to stderr."""
    answers, sys.stdout = sys.stdout, sys.stderr
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in commands:
        print(json.dumps(run(json.loads(line), make_policy)), file=answers, flush=True)
