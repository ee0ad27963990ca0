"""Arguments that are made once a step and shared by many kernel calls. Tensors live on the model's device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionBatch:
    """The rows of one step and where their KV lies. Rows [0, decodes) have length 1 and own tokens [0, decodes)."""

    block_table: Tensor  # int32 [slots, blocks_max]: block of each run of block_tokens positions
    slots: Tensor  # int32 [n]: row of block_table for each row of the step
    starts: Tensor  # int32 [n]: tokens whose KV stood before this step
    lengths: Tensor  # int32 [n]: tokens of this step
    offsets: Tensor  # int32 [n + 1]: first token of each row in the flat token axis
    positions: Tensor  # int64 [t]: position of each token in its sequence
    cache_slots: Tensor  # int64 [t]: block * block_tokens + offset, where each token's KV is written; < 0: nowhere
    decodes: int
    context_max: int  # max(starts + lengths), known to the host
    # Decode rows of one sequence at consecutive positions (a draft) may be read as one: int32 [g + 1], the first row of
    # each such run, and how many rows a run has at most. None: each row alone.
    groups: Tensor | None = None
    group_max: int = 1
    extents: tuple[tuple[int, int], ...] | None = None  # (start, length) of each row on the host, where it is known


@dataclass(frozen=True, slots=True, eq=False)
class SamplingBatch:
    """How to choose a token for each row of logits; all tensors [s]."""

    temperature: Tensor  # f32; not above 0: greedy
    top_p: Tensor  # f32; 1 or more: off
    top_k: Tensor  # i32; 0 or less: off
    min_p: Tensor  # f32; 0 or less: off
    seed: Tensor  # int64: the bits of a u64
    choice: Tensor  # i32: index among the n choices of a request
    position: Tensor  # int64: index of the output token in its sequence


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyBatch:
    """Penalties and biases of the rows that ask for them: p rows with e distinct seen tokens and b biases in all."""

    rows: Tensor  # int64 [p]: the row of logits, each at most once
    presence: Tensor  # f32 [p]; 0: off
    frequency: Tensor  # f32 [p]; 0: off
    repetition: Tensor  # f32 [p], above 0; 1: off
    offsets: Tensor  # int64 [p + 1]: first seen token of each row
    token_ids: Tensor  # int64 [e]: the distinct tokens of prompt and output, each at most once a row
    output_counts: Tensor  # i32 [e]: how often each stands in the output; 0: in the prompt only
    bias_offsets: Tensor  # int64 [p + 1]: first bias of each row
    bias_token_ids: Tensor  # int64 [b], each at most once a row
    bias: Tensor  # f32 [b], added last
