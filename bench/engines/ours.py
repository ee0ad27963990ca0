"""TokenRelay for bench/cpu_engine.py: scheduler, executor, sampler and model as a worker has them, without the wire."""

from __future__ import annotations

import sys
import threading
import time

BEGAN_S = float(sys.argv[3])

import numpy as np  # noqa: E402 - what imports cost counts
import torch  # noqa: E402
from common import prompt, serve  # noqa: E402

from tokenrelay.runtime.build import EngineSizes, build_engine  # noqa: E402
from tokenrelay.runtime.requests import EngineOutput, EngineRequest, EngineStats  # noqa: E402
from tokenrelay.runtime.weights.loader import load_model  # noqa: E402
from tokenrelay.runtime.weights.quantize import quantize_model  # noqa: E402

FORMS = {"bf16": "", "int8": "int8", "int4": "int4-32"}  # q4_0 has groups of 32 as well


class Ours:
    """One engine, asked by one thread."""

    def __init__(self, folder: str, form: str) -> None:
        model = load_model(folder, dtype=torch.bfloat16, context_tokens=4096)
        if FORMS[form]:
            quantize_model(model, FORMS[form])
        sizes = EngineSizes(slots=32, step_tokens=2048, chunk_tokens=2048, context_tokens=4096, blocks=240)
        self._engine = build_engine(model, sizes, on_step=self._on_step).engine
        self._engine.start()
        self._next, self._seed = 0, 0
        self._times: dict[int, list[float]] = {}
        self._open: set[int] = set()
        self._ended = threading.Event()
        self._error: Exception | str | None = None
        self._run([prompt(0, 8)], 1)  # ready: it has answered

    def _on_step(self, outputs: list[EngineOutput], stats: EngineStats) -> None:
        now_s = time.perf_counter()
        for output in outputs:
            self._times[output.sequence_id] += [now_s] * len(output.token_ids)
            if output.finish:
                self._open.discard(output.sequence_id)
            if output.error is not None:
                self._error = output.error
        if not self._open:
            self._ended.set()

    def _run(self, prompts: list[list[int]], tokens: int) -> tuple[float, list[list[float]]]:
        """When they were submitted, and when each token of each came."""
        ids = list(range(self._next, self._next + len(prompts)))
        self._next += len(prompts)
        self._times = {n: [] for n in ids}
        self._open = set(ids)
        self._ended.clear()
        began_s = time.perf_counter()
        for n, ids_of in zip(ids, prompts, strict=True):
            self._engine.submit(EngineRequest(n, np.array(ids_of, np.uint32), len(ids_of), tokens))
        assert self._ended.wait(600), "no answer in ten minutes"
        if self._error is not None:
            raise RuntimeError(str(self._error))
        return began_s, [self._times[n] for n in ids]

    def decode(self, batch: int, context: int, tokens: int) -> dict[str, float]:
        """Tokens per second of all, while all run."""
        self._seed += batch
        _, times = self._run([prompt(self._seed + i, context) for i in range(batch)], tokens)
        first_s, last_s = max(t[0] for t in times), min(t[-1] for t in times)
        count = sum(first_s < at_s <= last_s for t in times for at_s in t)
        return {"tokens_per_s": count / (last_s - first_s)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Tokens per second of one prompt, and the time to the first token when it comes again."""
        self._seed += 1
        ids = prompt(self._seed, tokens)
        began_s, times = self._run([ids], 1)
        again_s, again = self._run([ids], 1)
        return {"tokens_per_s": tokens / (times[0][0] - began_s), "again_ms": (again[0][0] - again_s) * 1e3}


if __name__ == "__main__":
    subject = Ours(sys.argv[1], sys.argv[2])
    serve({"decode": subject.decode, "prefill": subject.prefill}, "this checkout", BEGAN_S)
