"""From a loaded model to an engine: sizes the KV pool, makes scheduler, caches and executor fit together.

built = build_engine(model, EngineSizes(slots=16), on_step=deliver)
built.engine.start()
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrelay.base.errors import ConfigError
from tokenrelay.libscheduler import Config as SchedulerConfig
from tokenrelay.libscheduler import Scheduler
from tokenrelay.runtime.engine import Engine, EngineOptions, OnStep
from tokenrelay.runtime.executor.device import DeviceExecutor
from tokenrelay.runtime.executor.executor import Executor
from tokenrelay.runtime.executor.grammars import GrammarSource
from tokenrelay.runtime.executor.graphs import Backend
from tokenrelay.runtime.executor.host_tier import Copier, HostMemory
from tokenrelay.runtime.executor.memory import Pool, allocate_caches, plan_host, plan_pool, wrap_caches
from tokenrelay.runtime.executor.predictor import Predictor
from tokenrelay.runtime.executor.threads import default_threads
from tokenrelay.runtime.handover import AllocatePool, OnHandover
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.kv import check_kernels
from tokenrelay.runtime.predicted import PredictedDrafter
from tokenrelay.runtime.weights.pack import pack_model
from tokenrelay.runtime.weights.quantize import weight_bytes

if TYPE_CHECKING:
    from tokenrelay.runtime.spmd.ranks import LeadingModel

HASH_KEY_BYTES = 16
# A copy of one token's KV costs far less than to compute it. Followers of a mesh, who have caches of their own, are not
# told of copies: none is made there.
TAIL_TOKENS_MIN = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSizes:
    """Bounds of an engine. None: found out from the model and the machine."""

    slots: int = 64  # sequences resident at once
    step_tokens: int = 2048  # of one step, all rows together
    chunk_tokens: int = 512  # of one sequence in one step
    waiting_max: int = 1024  # queue bound
    context_tokens: int | None = None  # prompt + output of one sequence
    kv_memory_bytes: int | None = None
    kv_sharers: int = 1  # workers on this machine that divide the default KV memory
    blocks: int | None = None
    steps_in_flight: int = 2
    threads: int | None = None  # of torch in a step
    tps_floor: float = 0.0  # tokens per second that each running user keeps; 0: no floor
    tps_fraction: float = 0.5  # of batch 1's rate on this device: the floor in force is no higher
    eviction: str = "reuse"  # or "lru": which cached block goes when room is needed (docs/eviction.md)
    host_memory_bytes: int = 0  # of the host tier of the KV pool; 0: none
    draft_tokens: int = 0  # of one draft, guessed by the model's prediction layer where it was loaded, else from the
    # sequence's own text (runtime/drafts.py); 0: nobody drafts
    floor_wait_s: float = 10.0  # a request that waited longer is admitted though the floor breaks; 0: never


@dataclass(frozen=True, slots=True)
class BuiltEngine:
    """An engine that is not started yet, and what it was given."""

    engine: Engine
    scheduler: Scheduler
    pool: Pool


def build_engine(
    model: Model | LeadingModel,
    sizes: EngineSizes,
    *,
    on_step: OnStep,
    on_fatal: Callable[[BaseException], None] | None = None,
    on_cache_events: Callable[[list[tuple[str, bytes]]], None] | None = None,
    on_handover: OnHandover | None = None,
    hash_key: bytes | None = None,
    allocate: AllocatePool | None = None,
    tokenizer_file: Path | None = None,
    graphs: Backend | None = None,
) -> BuiltEngine:
    """Raises ConfigError when the sizes do not fit together or into memory. `hash_key`: 16 bytes, the fleet's.

    `allocate`: the pool's memory, for a transport that shares it. `tokenizer_file`: for outputs with a grammar.
    `graphs`: how decode steps are recorded; None: as the device does it, and on a CPU not at all.
    """
    config, block_tokens = model.config, model.config.kv_layout.block_tokens
    device = model.cos_sin.device
    pool = _pool_for(model, sizes)
    try:
        scheduler_config = SchedulerConfig(
            block_tokens=block_tokens,
            blocks=pool.blocks,
            parts=pool.parts,
            slots=sizes.slots,
            context_tokens=pool.context_tokens,
            step_tokens=sizes.step_tokens,
            chunk_tokens=sizes.chunk_tokens,
            waiting_max=sizes.waiting_max,
            hash_key=hash_key or secrets.token_bytes(HASH_KEY_BYTES),
            model_identity=config.identity,
            steps_in_flight=sizes.steps_in_flight,
            tps_floor=sizes.tps_floor,
            tps_fraction=sizes.tps_fraction,
            floor_wait_us=round(sizes.floor_wait_s * 1e6),
            eviction=sizes.eviction,
            draft_tokens=sizes.draft_tokens,
            tail_tokens_min=TAIL_TOKENS_MIN if isinstance(model, Model) else 0,
            host_blocks=plan_host(
                config.kv_layout, config.kv_layers, config.kv_dtype, sizes.host_memory_bytes, pool.blocks, device
            ),
        )
    except ValueError as error:
        raise ConfigError(f"the scheduler's sizes do not fit: {error}") from error
    parameter_bytes = weight_bytes(model if isinstance(model, Model) else model.shard)
    if isinstance(model, Model):
        pack_model(model)
        model.capture()
    if allocate is None:
        scheduler = Scheduler(scheduler_config)
        caches = allocate_caches(config.kv_layout, config.kv_layers, pool, config.kv_dtype, device)
    else:
        memory = allocate([config.kv_layout.bytes_per_block(config.kv_dtype)] * config.kv_layers, pool.blocks)
        scheduler = Scheduler(scheduler_config, generations=memory.generations)
        caches = wrap_caches(memory.layers, config.kv_layout, pool, config.kv_dtype)
    predictor, drafter = None, None
    if isinstance(model, Model) and model.prediction is not None:
        table, tokens_max = scheduler.block_table, sizes.draft_tokens
        predictor = Predictor(model, caches[-1], table, block_tokens=block_tokens, tokens_max=tokens_max)
        drafter = PredictedDrafter(scheduler, predictor, tokens_max=sizes.draft_tokens)
    common: dict[str, Any] = {
        "block_tokens": block_tokens,
        "vocab_size": config.vocab_size,
        "steps_in_flight": sizes.steps_in_flight,
        "predictor": predictor,
        "grammars": GrammarSource(tokenizer_file, config.vocab_size, config.eos_token_ids) if tokenizer_file else None,
    }
    executor: Executor | DeviceExecutor
    if (graphs is not None or device.type != "cpu") and isinstance(model, Model):
        executor = DeviceExecutor(
            model,
            caches,
            scheduler.block_table,
            draft_tokens=sizes.draft_tokens,
            backend=graphs,
            warm_up=graphs is None,
            **common,
        )
    else:
        threads = sizes.threads or default_threads(parameter_bytes)
        executor = Executor(model, caches, scheduler.block_table, threads=threads, **common)
    engine = Engine(
        scheduler,
        executor,
        vocab_size=config.vocab_size,
        on_step=on_step,
        on_fatal=on_fatal,
        on_cache_events=on_cache_events,
        on_handover=on_handover,
        options=EngineOptions(
            steps_in_flight=sizes.steps_in_flight, tps_floor=sizes.tps_floor, draft_tokens=sizes.draft_tokens
        ),
        drafter=drafter,
    )
    if scheduler_config.host_blocks > 0:
        engine.tier.attach(Copier(HostMemory(caches, scheduler_config.host_blocks), engine.tier.ended))
    return BuiltEngine(engine, scheduler, pool)


def _pool_for(model: Model | LeadingModel, sizes: EngineSizes) -> Pool:
    """Of a model on several ranks along dp each has a part. Raises ConfigError, also where no kernel reads it."""
    config = model.config
    if isinstance(model, Model):
        check_kernels(config, model.architecture, model.cos_sin.device)
    return plan_pool(
        config.kv_layout,
        config.kv_layers,
        config.kv_dtype,
        slots=sizes.slots,
        context_tokens=min(sizes.context_tokens or config.context_tokens, config.context_tokens),
        context_asked=sizes.context_tokens is not None,
        kv_memory_bytes=sizes.kv_memory_bytes,
        kv_sharers=sizes.kv_sharers,
        blocks=sizes.blocks,
        device=model.cos_sin.device,
        parts=1 if isinstance(model, Model) else model.parts,
        whole=isinstance(model, Model) or model.whole_pool,
    )
