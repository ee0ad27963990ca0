"""Matrices that stay in a checkpoint's float8, with their factors, where kernels multiply them as they are.

    kept = keep_float8(model, checkpoint, sources, block, device)     # before parameters are allocated
    kept.fill(source, data, factors)                                  # in the place of `dequantize`, tensor by tensor
    kept.settle()                                                     # when all are filled

Linear layers and experts whose tensors all lie in float8 blocks of 128 x 128, stacked at whole blocks; the rest
(embeddings, routers, the per-head matrices of latent attention, what another block would cut) is turned into the
model's dtype as ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tokenrelay.base.errors import ConfigError
from tokenrelay.base.logging import get_logger
from tokenrelay.kernels import registry
from tokenrelay.kernels.scaled import BLOCK, BlockScaledWeight
from tokenrelay.runtime.layers.linear import Linear
from tokenrelay.runtime.layers.moe import Experts
from tokenrelay.runtime.layers.sources import Index, WeightPart, WeightSource, parameter
from tokenrelay.runtime.models.decoder import Model
from tokenrelay.runtime.weights.checkpoint import Checkpoint
from tokenrelay.runtime.weights.fp8 import FP8, Block
from tokenrelay.runtime.weights.identity import changed_identity

log = get_logger("weights")

FACTORS = "_factors"  # behind a parameter's name
MATRICES: dict[type[nn.Module], tuple[str, ...]] = {Linear: ("weight",), Experts: ("w_gate_up", "w_down")}


@dataclass(frozen=True, slots=True)
class Kept:
    """What stays in float8: modules, and the names of their tensors."""

    modules: tuple[nn.Module, ...] = ()
    names: frozenset[str] = frozenset()

    def fill(self, source: WeightSource, data: Tensor, factors: Tensor) -> None:
        """One tensor of the checkpoint, and its factors, into their places."""
        for part in source.parts:
            part.module.get_parameter(part.parameter)[part.at].copy_(data)
            part.module.get_parameter(part.parameter + FACTORS)[_of_blocks(part.at)].copy_(factors)

    def settle(self) -> None:
        """From now on the modules compute with them."""
        for module in self.modules:
            assert isinstance(module, Linear | Experts)
            names = MATRICES[type(module)]
            module.keep(*(_taken(module, name) for name in names))


def keep_float8(
    model: Model, checkpoint: Checkpoint, sources: Mapping[str, WeightSource], block: Block | None, device: torch.device
) -> Kept:
    """Give the parameters that can be kept their new types; they are on the meta device.

    Raises ConfigError for a checkpoint without such blocks, KernelUnavailable where nothing multiplies them here.
    """
    if block != (BLOCK, BLOCK):
        found = "none" if block is None else f"blocks of {block[0]} x {block[1]}"
        raise ConfigError(
            f"worker.weight_dtype fp8 takes float8 blocks of {BLOCK} x {BLOCK}; this checkpoint has {found}"
        )
    parts: dict[tuple[nn.Module, str], list[tuple[str, WeightSource, WeightPart]]] = {}
    for name, source in sources.items():
        for part in source.parts:
            parts.setdefault((part.module, part.parameter), []).append((name, source, part))
    modules: list[nn.Module] = []
    names: set[str] = set()
    for module in model.modules():
        wanted = MATRICES.get(type(module), ())
        fills = [fill for matrix in wanted for fill in parts.get((module, matrix), [])]
        if not fills or not all(_fits(checkpoint, *fill) for fill in fills):
            continue
        modules.append(module)
        names.update(name for name, _, _ in fills)
        for matrix in wanted:
            _retype(module, matrix)
    if not modules:
        raise ConfigError(
            "worker.weight_dtype fp8: no matrix of this checkpoint is in float8 blocks that fit its module"
        )
    _check_kernels(modules, model.embed.weight.dtype, device)
    log.info("matrices stay in float8", modules=len(modules), tensors=len(names))
    return Kept(tuple(modules), frozenset(names))


def identity_of(identity: bytes) -> bytes:
    """Of a model whose matrices are kept: activations are rounded too, so its KV is another one's."""
    return changed_identity(identity, "fp8")


def _fits(checkpoint: Checkpoint, name: str, source: WeightSource, part: WeightPart) -> bool:
    """Whether a tensor goes into its place with whole blocks."""
    whole = source.view is None and not part.take and len(source.parts) == 1
    rows = [index for index in part.at if isinstance(index, slice)]
    return whole and checkpoint.entry(name).dtype == FP8 and all((rows_of.start or 0) % BLOCK == 0 for rows_of in rows)


def _of_blocks(at: Index) -> Index:
    """The place of a tensor's factors, where the tensor's own is `at`."""
    return tuple(
        slice(index.start // BLOCK, -(-index.stop // BLOCK)) if isinstance(index, slice) else index for index in at
    )


def _retype(module: nn.Module, name: str) -> None:
    *leading, rows, columns = module.get_parameter(name).shape
    with torch.device("meta"):
        setattr(module, name, parameter(*leading, rows, columns, dtype=torch.float8_e4m3fn))
        factors = parameter(*leading, -(-rows // BLOCK), -(-columns // BLOCK), dtype=torch.float32)
        module.register_parameter(name + FACTORS, factors)


def _taken(module: nn.Module, name: str) -> BlockScaledWeight:
    """As a weight of its own; the module has the parameters no more."""
    found = BlockScaledWeight(module.get_parameter(name).data, module.get_parameter(name + FACTORS).data)
    delattr(module, name)
    delattr(module, name + FACTORS)
    return found


def _check_kernels(modules: list[nn.Module], dtype: torch.dtype, device: torch.device) -> None:
    """Raise KernelUnavailable, with required beside supported, where an operation of theirs has no kernel here."""
    named, slow = str(dtype).removeprefix("torch."), set()
    for module in modules:
        if isinstance(module, Linear):
            columns, width = module.weight.shape
            op, sizes = "scaled_linear", {"width": width, "columns": columns}
        else:
            experts, width, hidden = module.get_parameter("w_down").shape
            op, sizes = "scaled_moe", {"experts": experts, "width": width, "hidden": hidden}
        if registry.select(op, device=device.type, dtype=named, **sizes).path == "ref/torch":
            slow.add(op)
    if slow:
        log.warning(
            "float8 weights are multiplied by references here: it saves memory, costs time", operations=sorted(slow)
        )
