"""llama.cpp for bench/cpu_engine.py, by llama-cpp-python: as its own batched bench, it samples nothing."""

from __future__ import annotations

import ctypes
import os
import sys
import time

BEGAN_S = float(sys.argv[3])

import llama_cpp as ll  # noqa: E402
from common import prompt, serve  # noqa: E402

CONTEXT, SEQUENCES = 36864, 33


class Llama:
    """One context; sequence 32 is for prompts."""

    def __init__(self, path: str) -> None:
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        self._model = ll.llama_model_load_from_file(path.encode(), params)
        options = ll.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch, options.n_seq_max = CONTEXT, 2048, 512, SEQUENCES
        options.n_threads = options.n_threads_batch = len(os.sched_getaffinity(0))
        options.kv_unified = True
        self._context = ll.llama_init_from_model(self._model, options)
        self._memory = ll.llama_get_memory(self._context)
        self._batch = ll.llama_batch_init(2048, 0, 1)
        self._seed = 0
        self._feed([(0, i, token) for i, token in enumerate(prompt(0, 8))])
        self._clear()

    def _clear(self) -> None:
        ll.llama_memory_clear(self._memory, True)

    def _feed(self, tokens: list[tuple[int, int, int]], *, each: bool = False) -> None:
        """(sequence, position, token) of at most 2,048 tokens; logits of the last one, or of each."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (sequence, position, token) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = each or i == len(tokens) - 1
        if (code := ll.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode gave {code}")
        ctypes.cast(ll.llama_get_logits_ith(self._context, -1), ctypes.POINTER(ctypes.c_float))[0]  # waits

    def decode(self, batch: int, context: int, tokens: int) -> dict[str, float]:
        """Tokens per second of all."""
        self._clear()
        self._seed += batch
        prompts = [prompt(self._seed + s, context + tokens) for s in range(batch)]
        for s in range(batch):
            self._feed([(s, i, prompts[s][i]) for i in range(context)])
        began_s = time.perf_counter()
        for n in range(context, context + tokens):
            self._feed([(s, n, prompts[s][n]) for s in range(batch)], each=True)
        return {"tokens_per_s": batch * tokens / (time.perf_counter() - began_s)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Tokens per second of one prompt, and the time to the first token when all but its last token is kept."""
        self._clear()
        self._seed += 1
        ids = prompt(self._seed, tokens)
        began_s = time.perf_counter()
        self._feed([(32, i, token) for i, token in enumerate(ids)])
        rate = tokens / (time.perf_counter() - began_s)
        began_s = time.perf_counter()
        ll.llama_memory_seq_rm(self._memory, 32, tokens - 1, -1)
        self._feed([(32, tokens - 1, ids[-1])])
        return {"tokens_per_s": rate, "again_ms": (time.perf_counter() - began_s) * 1e3}


if __name__ == "__main__":
    subject = Llama(sys.argv[1])
    serve({"decode": subject.decode, "prefill": subject.prefill}, ll.__version__, BEGAN_S)
