"""DeepSeek-V3's and Kimi-K2's published weights: float8 with one float32 factor per block of 128 x 128.

Beside `<name>.weight` (E4M3) lies `<name>.weight_scale_inv`; their product, block by block, is the weight
(DeepSeek-V3's `inference/fp8_cast_bf16.py`; arXiv:2412.19437, section 3.3). They are turned into the model's dtype
while loading.
"""

from __future__ import annotations

from torch import Tensor

from tokenrelay.base.errors import CheckpointError
from tokenrelay.runtime.models.fields import Fields
from tokenrelay.runtime.weights.checkpoint import Checkpoint
from tokenrelay.runtime.weights.safetensors import Entry

FP8 = "F8_E4M3"
SUFFIX = "_scale_inv"

Block = tuple[int, int]  # rows, columns that share a factor


def fp8_block(config: Fields) -> Block | None:
    """The block of `quantization_config`, None where there is none. Raises CheckpointError for another method."""
    table = config.table("quantization_config")
    if table is None:
        return None
    table.only("quant_method", "fp8", why="other quantised checkpoints are not supported")
    if "quant_method" not in table:
        table.fail("quant_method", '"fp8"')
    block = table.integers("weight_block_size")
    if len(block) != 2 or min(block) < 1:
        table.fail("weight_block_size", "two integers, such as [128, 128]")
    return block[0], block[1]


def check_factors(checkpoint: Checkpoint, entry: Entry, block: Block | None) -> None:
    """A float8 tensor needs its factors, in the right shape. Raises CheckpointError."""
    path = str(checkpoint.where[entry.name].path)
    if block is None or len(entry.shape) != 2:
        message = f"{path}: {entry.name} has dtype {entry.dtype}, and config.json describes no float8 blocks for it"
        raise CheckpointError(message, file=path, tensor=entry.name)
    name = entry.name + SUFFIX
    if name not in checkpoint.where:
        message = f"{path}: {entry.name} has dtype {entry.dtype} and its factors {name} are missing"
        raise CheckpointError(message, file=path, tensor=name)
    factors = checkpoint.entry(name)
    expected = (-(-entry.shape[0] // block[0]), -(-entry.shape[1] // block[1]))
    if factors.shape != expected or factors.dtype not in ("F32", "BF16"):
        found = f"{factors.dtype} {list(factors.shape)}"
        message = f"{path}: {name} is {found}; expected F32 {list(expected)}"
        raise CheckpointError(message, file=path, tensor=name)


def dequantize(weight: Tensor, factors: Tensor, block: Block) -> Tensor:
    """weight float8 [r, c], factors [ceil(r / block[0]), ceil(c / block[1])] -> float32 [r, c]."""
    rows, columns = weight.shape
    result = weight.float()
    spread = factors.float().repeat_interleave(block[1], dim=1)[:, :columns]  # [R, c]
    for first in range(0, rows, block[0]):  # a band of rows at a time: no second tensor of the weight's size
        result[first : first + block[0]] *= spread[first // block[0]]
    return result
