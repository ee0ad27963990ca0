"""A CPU step made from a plan's rows by one native call, and run from feedback to tokens by another.

    steps = HostSteps.over(block_table, block_tokens, settings, caches, last_token)     # None: no native extension
    step = steps.make(slots, starts, lengths, samples, feedback, token_ids, decodes)    # arrays of a plan
    token_ids, broken = steps.run(program, step)                                        # where there is a program
    batch, inputs = steps.attention(step), steps.inputs(step)                           # where there is none

Nothing stands between the rows and the tokens but kernels, so a step costs Python the same two calls whatever its
size. The tensors of a step that runs module by module are views of the memory that the native call reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenrelay.kernels.batch import AttentionBatch, SamplingBatch

if TYPE_CHECKING:
    from tokenrelay.kernels._cpu import HostStep
    from tokenrelay.kernels._cpu import HostSteps as Native
    from tokenrelay.kernels.program import Program


@dataclass(frozen=True, slots=True)
class SlotSettings:
    """What the sequence of each slot asks of sampling: [slots] each, as `SamplingBatch` names it."""

    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    min_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int32]
    choice: npt.NDArray[np.int32]
    seed: npt.NDArray[np.int64]  # the bits of a u64
    output_start: npt.NDArray[np.int64]  # tokens before the output
    special: npt.NDArray[np.bool_]  # asks for more than a token: its steps are not run here


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a step has beside its attention batch; see `executor.batch.Batch`."""

    token_ids: Tensor  # int64 [t]
    sample_rows: Tensor  # int64 [s]
    sample_slots: Tensor  # int64 [s]
    sample_ends: Tensor  # int64 [s]
    fed_at: Tensor  # int64 [f]
    fed_slots: Tensor  # int64 [f]


class HostSteps:
    """Of one executor. `make` belongs to the engine's thread, the rest to the executor's."""

    def __init__(self, native: Native, table: Tensor, kept: tuple[Any, ...]) -> None:
        self._native = native
        self._table = table
        self._kept = kept  # what the native side has addresses of

    @classmethod
    def over(
        cls, block_table: Tensor, block_tokens: int, settings: SlotSettings, caches: list[Tensor], last_token: Tensor
    ) -> HostSteps | None:
        """Over memory that stays where it is: block_table int32 [slots, blocks], last_token int64 [slots].

        None where the native extension is missing or the caches are elsewhere.
        """
        try:
            import tokenrelay.kernels._cpu as native
        except ImportError:
            return None
        if not all(tensor.is_cpu and tensor.is_contiguous() for tensor in (*caches, block_table, last_token)):
            return None
        slots, blocks_max = block_table.shape
        s = settings
        floats = [_address(array, np.float32, slots) for array in (s.temperature, s.top_p, s.min_p)]
        ints = [_address(array, np.int32, slots) for array in (s.top_k, s.choice)]
        longs = [_address(array, np.int64, slots) for array in (s.seed, s.output_start)]
        made = native.HostSteps(
            (block_table.data_ptr(), slots, blocks_max, block_tokens),
            (*floats, *ints, *longs, _address(s.special, np.bool_, slots)),
            [cache.data_ptr() for cache in caches],
            caches[0].shape[0],
            last_token.data_ptr(),
        )
        return cls(made, block_table, (block_table, settings, caches, last_token))

    def make(
        self,
        slots: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        samples: npt.NDArray[np.uint8],
        feedback: npt.NDArray[np.uint8],
        token_ids: npt.NDArray[np.uint32],
        decodes: int,
    ) -> HostStep:
        """The step of a plan's rows [n] and tokens [t]; drafted rows are cut into rows of one token.

        Reads block table and settings as they are now. ValueError for rows that lie outside of the table.
        """
        return self._native.make(slots, starts, lengths, samples, feedback, token_ids, decodes)

    def run(self, program: Program, step: HostStep) -> tuple[npt.NDArray[np.uint32], list[int] | None]:
        """The tokens of the sampled rows [s]; and the rows whose logits were no numbers, None where there are none.

        What the model's forward pass and `ops.sample` would give, bit by bit.
        """
        if program.sampler is None:
            raise ValueError("the program's tokens are not chosen natively")
        return self._native.run(program.native, program.sampler, program.vocab, step)

    def inputs(self, step: HostStep) -> Inputs:
        """Views of the step's memory."""
        t, s, f = step.tokens, step.sampled, step.fed
        parts = torch.from_numpy(step.longs()).split_with_sizes([t, t, t, s, s, s, s, s, f, f])
        return Inputs(parts[0], *parts[3:6], *parts[8:])

    def attention(self, step: HostStep) -> AttentionBatch:
        """Views of the step's memory."""
        t, n = step.tokens, step.rows
        slots, starts, lengths, offsets, _ = torch.from_numpy(step.ints()).split_with_sizes(
            [n, n, n, n + 1, 2 * step.sampled]
        )
        _, positions, cache_slots, _ = torch.from_numpy(step.longs()).split_with_sizes(
            [t, t, t, 5 * step.sampled + 2 * step.fed]
        )
        return AttentionBatch(
            block_table=self._table,
            slots=slots,
            starts=starts,
            lengths=lengths,
            offsets=offsets,
            positions=positions,
            cache_slots=cache_slots,
            decodes=step.decodes,
            context_max=step.context_max,
        )

    def sampling(self, step: HostStep) -> SamplingBatch:
        """Views of the step's memory."""
        t, n, s = step.tokens, step.rows, step.sampled
        temperature, top_p, min_p = torch.from_numpy(step.floats()).split_with_sizes([s, s, s])
        _, top_k, choice = torch.from_numpy(step.ints()).split_with_sizes([4 * n + 1, s, s])
        longs = torch.from_numpy(step.longs()).split_with_sizes([3 * t + 3 * s, s, s, 2 * step.fed])
        return SamplingBatch(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=longs[2],
            choice=choice,
            position=longs[1],
        )


def _address(array: npt.NDArray[Any], dtype: type[np.generic], slots: int) -> int:
    """Of an array [slots] of this type; ValueError for another one."""
    if array.shape != (slots,) or array.dtype != dtype or not array.flags.c_contiguous:
        raise ValueError(f"a setting is {array.dtype} {array.shape}, expected {dtype.__name__} ({slots},)")
    return int(array.ctypes.data)
