"""The mesh at this moment, as the page and /mesh show it: workers, rates, requests, handovers.

    view = MeshView(state)
    snapshot = await view.take()         # a JSON-able dict; rates are those since the last one

Whose requests there are, and how long, is shown where /debug/requests is served: to the people of this machine, or when
the operator says so. Elsewhere `requests` and `handovers` are empty, and `detail` says why. Never a prompt, never an
answer. Event loop only; costs O(workers + requests in work), asked for by a person at most once a second.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from tokenrelay.base.errors import TokenRelayError
from tokenrelay.base.version import version
from tokenrelay.proto import worker_pb2
from tokenrelay.services.chassis.client import WorkerClient
from tokenrelay.services.router.debug import serves_debug
from tokenrelay.services.router.generation import Choice
from tokenrelay.services.router.state import RouterState
from tokenrelay.services.router.trails import TRAILS_MAX, Note, Samples, Trail

STATS_TIMEOUT_S = 1.0
REQUESTS_SHOWN = 40
HANDOVERS_SHOWN = 16
HISTORY_POINTS = 600  # ten minutes at one a second
RATE_MIN_S = 0.25  # a speed over less than that says nothing
NEWS_S = 60.0  # what is older is none, when nobody has looked for long
HIDDEN: Final = "requests are shown when only this machine can connect, or with --debug-endpoints on"

Json = dict[str, Any]


class MeshView:
    """Takes snapshots, and remembers what rates and charts need: the last counters, and a few minutes of points."""

    def __init__(self, state: RouterState) -> None:
        self._state = state
        self._detail = serves_debug(state.config)
        self._began_s = time.monotonic()
        self._taken_s = -math.inf
        self._counters: dict[str, int] = {}
        self._worker_counters: dict[str, tuple[str, worker_pb2.Stats]] = {}  # by target: incarnation, counters
        self._outputs: dict[int, tuple[Choice, int]] = {}  # of open choices: tokens at the last snapshot, by identity
        self.history: list[Json] = []

    async def take(self) -> Json:
        """The mesh now. Workers that do not answer in time are shown with their last counters."""
        pool = self._state.pool
        await asyncio.gather(*(_refresh(client) for client in pool.clients))
        now_s = time.monotonic()
        since_s = now_s - self._taken_s
        point = self._point(since_s)
        snapshot = {
            "version": version(),
            "uptime_s": round(now_s - self._began_s, 1),
            "model": None if pool.model is None else pool.model.names[0],
            "context_tokens": None if pool.model is None else pool.model.context_tokens,
            "draining": self._state.draining,
            "workers": [self._worker(client, since_s) for client in pool.clients],
            "point": point,
            "totals": self._totals(),
            "detail": "" if self._detail else HIDDEN,
            "requests": self._requests() if self._detail else [],
            "handovers": self._handovers() if self._detail else [],
        }
        self._taken_s = now_s
        self.history = [*self.history[1 - HISTORY_POINTS :], point]
        return snapshot

    # -- over time ----------------------------------------------------------------------------------------------------
    def _point(self, since_s: float) -> Json:
        """One instant of the charts. Rates and percentiles are of the time since the last one; null: nothing then."""
        state, trails = self._state, self._state.pool.trails
        first_tokens = _taken(trails.first_tokens)
        speeds = [*_taken(trails.speeds), *self._running_speeds(since_s)]
        floors = [client.stats.tps_floor.in_force for client in state.pool.clients if client.ready]
        return {
            "at_ms": round(time.time() * 1000),
            "output_per_s": self._rate("output", state.metrics.output_tokens, since_s),
            "prompt_per_s": self._rate("prompt", state.metrics.prompt_tokens, since_s),
            "open": state.metrics.requests_open,
            "waiting": sum(client.stats.sequences_waiting for client in state.pool.clients if client.ready),
            "ttft_p50_ms": _ms(percentile(first_tokens, 0.5)),
            "ttft_p95_ms": _ms(percentile(first_tokens, 0.95)),
            "tps_p50": _rounded(percentile(speeds, 0.5)),
            "tps_p5": _rounded(percentile(speeds, 0.05)),
            "users": len(speeds),
            "floor": _rounded(max(floors, default=0.0)) or None,
        }

    def _rate(self, name: str, count: int, since_s: float) -> float | None:
        before, self._counters[name] = self._counters.get(name), count
        return None if before is None or not RATE_MIN_S <= since_s <= NEWS_S else round((count - before) / since_s, 1)

    def _running_speeds(self, since_s: float) -> list[float]:
        """Tokens per second of each sequence that had tokens when somebody looked last, and has not ended."""
        before = self._outputs
        open_now = [choice for run in self._state.runs for choice in run.choices if choice.finish_reason is None]
        self._outputs = {id(choice): (choice, choice.output_tokens) for choice in open_now if choice.output_tokens}
        if not RATE_MIN_S <= since_s <= NEWS_S:
            return []
        return [
            (choice.output_tokens - before[key][1]) / since_s
            for key, (choice, _) in self._outputs.items()
            if key in before and before[key][0] is choice
        ]

    def _totals(self) -> Json:
        metrics = self._state.metrics
        return {
            "requests": sum(count for (endpoint, _), count in metrics.requests.items() if endpoint.startswith("/v1/")),
            "errors": sum(count for (_, status), count in metrics.requests.items() if status >= 500),
            "refused": sum(count for (_, status), count in metrics.requests.items() if status == 429),
            "prompt_tokens": metrics.prompt_tokens,
            "cached_tokens": metrics.cached_tokens,
            "output_tokens": metrics.output_tokens,
            "moves": sum(metrics.moves.values()),
            "handovers": dict(metrics.handovers),
        }

    # -- workers ------------------------------------------------------------------------------------------------------
    def _worker(self, client: WorkerClient, since_s: float) -> Json:
        pool, hello, stats = self._state.pool, client.handshake, client.stats
        usable, floor = client in pool.usable, stats.tps_floor
        return {
            "target": client.target,
            "state": "ready" if usable else ("refused" if client.ready else "away"),
            "reason": "" if usable else pool.problem(client),
            "role": "" if hello is None else hello.role,
            "incarnation": "" if hello is None else hello.incarnation,
            "device": "" if hello is None else hello.device,
            "dtype": "" if hello is None else hello.dtype,
            "block_tokens": 0 if hello is None else hello.block_tokens,
            "slots": 0 if hello is None else hello.slots,
            "open": client.open_count,
            "running": stats.sequences_running,
            "waiting": stats.sequences_waiting,
            "blocks": _blocks(stats),
            "host_blocks": {"used": stats.host_tier.blocks_used, "room": stats.host_tier.blocks},
            "cached_tokens": stats.cached_tokens,
            "prompt_tokens": stats.prompt_tokens,
            "preemptions": stats.preemptions,
            "floor": {
                "configured": _rounded(floor.configured),
                "in_force": _rounded(floor.in_force),
                "batch_1": _rounded(floor.batch_1),
                "users_below": floor.users_below,
                "late": floor.tokens_late,
                "due": floor.tokens,
            },
            **self._worker_rates(client, since_s),
        }

    def _worker_rates(self, client: WorkerClient, since_s: float) -> Json:
        """Since the last snapshot; null where there is none of this life of the worker."""
        life = "" if client.handshake is None else client.handshake.incarnation
        before, stats = self._worker_counters.get(client.target), worker_pb2.Stats()
        stats.CopyFrom(client.stats)
        self._worker_counters[client.target] = life, stats
        if before is None or before[0] != life or not RATE_MIN_S <= since_s <= NEWS_S or not client.ready:
            return {"output_per_s": None, "prompt_per_s": None, "busy": None}
        old = before[1]
        return {
            "output_per_s": round((stats.output_tokens - old.output_tokens) / since_s, 1),
            "prompt_per_s": round((stats.prompt_tokens - old.prompt_tokens) / since_s, 1),
            "busy": round(min(1.0, max(0.0, (stats.step_time_us - old.step_time_us) / 1e6 / since_s)), 3),
        }

    # -- requests -----------------------------------------------------------------------------------------------------
    def _requests(self) -> list[Json]:
        """Those in work first, then the last ones that ended."""
        running = {run.trail: sum(choice.output_tokens for choice in run.choices) for run in self._state.runs}
        recent = self._state.pool.trails.recent(TRAILS_MAX)
        open_ones = [trail for trail in recent if trail.ended_s is None][:REQUESTS_SHOWN]
        ended = [trail for trail in recent if trail.ended_s is not None]
        shown = [*open_ones, *ended[: REQUESTS_SHOWN - len(open_ones)]]
        return [trail_object(trail, running.get(trail, trail.output_tokens)) for trail in shown]

    def _handovers(self) -> list[Json]:
        """The last ones, newest first."""
        last = list(self._state.pool.trails.handovers)[-HANDOVERS_SHOWN:]
        return [handover_object(trail, choice) for trail, choice in reversed(last)]


def trail_object(trail: Trail, output_tokens: int) -> Json:
    """A request and its way so far; instants in milliseconds after its arrival."""
    return {
        "number": trail.number,
        "id": trail.request_id,
        "age_ms": round(1000 * (time.monotonic() - trail.arrived_s)),
        "prompt_tokens": trail.prompt_tokens,
        "cached_tokens": trail.cached_tokens,
        "output_tokens": output_tokens,
        "choices": trail.choices,
        "ttft_ms": _ms(trail.first_s),
        "ended_ms": _ms(trail.ended_s),
        "outcome": trail.outcome,
        "placement": trail.placement,
        "notes": [_note(note) for note in trail.notes],
    }


def _note(note: Note) -> Json:
    return {
        "at_ms": _ms(note.at_s),
        "kind": note.kind,
        "choice": note.choice,
        "worker": note.worker,
        "to": note.to,
        "detail": note.detail,
    }


def handover_object(trail: Trail, choice: int) -> Json:
    """A sequence's last handover, and how far it is: computing, pulling, decoding, done or failed."""
    notes = [note for note in trail.notes if note.choice == choice]
    begin = max(index for index, note in enumerate(notes) if note.kind == "prefill")
    first, stages = notes[begin], {note.kind: _ms(note.at_s) for note in notes[begin:]}
    if "handover_failed" in stages:
        stage = "failed"
    elif "handed_over" in stages:
        stage = "decoding" if trail.ended_s is None else "done"
    elif trail.ended_s is not None:
        stage = "done" if "first_token" in stages else "failed"
    else:
        stage = "pulling" if "offered" in stages else "computing"
    return {
        "id": trail.request_id,
        "number": trail.number,
        "choice": choice,
        "from": first.worker,
        "to": first.to,
        "tokens": trail.prompt_tokens,
        "stage": stage,
        "age_ms": round(1000 * (time.monotonic() - trail.arrived_s)),
        "began_ms": stages["prefill"],
        "offered_ms": stages.get("offered"),
        "first_ms": stages.get("first_token"),
        "handed_over_ms": stages.get("handed_over"),
    }


def _blocks(stats: worker_pb2.Stats) -> Json:
    """Blocks by state; they sum to the pool. `active`: those of a worker that does not tell their states."""
    states = ("cached", "sealed", "writable", "in_flight", "quarantined", "free")
    found = {state: getattr(stats, f"blocks_{state}") for state in states}
    untold = stats.blocks_active - sum(found[state] for state in ("sealed", "writable", "in_flight", "quarantined"))
    return {**found, "active": max(0, untold)}


async def _refresh(client: WorkerClient) -> None:
    """Fresh counters, if it gives any: what has not changed since its last step is as good."""
    try:
        await client.get_stats(STATS_TIMEOUT_S)
    except TokenRelayError:
        return


def _taken(samples: Samples) -> list[float]:
    """Those of the last while; all of them are gone afterwards."""
    since_s = time.monotonic() - NEWS_S
    found = [value for at_s, value in samples if at_s >= since_s]
    samples.clear()
    return found


def percentile(values: Iterable[float], share: float) -> float | None:
    """The value that `share` of them do not exceed (nearest rank); None of none."""
    ordered: Sequence[float] = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 1)
