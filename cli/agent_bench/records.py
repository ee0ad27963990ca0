"""What was asked and what came of it: one record a request, and the settings of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

End = Literal["done", "failed", "refused", "cut"]  # cut: the run was over before it was


@dataclass(slots=True)
class Record:
    """One request. Instants in seconds of the run's clock; nan where it did not get that far."""

    session: str
    turn: int
    begin_s: float
    first_s: float = math.nan
    last_s: float = math.nan
    end_s: float = math.nan
    end: End = "cut"
    error: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None  # None: the endpoint does not say
    ideal_tokens: int = 0  # of the prompt, that an infinite cache would have had
    gaps_s: list[float] = field(default_factory=list)  # between chunks
    text: str = ""

    @property
    def tps(self) -> float:
        """Tokens per second of this user from the first token on; nan for less than two."""
        seconds = self.last_s - self.first_s
        return (self.output_tokens - 1) / seconds if self.output_tokens > 1 and seconds > 0 else math.nan


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for. Lengths in tokens, before `scale`."""

    trace: Path | None = None
    scale: float = 1.0
    loads: tuple[float, ...] = ()  # users at once, or factors on a trace's rate; empty: search
    load_max: float = 256.0
    seconds: float = 60.0  # of one load
    requests: int = 300  # of a trace, at most
    floor: float = 70.0
    ttft_max_s: float = math.inf  # 95th percentile, for a load to count as held
    devices: int = 1
    pause_s: float = 0.0  # between an answer and the next turn, on average
    turns: tuple[int, int] = (10, 15)
    system_tokens: int = 12_000  # the same for everybody
    first_tokens: int = 50_000  # of a session's first turn, the system prompt included
    turn_tokens: int = 800
    output_tokens: int = 500
    request_timeout_s: float = 600.0
    seed: int = 1

    def scaled(self, tokens: int) -> int:
        """A length in this run."""
        return max(1, round(tokens * self.scale))

    @property
    def closed(self) -> bool:
        """Users who wait for their answers, rather than a trace's clock."""
        return self.trace is None

    @property
    def unit(self) -> str:
        """What a load counts."""
        return "users at once" if self.closed else "x the trace's rate"
