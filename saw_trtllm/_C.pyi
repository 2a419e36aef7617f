"""The kernels on addresses: checks nothing; :mod:`saw_trtllm.ops` does. Launches return a ``cudaError_t``."""

from typing import ClassVar

from typing_extensions import CapsuleType

FORMAT_VERSION: int
KERNELS_VERSION: int
ARCHITECTURES: str
MAX_VOCAB: int
SAMPLE_ROW_BYTES: int
LISTED_TOKEN_BYTES: int

class DType:
    float16: ClassVar[DType]
    bfloat16: ClassVar[DType]

class CacheType:
    int4: ClassVar[CacheType]
    unquantized: ClassVar[CacheType]
    key8_value4: ClassVar[CacheType]

class WeightType:
    int4: ClassVar[WeightType]
    fp8: ClassVar[WeightType]

class PagedPool:
    def __init__(
        self,
        *,
        base: int,
        block_offsets: int,
        max_blocks_per_seq: int,
        layer: int,
        num_kv_heads: int,
        tokens_per_block: int,
        row_bytes: int,
    ) -> None: ...

def philox_uniform(seed: int, index: int) -> float: ...
def row_bytes(cache: CacheType, head_dim: int) -> int: ...
def key_row_bytes(cache: CacheType, head_dim: int) -> int: ...
def error_string(code: int) -> str: ...
def dlpack_view(
    capsule: CapsuleType,
) -> tuple[int, tuple[int, ...], tuple[int, ...] | None, tuple[int, int]]: ...
def gemm(
    *,
    x: int,
    weight: int,
    gate: int,
    y: int,
    num_rows: int,
    in_features: int,
    out_features: int,
    dtype: DType,
    wide: bool,
    device: int,
    stream: int,
) -> int: ...
def rotate_quantize_kv(
    *,
    qkv: int,
    cos_sin: int,
    position_ids: int,
    last_token_ids: int,
    sequence_length: int,
    k_center: int,
    k_frame: int,
    q_frame: int,
    q_out: int,
    k_out: int,
    v_out: int,
    pool: PagedPool,
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    head_dim: int,
    hadamard_order: int,
    rotate_v: bool,
    range_factor: float,
    dtype: DType,
    cache: CacheType,
    device: int,
    stream: int,
) -> int: ...
def decode_attention(
    *,
    q: int,
    out: int,
    sequence_length: int,
    sinks: int,
    pool: PagedPool,
    workspace: int,
    num_sequences: int,
    num_heads: int,
    head_dim: int,
    window: int,
    softmax_scale: float,
    softcap: float,
    dtype: DType,
    cache: CacheType,
    device: int,
    stream: int,
) -> int: ...
def prefill_attention(
    *,
    q: int,
    k: int,
    v: int,
    out: int,
    last_token_ids: int,
    sequence_length: int,
    sinks: int,
    pool: PagedPool,
    num_tokens: int,
    num_sequences: int,
    num_heads: int,
    head_dim: int,
    window: int,
    softmax_scale: float,
    softcap: float,
    dtype: DType,
    cache: CacheType,
    device: int,
    stream: int,
) -> int: ...
def sample(
    *,
    logits: int,
    row_ends: int,
    rows: int,
    tokens: int,
    logprobs: int,
    top_tokens: int,
    top_logprobs: int,
    max_top: int,
    num_rows: int,
    vocab_size: int,
    stream: int,
) -> int: ...
def resolve_tokens(*, input_ids: int, num_tokens: int, tokens: int, stream: int) -> int: ...
def decode_workspace_bytes(max_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int: ...
def quantized_gemm(
    *,
    x: int,
    values: int,
    scales: int,
    type: WeightType,
    in_features: int,
    out_features: int,
    group: int,
    y: int,
    num_rows: int,
    dtype: DType,
    device: int,
    stream: int,
) -> int: ...
def dequantize(
    *,
    values: int,
    scales: int,
    type: WeightType,
    in_features: int,
    out_features: int,
    group: int,
    first_row: int,
    num_rows: int,
    y: int,
    dtype: DType,
    device: int,
    stream: int,
) -> int: ...
def quantize_rows(
    *, x: int, num_rows: int, width: int, dtype: DType, values: int, scales: int, device: int, stream: int
) -> int: ...
def unpack_rows(
    *,
    values: int,
    scales: int,
    type: WeightType,
    in_features: int,
    out_features: int,
    group: int,
    first_row: int,
    num_rows: int,
    row_values: int,
    row_scales: int,
    device: int,
    stream: int,
) -> int: ...
def rms_norm(
    *,
    x: int,
    residual: int,
    weight: int,
    y: int,
    sum: int,
    num_rows: int,
    num_heads: int,
    num_normed: int,
    width: int,
    epsilon: float,
    dtype: DType,
    device: int,
    stream: int,
) -> int: ...
def silu_mul(*, a: int, b: int, y: int, count: int, dtype: DType, device: int, stream: int) -> int: ...

MAX_RANKS: int

class Ranks:
    def __init__(self, *, rank: int, peers: list[int], size: int, nccl: int, one_shot_bytes: int) -> None: ...

def all_reduce_buffer_bytes(size: int) -> int: ...
def set_ranks(*, device: int, ranks: Ranks | None) -> int: ...
def all_reduce_norm(
    *,
    ranks: Ranks,
    x: int,
    residual: int,
    weight: int,
    y: int,
    sum: int,
    num_rows: int,
    width: int,
    epsilon: float,
    dtype: DType,
    device: int,
    stream: int,
) -> int: ...
def all_reduce(*, ranks: Ranks, x: int, y: int, count: int, dtype: DType, device: int, stream: int) -> int: ...
def all_gather(
    *, parts: int, out: int, num_ranks: int, num_rows: int, width: int, out_width: int, device: int, stream: int
) -> int: ...
def lookup(
    *, table: int, rows: int, out: int, num_tokens: int, num_rows: int, width: int, device: int, stream: int
) -> int: ...
