"""Counters and histograms, and their Prometheus text (exposition format 0.0.4).

Plain numbers on one event loop: an observation is a bisection and two additions, with no locks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from tokenrelay.proto import worker_pb2
from tokenrelay.services.router.gate import Gate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

TTFT_BOUNDS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150)
INTER_TOKEN_BOUNDS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1, 5)
REQUEST_BOUNDS_S = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 150, 300, 900)


TOKEN_KINDS = ("prompt", "cached", "output")
PROPOSERS = ("ngram", "mtp")  # who may guess tokens ahead, as workers tell


class Histogram:
    """Counts of values by upper bound."""

    __slots__ = ("_bounds", "_counts", "count", "sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self.sum = 0.0
        self.count = 0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self.sum += value * times
        self.count += times

    def lines(self, name: str) -> list[str]:
        """Its samples: cumulative buckets, sum, count."""
        total, lines = 0, []
        for bound, count in zip(self._bounds, self._counts, strict=False):
            total += count
            lines.append(f'{name}_bucket{{le="{bound:g}"}} {total}')
        return [
            *lines,
            f'{name}_bucket{{le="+Inf"}} {self.count}',
            f"{name}_sum {self.sum!r}",
            f"{name}_count {self.count}",
        ]


class Metrics:
    """What one router counts."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (endpoint, status)
        self.aborts: Counter[str] = Counter()  # why sequences were aborted
        self.moves: Counter[str] = Counter()  # why sequences went on at another worker
        self.decisions: Counter[tuple[str, str]] = Counter()  # (where a prompt is computed, why); of Handovers
        self.handovers: Counter[str] = Counter()  # how they ended; of Handovers
        self.turns: Counter[str] = Counter()  # sequences that named a parent: "sent", and of those "unknown"
        self.integrity_failures: dict[str, int] = {}  # by worker; its own counters ended with it
        self.ceiling_tokens: int | None = None  # of Ceiling; None: nobody counts it
        self.breakers_opened = 0  # of Breakers
        self.retries_refused = 0  # of RetryBudget
        self.requests_open = 0
        self.streams_open = 0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.queue_s = Histogram(TTFT_BOUNDS_S)
        self.ttft_s = Histogram(TTFT_BOUNDS_S)
        self.inter_token_s = Histogram(INTER_TOKEN_BOUNDS_S)
        self.request_s = Histogram(REQUEST_BOUNDS_S)

    def render(
        self, workers: Mapping[str, tuple[bool, worker_pb2.Stats]], tokenizer_chars: tuple[int, int] = (0, 0)
    ) -> str:
        """The page. `workers`: target -> (ready, fresh counters); `tokenizer_chars`: from the cache, encoded."""
        page = _Page()
        requests = {f'endpoint="{endpoint}",status="{status}"': n for (endpoint, status), n in self.requests.items()}
        page.add("requests_total", "counter", "HTTP requests answered, by endpoint and status", requests)
        page.add("requests_open", "gauge", "generation requests in work", {"": self.requests_open})
        page.add("streams_open", "gauge", "of those, streams whose headers were sent", {"": self.streams_open})
        aborts = {f'reason="{reason}"': count for reason, count in self.aborts.items()}
        page.add("aborts_total", "counter", "sequences aborted by the router, by reason", aborts)
        moves = {f'cause="{cause}"': count for cause, count in self.moves.items()}
        page.add("moves_total", "counter", "sequences taken up at another worker, by cause", moves)
        decisions = {f'where="{where}",reason="{reason}"': count for (where, reason), count in self.decisions.items()}
        page.add("prefills_total", "counter", "sequences by where their prompt was computed, and why", decisions)
        ends = {f'end="{end}"': count for end, count in self.handovers.items()}
        page.add("handovers_total", "counter", "sequences with two legs, by how that ended", ends)
        turns = {f'parent="{kind}"': count for kind, count in self.turns.items()}
        page.add("turns_total", "counter", "sequences sent as (parent, appended tokens), and those refused", turns)
        page.add("prompt_tokens_total", "counter", "prompt tokens of admitted requests", {"": self.prompt_tokens})
        page.add("cached_tokens_total", "counter", "of those, found in a worker's cache", {"": self.cached_tokens})
        if self.ceiling_tokens is not None:
            help_text = "prompt tokens that an infinite cache would have had"
            page.add("prefix_ceiling_tokens_total", "counter", help_text, {"": self.ceiling_tokens})
        page.add("output_tokens_total", "counter", "tokens that reached this router", {"": self.output_tokens})
        chars = {'from="cache"': tokenizer_chars[0], 'from="tokenizer"': tokenizer_chars[1]}
        page.add("tokenizer_chars_total", "counter", "prompt characters, by where their tokens came from", chars)
        page.add("breakers_opened_total", "counter", "pauses of failing workers", {"": self.breakers_opened})
        page.add("retries_refused_total", "counter", "retries over their budget", {"": self.retries_refused})
        page.histogram("ttft_seconds", "from the request's arrival to its first token", self.ttft_s)
        page.histogram("queue_seconds", "from a sequence's submission to its place in a step", self.queue_s)
        page.histogram("inter_token_seconds", "between two tokens of a sequence", self.inter_token_s)
        page.histogram("request_seconds", "from a request's arrival to its end", self.request_s)
        self._add_workers(page, workers)
        return page.text()

    def _add_workers(self, page: _Page, workers: Mapping[str, tuple[bool, worker_pb2.Stats]]) -> None:
        ready = {f'worker="{_escape(target)}"': int(state[0]) for target, state in workers.items()}
        page.add("worker_ready", "gauge", "1: the worker takes requests", ready)
        stats = [state[1] for state in workers.values()]

        def total(name: str) -> int:
            return sum(getattr(one, name) for one in stats)

        blocks = {f'state="{state}"': total(f"blocks_{state}") for state in ("free", "cached", "active")}
        page.add("kv_blocks", "gauge", "KV blocks of the pool by state; they sum to the pool", blocks)
        sequences = {f'state="{state}"': total(f"sequences_{state}") for state in ("waiting", "running")}
        page.add("sequences", "gauge", "sequences at the workers", sequences)
        for name, help_text in (
            ("steps", "engine steps"),
            ("prompt_tokens", "prompt tokens that workers admitted"),
            ("cached_tokens", "of those, found in the prefix cache"),
            ("output_tokens", "tokens that workers made"),
            ("preemptions", "sequences preempted and recomputed"),
            ("aborts", "sequences aborted"),
            ("integrity_checks", "checks of schedulers' books while idle"),
        ):
            page.add(f"worker_{name}_total", "counter", help_text, {"": total(name)})
        seconds = total("step_time_us") / 1e6
        page.add("worker_step_seconds_total", "counter", "time spent in engine steps", {"": seconds})
        failures = {f'worker="{_escape(target)}"': count for target, count in self.integrity_failures.items()}
        help_text = "workers that ended because a check found the scheduler's books broken"
        page.add("worker_integrity_failures_total", "counter", help_text, failures)
        self._add_floor(page, {target: state[1].tps_floor for target, state in workers.items()})
        self._add_host_tier(page, [one.host_tier for one in stats])
        self._add_drafts(page, [one.drafts for one in stats])

    def _add_host_tier(self, page: _Page, tiers: Sequence[worker_pb2.HostTier]) -> None:
        """Of all workers together; a worker without one adds nothing."""
        used, room = sum(tier.blocks_used for tier in tiers), sum(tier.blocks for tier in tiers)
        page.add(
            "host_tier_blocks",
            "gauge",
            "KV blocks of the host tier by state",
            {'state="used"': used, 'state="free"': room - used},
        )
        late = sum(tier.copies_late for tier in tiers)
        page.add("host_tier_copies_late", "gauge", "copies to or from host memory past their deadline", {"": late})
        for name, help_text in (
            ("loads", "prompts whose prefix was loaded from host memory"),
            ("tokens_loaded", "prompt tokens that were loaded instead of computed"),
            ("copies_failed", "copies to or from host memory that failed"),
            ("copies_expired", "copies to or from host memory that did not end before their deadline"),
        ):
            page.add(f"host_tier_{name}_total", "counter", help_text, {"": sum(getattr(tier, name) for tier in tiers)})
        moved = {
            'direction="to_host"': sum(tier.blocks_stored * tier.block_bytes for tier in tiers),
            'direction="to_device"': sum(tier.blocks_loaded * tier.block_bytes for tier in tiers),
        }
        page.add("host_tier_bytes_total", "counter", "bytes of KV copied to and from host memory", moved)

    def _add_drafts(self, page: _Page, drafts: Sequence[worker_pb2.Drafts]) -> None:
        """Speculative decoding of all workers together, under the names that vLLM gives it."""
        tokens, accepted = sum(one.tokens for one in drafts), sum(one.accepted for one in drafts)
        for name, help_text, value in (
            ("drafts", "drafts that steps computed", sum(one.drafts for one in drafts)),
            ("draft_tokens", "tokens of those drafts", tokens),
            ("accepted_tokens", "of those tokens, that came true and were kept", accepted),
        ):
            page.add(f"spec_decode_num_{name}_total", "counter", help_text, {"": value})
        page.add(
            "spec_decode_draft_acceptance_rate",
            "gauge",
            "share of drafted tokens that came true",
            {"": accepted / tokens if tokens else 0.0},
        )
        self._add_proposers(page, drafts)

    def _add_proposers(self, page: _Page, drafts: Sequence[worker_pb2.Drafts]) -> None:
        """The same by who guessed: the answers' own texts, or a prediction layer."""
        by = {proposer: [one for one in drafts if (one.proposer or "ngram") == proposer] for proposer in PROPOSERS}
        tokens = {f'proposer="{name}"': sum(one.tokens for one in found) for name, found in by.items()}
        accepted = {f'proposer="{name}"': sum(one.accepted for one in found) for name, found in by.items()}
        rates = {name: accepted[name] / tokens[name] if tokens[name] else 0.0 for name in tokens}
        for name, kind, help_text, values in (
            ("draft_tokens_total", "counter", "drafted tokens, by who guessed them", tokens),
            ("accepted_tokens_total", "counter", "of those tokens, that came true and were kept", accepted),
            ("acceptance_rate", "gauge", "share of drafted tokens that came true, by who guessed them", rates),
        ):
            page.add(f"spec_decode_proposer_{name}", kind, help_text, values)

    def _add_floor(self, page: _Page, floors: Mapping[str, worker_pb2.TpsFloor]) -> None:
        for name, kind, help_text in (
            ("configured", "gauge", "tokens per second that each user shall keep, as asked for; 0: no floor"),
            ("in_force", "gauge", "the smaller of that and a fraction of batch 1; 0: not known yet"),
            ("batch_1", "gauge", "tokens per second that one user alone would get now; 0: not known yet"),
            ("users_below", "gauge", "users behind the floor in the last step"),
            ("tokens", "counter", "tokens that were due under the floor"),
            ("tokens_late", "counter", "of those, late by more than one token's time: the floor was not held"),
            ("overrides", "counter", "requests admitted for their age although the floor would have kept them back"),
        ):
            values = {f'worker="{_escape(target)}"': getattr(floor, name) for target, floor in floors.items()}
            page.add(f"tps_floor_{name}{'_total' if kind == 'counter' else ''}", kind, help_text, values)


def gate_page(gate: Gate) -> str:
    """What each key did, by its name: keys that were used, as many as the keys file has at most."""
    page = _Page()
    refused = {f'reason="{reason}"': count for reason, count in gate.refused.items()}
    page.add("gate_refused_total", "counter", "requests without a key that may do this, by reason", refused)
    callers = [(f'key="{one.record.name}"', one) for one in gate.callers.values() if one.counts or one.refused]
    requests = {label: one.counts["requests"] for label, one in callers}
    page.add("key_requests_total", "counter", "requests let in, by key", requests)
    page.add("key_requests_open", "gauge", "of those, in work", {label: one.open for label, one in callers})
    limited = {f'{label},limit="{limit}"': n for label, one in callers for limit, n in one.refused.items()}
    page.add("key_limited_total", "counter", "requests over a limit, by key and limit", limited)
    tokens = {f'{label},kind="{kind}"': one.counts[kind] for label, one in callers for kind in TOKEN_KINDS}
    page.add("key_tokens_total", "counter", "tokens of requests that ended, by key; cached ones are prompt", tokens)
    return page.text()


class _Page:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def _head(self, name: str, kind: str, help_text: str) -> None:
        self._lines += [f"# HELP tokenrelay_{name} {help_text}", f"# TYPE tokenrelay_{name} {kind}"]

    def add(self, name: str, kind: str, help_text: str, samples: Mapping[str, float]) -> None:
        self._head(name, kind, help_text)
        for labels, value in samples.items():
            braced = f"{{{labels}}}" if labels else ""
            self._lines.append(f"tokenrelay_{name}{braced} {value}")

    def histogram(self, name: str, help_text: str, histogram: Histogram) -> None:
        self._head(name, "histogram", help_text)
        self._lines += histogram.lines(f"tokenrelay_{name}")

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
