"""From a checkpoint folder to a model that can run.

    model = load_model(Path("Qwen3-0.6B"), dtype=torch.bfloat16, device="cpu", progress=bar.update)

Order matters: the folder is read and checked against the architecture (every name, shape and dtype) before memory is
allocated, parameters are allocated once, and each tensor is copied, converted on the way, from the map into its place
in its (often fused) parameter. Peak memory is the model plus a tensor a thread.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from tokenrelay.base.errors import CheckpointError
from tokenrelay.base.logging import get_logger
from tokenrelay.runtime.layers.moe import ExpertSplit
from tokenrelay.runtime.layers.sources import WeightSource
from tokenrelay.runtime.models.config import ModelConfig
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.models.kv import KvDtype, in_float8
from tokenrelay.runtime.models.registry import architecture_of
from tokenrelay.runtime.placement import STAGES, Mesh, check
from tokenrelay.runtime.placement.stages import stage_layers
from tokenrelay.runtime.spmd.shard import expert_sources, shard_model
from tokenrelay.runtime.weights.checkpoint import Checkpoint
from tokenrelay.runtime.weights.fp8 import FP8, SUFFIX, Block, check_factors, dequantize, fp8_block
from tokenrelay.runtime.weights.identity import model_identity
from tokenrelay.runtime.weights.keep import Kept, identity_of, keep_float8
from tokenrelay.runtime.weights.prediction import SHARED, Wanted, find_prediction
from tokenrelay.runtime.weights.safetensors import SafetensorsFile

Progress = Callable[[int, int], None]  # (bytes loaded, bytes in all), after each tensor

COPIERS_MAX = 4  # threads that fill parameters: memory gets no faster with more
FLOATS = ("F32", "BF16", "F16", "F64")
MODEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_DERIVED = re.compile(r"\.rotary_emb\.inv_freq$")  # old exports carry what the configuration says already

NOTHING_KEPT = Kept()

log = get_logger("weights")


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    block_tokens: int = 64,
    context_tokens: int | None = None,
    mesh: Mesh | None = None,
    rank: int = 0,
    experts: ExpertSplit | None = None,
    prediction: Wanted = "off",
    kv_dtype: KvDtype = "auto",
    keep_fp8: bool = False,
) -> Model:
    """Load the checkpoint in `folder`.

    `dtype` None takes the checkpoint's own (see `default_dtype`). `block_tokens` goes into `config.kv_layout`.
    `context_tokens` lowers the model's context. With `mesh` only the part of `rank` is read, `config.kv_layout` is that
    of its cache, `config.layers` counts the layers of its pipeline stage, and `runtime.spmd.rank_model` runs it;
    `experts` says how these are dealt out. `prediction`: whether to load the multi-token prediction layer, for drafts;
    not with `mesh`. `kv_dtype`: of the caches, "auto" for the model's, "fp8" for latents in float8; ConfigError where
    it has none. `keep_fp8`: matrices in float8 blocks stay so (keep.py), not with `mesh`; ConfigError where there are
    none, KernelUnavailable where nothing multiplies them. Raises CheckpointError with one sentence for whatever is
    wrong with the checkpoint.
    """
    device = torch.device(device)
    with Checkpoint(Path(folder)) as checkpoint:
        name, architecture = architecture_of(checkpoint.config)
        dtype = dtype or default_dtype(checkpoint, device)
        if dtype not in MODEL_DTYPES:
            raise CheckpointError(f"cannot load a model as {dtype}; one of {', '.join(map(str, MODEL_DTYPES))}")
        with torch.device("meta"):
            model = Model(architecture, experts=experts, dtype=dtype)
        mesh = mesh or Mesh()
        check(model, mesh)
        if (found := find_prediction(checkpoint, architecture, dtype, prediction)) is not None:
            assert mesh.ranks == 1, "a prediction layer runs on one rank"
            check(found, mesh)
            model.prediction = found
        block = fp8_block(checkpoint.config)
        sources = _match(checkpoint, model, block)
        config = ModelConfig(
            name=checkpoint.folder.resolve().name,
            architecture=name,
            vocab_size=architecture.vocab_size,
            layers=len(stage_layers(architecture.layers, mesh.coordinates(rank)[STAGES], mesh.size(STAGES))),
            context_tokens=min(architecture.context_tokens, context_tokens or architecture.context_tokens),
            eos_token_ids=checkpoint.eos_token_ids(),
            kv_layout=architecture.kv_layout(block_tokens, mesh.size("tp")),
            dtype=dtype,
            identity=model_identity(checkpoint, name, architecture, dtype),
            prediction_layers=int(model.prediction is not None),
        )
        if kv_dtype == "fp8":
            config = in_float8(config)
        kept = NOTHING_KEPT
        if keep_fp8:
            assert mesh.ranks == 1, "float8 weights are for one rank"
            kept = keep_float8(model, checkpoint, sources, block, device)
            config = replace(config, identity=identity_of(config.identity))
        zeros: list[tuple[torch.nn.Module, str]] = []
        if mesh.ranks > 1:
            sources, zeros = shard_model(model, sources, mesh, rank, experts.spare if experts else 0)
        _allocate(model, device, checkpoint)
        for module, parameter in zeros:
            module.get_parameter(parameter).zero_()
        _fill(checkpoint, sources, block, progress, kept)
        kept.settle()
        model.finish(config, device)
    return model


def read_experts(folder: Path, model: Model, wanted: Mapping[tuple[int, int], int], mesh: Mesh, rank: int) -> None:
    """Fill places of a loaded rank's experts: (layer, place) -> expert, from the checkpoint in `folder`.

    Raises CheckpointError when the folder changed or cannot be read.
    """
    with Checkpoint(folder) as checkpoint:
        block = fp8_block(checkpoint.config)
        for (layer, place), expert in wanted.items():
            sources = expert_sources(model, layer, place, expert, mesh, rank)
            if absent := [name for name in sources if name not in checkpoint.where]:
                raise CheckpointError(f"{folder} lacks the tensor {absent[0]}, which was there", file=str(folder))
            _fill(checkpoint, sources, block, None)


def default_dtype(checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype that config.json names, else the embedding's. float16 becomes float32 on a CPU: it is slow there."""
    named = str(checkpoint.config.raw("dtype") or checkpoint.config.raw("torch_dtype") or "").removeprefix("torch.")
    found = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(named)
    if found is None:
        embedding = checkpoint.where.get("model.embed_tokens.weight")
        kind = embedding.entries["model.embed_tokens.weight"].dtype if embedding else "F32"
        found = {"BF16": torch.bfloat16, "F16": torch.float16}.get(kind, torch.float32)
    return torch.float32 if found is torch.float16 and device.type == "cpu" else found


def _match(checkpoint: Checkpoint, model: Model, block: Block | None) -> dict[str, WeightSource]:
    """Every tensor that the model needs, checked; logs what is left out. Raises CheckpointError for any difference."""
    sources = {source.name: source for source in model.sources()}
    for name, source in sources.items():
        if name not in checkpoint.where:
            file = checkpoint.files[0].path if len(checkpoint.files) == 1 else checkpoint.folder
            message = f"{file} lacks the tensor {name}, expected with shape {list(source.shape)}"
            raise CheckpointError(message, file=str(file), tensor=name)
        entry, path = checkpoint.entry(name), checkpoint.where[name].path
        if entry.shape != source.shape:
            found, expected = list(entry.shape), list(source.shape)
            message = f"{path}: {name} has shape {found}; config.json makes it {expected}"
            raise CheckpointError(message, file=str(path), tensor=name)
        if entry.dtype == FP8:
            check_factors(checkpoint, entry, block)
        elif entry.dtype not in FLOATS:
            message = f"{path}: {name} has dtype {entry.dtype}; expected one of {', '.join(FLOATS)}"
            raise CheckpointError(message, file=str(path), tensor=name)
    _leave_out(checkpoint, model, set(sources))
    return sources


def _leave_out(checkpoint: Checkpoint, model: Model, needed: set[str]) -> None:
    """Note what a checkpoint may hold beyond the model, refuse the rest: a lost tensor changes the answers."""
    architecture = model.architecture
    predictions = []
    for name in checkpoint.where:
        if name in needed or _DERIVED.search(name) or name.removesuffix(SUFFIX) in needed:
            continue
        layer = _LAYER.match(name)
        if layer is not None and int(layer[1]) >= architecture.layers:
            ours = model.prediction is not None and int(layer[1]) == architecture.layers
            if not ours:
                predictions.append(name)
            elif name.removeprefix(layer[0]) not in SHARED:
                path = checkpoint.where[name].path
                raise CheckpointError(f"{path}: {name} has no place in a prediction layer", file=str(path), tensor=name)
        elif not (architecture.tied and name == "lm_head.weight"):
            path = checkpoint.where[name].path
            message = f"{path}: {name} has no place in this architecture ({checkpoint.config.file} describes none)"
            raise CheckpointError(message, file=str(path), tensor=name)
    if predictions:
        # Multi-token prediction, kept for speculative decoding.
        log.info("left out the multi-token prediction layers", tensors=len(predictions), first=predictions[0])


def _allocate(model: Model, device: torch.device, checkpoint: Checkpoint) -> None:
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    try:
        model.to_empty(device=device)
    except (RuntimeError, MemoryError) as error:  # torch's CPU allocator raises a plain RuntimeError
        message = f"{checkpoint.folder} needs {size / 2**30:.1f} GiB for its parameters, which {device} does not have"
        raise CheckpointError(message, file=str(checkpoint.folder)) from error


def _fill(
    checkpoint: Checkpoint,
    sources: dict[str, WeightSource],
    block: Block | None,
    progress: Progress | None,
    kept: Kept = NOTHING_KEPT,
) -> None:
    """Copy every tensor into its place, in the order of their data, by some threads: most of the time goes into memory
    that is touched for the first time.
    """
    total = sum(checkpoint.entry(name).size_bytes for name in sources)
    done = 0
    lock = threading.Lock()

    def fill(file: SafetensorsFile, name: str) -> None:
        nonlocal done
        entry, tensor = file.entries[name], file.tensor(name)
        if entry.dtype == FP8 and block is not None:
            factors = checkpoint.where[name + SUFFIX].tensor(name + SUFFIX)
            if name in kept.names:
                kept.fill(sources[name], tensor, factors)
            else:
                _copy(sources[name], dequantize(tensor, factors, block))
        else:
            _copy(sources[name], tensor)
        del tensor  # nothing may look into pages that are given back
        file.release(name)
        with lock:
            done += entry.size_bytes
            if progress is not None:
                progress(done, total)

    wanted = [(file, name) for file in checkpoint.files for name in file.entries if name in sources]
    with ThreadPoolExecutor(min(COPIERS_MAX, len(os.sched_getaffinity(0))), "weights") as threads:
        copies = [threads.submit(fill, file, name) for file, name in wanted]
        try:
            for copy in copies:
                copy.result()
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise


@torch.inference_mode()  # of this thread: a rank's parameters may have been made inside it
def _copy(source: WeightSource, tensor: torch.Tensor) -> None:
    viewed = tensor.view(source.view) if source.view is not None else tensor
    for part in source.parts:
        place = part.module.get_parameter(part.parameter)
        place[part.at].copy_(viewed[part.take])
