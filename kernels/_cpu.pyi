"""The native extension (csrc/bindings.cpp). Addresses are `Tensor.data_ptr()`; sizes and strides count elements."""

import numpy as np
import numpy.typing as npt

RUN_TOKENS: int

_Part = tuple[int, int, int]  # address, token stride, head stride
_Batch = tuple[int, int, int, int, int, int, int]  # block_table, slots, blocks_max, slots, starts, lengths, offsets
_Range = tuple[int, int, int]  # first row, last row, token of index 0

def isa_features() -> list[str]: ...
def isa_runs(isa: int) -> bool: ...
def processors() -> int: ...
def threads() -> int: ...
def set_threads(count: int) -> None: ...
def mla_attention(
    isa: int,
    dtype: int,
    batch: _Batch,
    range: _Range,
    cache: int,
    blocks: int,
    block_tokens: int,
    tokens: int,
    heads: int,
    rank: int,
    rope: int,
    q_latent: _Part,
    q_rope: _Part,
    out: _Part,
    scale: float,
    /,
) -> None: ...
def gqa_attention(
    isa: int,
    dtype: int,
    batch: _Batch,
    range: _Range,
    cache: int,
    blocks: int,
    kv_heads: int,
    block_tokens: int,
    tokens: int,
    heads: int,
    head_dim: int,
    q: _Part,
    out: _Part,
    scale: float,
    /,
) -> None: ...
def projected_attention(
    isa: int,
    batch: _Batch,
    place: tuple[int, int],
    cache: tuple[int, int, int],
    shape: tuple[int, int, int, int, int],
    up: tuple[int, int, int, int, int, int],
    q_nope: _Part,
    q_rope: _Part,
    out: _Part,
    scale: float,
    /,
) -> None: ...
def packed_heads(
    isa: int,
    shape: tuple[int, int, int, int],
    x: _Part,
    weights: tuple[int, int, int, int, int, int],
    first: int,
    out: _Part,
    /,
) -> None: ...
def costs_less_absorbed(tokens: int, start: int, rank: int, nope: int, value: int, at_least: int, /) -> bool: ...
def dense_attention(
    isa: int,
    dtype: int,
    heads: int,
    q_tokens: int,
    tokens: int,
    first: int,
    q_first: int,
    k: _Part,
    v: _Part,
    k2: int,
    k2_token: int,
    dk: int,
    dk2: int,
    dv: int,
    q_nope: _Part,
    q_rope: _Part,
    scale: float,
    state_m: int,
    state_l: int,
    state_o: int,
    /,
) -> None: ...
def dense_finish(
    isa: int, dtype: int, heads: int, q_tokens: int, dv: int, state_l: int, state_o: int, out: _Part, /
) -> None: ...
def rms_norm(
    isa: int,
    dtype: int,
    tokens: int,
    d: int,
    x: int,
    x_stride: int,
    residual: int,
    residual_stride: int,
    weight: int,
    eps: float,
    normed: int,
    total: int,
    /,
) -> None: ...
def rotary(
    isa: int,
    dtype: int,
    tokens: int,
    heads: int,
    r: int,
    x: _Part,
    positions: int,
    cos_sin: int,
    table_rows: int,
    interleaved: bool,
    out: int,
    /,
) -> None: ...
def silu_mul(isa: int, dtype: int, tokens: int, f: int, gate_up: int, stride: int, out: int, /) -> None: ...
def mla_cache_write(
    dtype: int,
    tokens: int,
    rank: int,
    rope: int,
    latent: int,
    latent_stride: int,
    k_rope: int,
    k_rope_stride: int,
    cache: int,
    blocks: int,
    block_tokens: int,
    cache_slots: int,
    /,
) -> None: ...
def gqa_cache_write(
    dtype: int,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    k: _Part,
    v: _Part,
    cache: int,
    blocks: int,
    block_tokens: int,
    cache_slots: int,
    /,
) -> None: ...
def linear(
    isa: int,
    dtype: int,
    out_dtype: int,
    rows: int,
    columns: int,
    depth: int,
    x: int,
    x_stride: int,
    weight: int,
    bias: int,
    out: int,
    /,
) -> None: ...
def integer_linear(
    isa: int,
    plain_isa: int,
    dtype: int,
    out_dtype: int,
    bits: int,
    group: int,
    rows: int,
    columns: int,
    depth: int,
    x: int,
    x_stride: int,
    data: int,
    scales: int,
    bias: int,
    out: int,
    /,
) -> None: ...
def integer_fit(
    isa: int, dtype: int, bits: int, group: int, rows: int, width: int, matrix: int, data: int, scales: int, /
) -> None: ...
def integer_moe(
    isa: int,
    plain_isa: int,
    dtype: int,
    bits: int,
    gate_up_group: int,
    down_group: int,
    tokens: int,
    top_k: int,
    experts: int,
    d: int,
    f: int,
    x: int,
    x_stride: int,
    chosen: int,
    weights: int,
    gate_up: tuple[int, int],
    down: tuple[int, int],
    out: int,
    /,
) -> None: ...
def moe(
    isa: int,
    dtype: int,
    tokens: int,
    top_k: int,
    experts: int,
    d: int,
    f: int,
    x: int,
    x_stride: int,
    chosen: int,
    weights: int,
    gate_up: int,
    down: int,
    out: int,
    /,
) -> None: ...
def moe_route(
    isa: int,
    tokens: int,
    experts: int,
    logits: int,
    stride: int,
    bias: int,
    top_k: int,
    groups: int,
    groups_top_k: int,
    sigmoid: bool,
    normalize: bool,
    top2: bool,
    scale: float,
    chosen: int,
    weights: int,
    /,
) -> None: ...
def token_weights(isa: int, vocab: int, logits: int, temperature: float, weights: int, /) -> int: ...
def sample(
    isa: int,
    rows: int,
    vocab: int,
    logits: int,
    stride: int,
    temperature: int,
    top_p: int,
    top_k: int,
    min_p: int,
    seed: int,
    choice: int,
    position: int,
    tokens: int,
    /,
) -> None: ...
def token_logprobs(
    isa: int,
    rows: int,
    vocab: int,
    top_k: int,
    logits: int,
    stride: int,
    tokens: int,
    chosen: int,
    top: int,
    top_tokens: int,
    /,
) -> None: ...
def apply_penalties(
    rows: int,
    vocab: int,
    logits: int,
    stride: int,
    count: int,
    row: int,
    presence: int,
    frequency: int,
    repetition: int,
    offsets: int,
    tokens: int,
    seen_total: int,
    output_counts: int,
    bias_offsets: int,
    bias_tokens: int,
    bias_total: int,
    bias: int,
    /,
) -> None: ...

_PackedWeight = tuple[int, int, int, int, int, int]  # bits, group, columns, depth, data, scales

def packs(bits: int, /) -> bool: ...
def pack(to: _PackedWeight, rows: int, row_scales: int, /) -> None: ...
def packed_linear(
    isa: int,
    dtype: int,
    out_dtype: int,
    rows: int,
    x: int,
    x_stride: int,
    weights: _PackedWeight,
    bias: int,
    out: int,
    /,
) -> None: ...
def packed_moe(
    isa: int,
    dtype: int,
    tokens: int,
    top_k: int,
    experts: int,
    d: int,
    f: int,
    x: int,
    x_stride: int,
    chosen: int,
    weights: int,
    gate_up: _PackedWeight,
    down: _PackedWeight,
    out: int,
    /,
) -> None: ...

# the weight's variant, that of what surrounds it, whether it is packed, the weight (bits 0: as in a checkpoint)
NativeMatrix = tuple[int, int, bool, _PackedWeight]

class Program:
    def __init__(self, positions: int, /) -> None: ...
    def buffer(self, bytes: int, /) -> int: ...
    def embed(self, dtype: int, vocab: int, d: int, table: int, out: int, /) -> None: ...
    def norm(
        self,
        isa: int,
        dtype: int,
        d: int,
        x: int,
        x_at: int,
        x_width: int,
        residual: int,
        weight: int,
        eps: float,
        out: int,
        /,
    ) -> None: ...
    def linear(self, dtype: int, out_dtype: int, matrix: NativeMatrix, x: int, bias: int, out: int, /) -> None: ...
    def silu_mul(self, isa: int, dtype: int, f: int, x: int, out: int, /) -> None: ...
    def gqa(
        self,
        variants: tuple[int, int, int, int],
        dtype: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        q_norm: int,
        k_norm: int,
        eps: float,
        scale: float,
        cos_sin: int,
        layer: int,
        side: int,
        qkv: int,
        q: int,
        out: int,
        /,
    ) -> None: ...
    def mla(
        self,
        variants: tuple[int, ...],
        dtype: int,
        shape: tuple[int, int, int, int, int],
        interleaved: bool,
        scale: float,
        w_uk: int,
        w_uv: int,
        cos_sin: int,
        down: tuple[int, int],
        layer: int,
        packed: tuple[tuple[int, int, int, int, int, int], tuple[int, int, int, int, int, int], int],
        side: int,
        buffers: tuple[int, ...],
        /,
    ) -> None: ...
    def route(
        self,
        variants: tuple[int, int],
        dtype: int,
        d: int,
        weight: int,
        bias: int,
        counts: tuple[int, int, int, int],
        flags: tuple[bool, bool, bool],
        scale: float,
        buffers: tuple[int, int, int, int, int],
        /,
    ) -> None: ...
    def experts(
        self,
        dtype: int,
        gate_up: NativeMatrix,
        down: NativeMatrix,
        counts: tuple[int, int, int, int],
        buffers: tuple[int, int, int, int],
        /,
    ) -> None: ...
    def add(self, isa: int, dtype: int, width: int, a: int, b: int, out: int, /) -> None: ...
    def take(self, moves: list[tuple[int, int, int]], /) -> None: ...
    def run(
        self,
        batch: tuple[int, int, int, int, int, int, int],
        tokens: int,
        rows: int,
        decodes: int,
        sampled: int,
        token_ids: int,
        positions: int,
        cache_slots: int,
        sample_rows: int,
        caches: list[int],
        blocks: int,
        block_tokens: int,
        logits: int,
        /,
    ) -> None: ...

def finite_rows(rows: int, vocab: int, logits: int, stride: int, finite: int, /) -> None: ...
def head_product(
    isa: int,
    dtype: int,
    absorbs: bool,
    tokens: int,
    heads: int,
    depth: int,
    width: int,
    x: tuple[int, int, int],
    w: int,
    out: tuple[int, int, int],
    /,
) -> None: ...

class HostStep:
    """One step's inputs; csrc/host_step.hpp says in which order the views hold what."""

    @property
    def tokens(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def decodes(self) -> int: ...
    @property
    def sampled(self) -> int: ...
    @property
    def fed(self) -> int: ...
    @property
    def chunk_max(self) -> int: ...
    @property
    def start_min(self) -> int: ...
    @property
    def context_max(self) -> int: ...
    @property
    def special(self) -> bool: ...
    def longs(self) -> npt.NDArray[np.int64]: ...
    def ints(self) -> npt.NDArray[np.int32]: ...
    def floats(self) -> npt.NDArray[np.float32]: ...

class HostSteps:
    def __init__(
        self,
        table: tuple[int, int, int, int],
        settings: tuple[int, ...],
        caches: list[int],
        blocks: int,
        last_token: int,
        /,
    ) -> None: ...
    def make(
        self,
        slots: npt.NDArray[np.int32],
        starts: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        samples: npt.NDArray[np.uint8],
        feedback: npt.NDArray[np.uint8],
        token_ids: npt.NDArray[np.uint32],
        decodes: int,
        /,
    ) -> HostStep: ...
    def run(
        self, program: Program, sampler: int, vocab: int, step: HostStep, /
    ) -> tuple[npt.NDArray[np.uint32], list[int] | None]: ...
