"""An engine on a tiny random model, requests run to their end, and the plain loop that says what must come out."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tokenrelay.base.deadlines import Deadline
from tokenrelay.kernels.batch import AttentionBatch
from tokenrelay.runtime.build import BuiltEngine, EngineSizes, build_engine
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, EngineStats, Finish, SamplingParams, TokenLogprobs

BLOCK_TOKENS = 16
WAIT_S = 60.0
VOCAB = 384


def prompt_of(seed: int, length: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, VOCAB) for _ in range(length)]


@dataclass
class Transcript:
    """All outputs of one sequence."""

    token_ids: list[int] = field(default_factory=list)
    terminals: list[EngineOutput] = field(default_factory=list)
    cached_tokens: int | None = None
    waited_us: int = 0
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @property
    def finish(self) -> Finish:
        assert len(self.terminals) == 1, f"{len(self.terminals)} terminal outputs"
        return self.terminals[0].finish


class Harness:
    """Runs requests on a real engine; `wait` returns when all asked for have ended."""

    def __init__(self, model: Any, *, tokenizer_file: Path | None = None, graphs: Any = None, **sizes: Any) -> None:
        self.transcripts: dict[int, Transcript] = {}
        self.stats: list[EngineStats] = []
        self.fatal: list[BaseException] = []
        self.ended_order: list[int] = []
        self.cache_events: list[tuple[str, bytes]] = []
        self._changed = threading.Condition()
        defaults: dict[str, Any] = {"slots": 8, "blocks": 64, "step_tokens": 64, "chunk_tokens": 32, "threads": 1}
        self.built: BuiltEngine = build_engine(
            model,
            EngineSizes(**{**defaults, **sizes}),
            on_step=self._on_step,
            on_fatal=self.fatal.append,
            on_cache_events=self.cache_events.extend,
            hash_key=bytes(16),
            tokenizer_file=tokenizer_file,
            graphs=graphs,
        )
        self.engine = self.built.engine
        self._next_id = 1

    def __enter__(self) -> Harness:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def _on_step(self, outputs: list[EngineOutput], stats: EngineStats) -> None:
        with self._changed:
            self.stats.append(stats)
            for output in outputs:
                transcript = self.transcripts[output.sequence_id]
                assert not transcript.terminals, f"sequence {output.sequence_id} goes on after its end"
                transcript.token_ids += output.token_ids
                transcript.logprobs += output.logprobs or ()
                if output.first:
                    assert transcript.cached_tokens is None, "first twice"
                    transcript.cached_tokens = output.cached_tokens
                    transcript.waited_us = output.waited_us
                if output.finish:
                    transcript.terminals.append(output)
                    self.ended_order.append(output.sequence_id)
            self._changed.notify_all()

    def submit(
        self,
        prompt: Sequence[int],
        tokens_max: int = 16,
        *,
        sampling: SamplingParams | None = None,
        emitted: Sequence[int] = (),
        **fields: Any,
    ) -> int:
        sequence_id, self._next_id = self._next_id, self._next_id + 1
        with self._changed:
            self.transcripts[sequence_id] = Transcript()
        self.engine.submit(
            EngineRequest(
                sequence_id=sequence_id,
                token_ids=np.array([*prompt, *emitted], np.uint32),
                output_start=len(prompt),
                tokens_max=tokens_max,
                sampling=sampling or SamplingParams(),
                **fields,
            )
        )
        return sequence_id

    def wait(self, *sequence_ids: int) -> list[Transcript]:
        """Until these have ended; none named: all."""
        wanted = sequence_ids or tuple(self.transcripts)
        self.wait_for(lambda: all(self.transcripts[i].terminals for i in wanted), f"the end of {wanted}")
        return [self.transcripts[i] for i in wanted]

    def wait_for(self, condition: Any, what: str) -> None:
        """Also what changes without an output, as counters do when a step was launched: nobody says when."""
        end = time.monotonic() + WAIT_S
        with self._changed:
            while not (condition() or self.fatal):
                assert time.monotonic() < end, f"never: {what}"
                self._changed.wait(0.05)
        if self.fatal and not condition():
            raise self.fatal[0]

    def run(
        self, *prompts: Sequence[int], tokens_max: int = 16, sampling: SamplingParams | None = None
    ) -> list[list[int]]:
        """Submit all at once, wait; their output tokens."""
        ids = [self.submit(prompt, tokens_max, sampling=sampling) for prompt in prompts]
        return [transcript.token_ids for transcript in self.wait(*ids)]

    def assert_quiet(self) -> None:
        """Nothing is open, and every block is free or cached; the scheduler's own check passes."""
        assert self.engine.drain(Deadline.after(WAIT_S))
        self.engine.close()
        assert not self.fatal, self.fatal
        self.built.scheduler.check()
        counts = self.built.scheduler.counts()
        assert counts.steps_in_flight == counts.sequences_running == counts.sequences_waiting == 0
        assert counts.blocks_active == 0 and counts.blocks_free + counts.blocks_cached == self.built.pool.blocks


def plain_logits(model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits f32 [V] after `token_ids`, computed at once in a fresh cache: no engine, no scheduler, no prefix."""
    layout = model.config.kv_layout
    t = len(token_ids)
    blocks = -(-t // layout.block_tokens)
    caches = [torch.zeros(layout.shape(blocks), dtype=model.config.kv_dtype) for _ in range(model.config.layers)]
    positions = torch.arange(t)
    batch = AttentionBatch(
        block_table=torch.arange(blocks, dtype=torch.int32)[None],
        slots=torch.zeros(1, dtype=torch.int32),
        starts=torch.zeros(1, dtype=torch.int32),
        lengths=torch.tensor([t], dtype=torch.int32),
        offsets=torch.tensor([0, t], dtype=torch.int32),
        positions=positions,
        cache_slots=positions,
        decodes=0,
        context_max=t,
    )
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor(token_ids), batch, caches, torch.tensor([t - 1]))
    return logits[0]


def plain_greedy(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    """The oracle: one token after the other, everything computed anew each time."""
    token_ids = list(prompt)
    for _ in range(tokens):
        token_ids.append(int(plain_logits(model, token_ids).argmax()))
    return token_ids[len(prompt) :]
