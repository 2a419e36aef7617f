"""What saw_trtllm.ops checks before a launch, and what it launches with: no GPU needed."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from saw_trtllm import format, ops
from saw_trtllm.errors import BackendUnavailableError, KernelError, OpError
from saw_trtllm.format import KVFormat
from saw_trtllm.ops import arrays as device_array
from tests.support import ROOT
from tests.support.frames import random_frames, unpack_frame

TYPESTR = {"float16": "<f2", "bfloat16": "<V2", "float32": "<f4", "float64": "<f8"}
TYPESTR |= {"int32": "<i4", "int64": "<i8", "uint8": "|u1"}
HEADS, KV_HEADS, TOKENS, SEQUENCES = 8, 2, 11, 3


class Fake:
    """An array on a GPU that is not there."""

    def __init__(self, dtype: str, *shape: int, address: int = 0x7F0000000000, strides: tuple[int, ...] | None = None):
        self.__cuda_array_interface__ = {
            "typestr": TYPESTR[dtype],
            "shape": shape,
            "strides": strides,
            "data": (address, False),
            "version": 3,
        }


@dataclass
class FakeKernels:
    """Stands in for saw_trtllm._C and keeps what it was called with."""

    code: int = 0
    calls: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    DType = SimpleNamespace(float16="float16", bfloat16="bfloat16")
    CacheType = SimpleNamespace(int4="int4", unquantized="unquantized", key8_value4="key8_value4")
    PagedPool = SimpleNamespace
    MAX_VOCAB = 1 << 18

    def rotate_quantize_kv(self, **kwargs: Any) -> int:
        self.calls.append(("rotate_quantize_kv", kwargs))
        return self.code

    def decode_attention(self, **kwargs: Any) -> int:
        self.calls.append(("decode_attention", kwargs))
        return self.code

    def prefill_attention(self, **kwargs: Any) -> int:
        self.calls.append(("prefill_attention", kwargs))
        return self.code

    def rms_norm(self, **kwargs: Any) -> int:
        self.calls.append(("rms_norm", kwargs))
        return self.code

    def silu_mul(self, **kwargs: Any) -> int:
        self.calls.append(("silu_mul", kwargs))
        return self.code

    def gemm(self, **kwargs: Any) -> int:
        self.calls.append(("gemm", kwargs))
        return self.code

    def lookup(self, **kwargs: Any) -> int:
        self.calls.append(("lookup", kwargs))
        return self.code

    def sample(self, **kwargs: Any) -> int:
        self.calls.append(("sample", kwargs))
        return self.code

    def decode_workspace_bytes(self, max_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
        return 1000 * max_sequences

    def error_string(self, code: int) -> str:
        return f"cudaError{code}"


@pytest.fixture
def fake(monkeypatch) -> FakeKernels:
    kernels = FakeKernels()
    operations = ("gemm", "lookup", "paged_attention", "rms_norm", "rotate_quantize_kv", "sample", "silu_mul")
    for module in ("arrays", "pool", *operations):
        monkeypatch.setattr(sys.modules[f"saw_trtllm.ops.{module}"], "kernels", lambda: kernels)
    return kernels


def write_arguments(dtype: str = "float16", kv_format: KVFormat | None = None) -> dict[str, Any]:
    kv_format = kv_format or KVFormat("saw_int4", 128)
    d = kv_format.head_dim
    return {
        "qkv": Fake(dtype, TOKENS, (HEADS + 2 * KV_HEADS) * d),
        "cos_sin": Fake("float32", 4096, d // 2, 2),
        "position_ids": Fake("int32", TOKENS),
        "last_token_ids": Fake("int32", SEQUENCES),
        "sequence_length": Fake("int32", SEQUENCES),
        "pool": Fake("uint8", 9, 4, 2, KV_HEADS, 64, kv_format.row_bytes),
        "block_offsets": Fake("int32", SEQUENCES, 2, 5),
        "kv_format": kv_format,
        "layer": 1,
        "q_out": Fake(dtype, TOKENS, HEADS, d),
        "k_out": Fake(dtype, TOKENS, KV_HEADS, d),
        "v_out": Fake(dtype, TOKENS, KV_HEADS, d),
        "k_center": Fake("float32", KV_HEADS, d),
        "k_frame": Fake("float16", KV_HEADS, 2, d, d),
        "q_frame": Fake("float16", KV_HEADS, 2, d, d, address=0x7E0000000000),
    }


def decode_arguments() -> dict[str, Any]:
    return {
        "q": Fake("bfloat16", SEQUENCES, HEADS, 128),
        "sequence_length": Fake("int32", SEQUENCES),
        "pool": Fake("uint8", 9, 4, 2, KV_HEADS, 64, 68),
        "block_offsets": Fake("int32", SEQUENCES, 2, 5),
        "kv_format": KVFormat("saw_int4", 128),
        "layer": 3,
        "out": Fake("bfloat16", SEQUENCES, HEADS, 128),
        "workspace": Fake("uint8", 3000),
    }


def prefill_arguments() -> dict[str, Any]:
    return {
        "q": Fake("bfloat16", TOKENS, HEADS, 128),
        "k": Fake("bfloat16", TOKENS, KV_HEADS, 128),
        "v": Fake("bfloat16", TOKENS, KV_HEADS, 128),
        "last_token_ids": Fake("int32", SEQUENCES),
        "sequence_length": Fake("int32", SEQUENCES),
        "pool": Fake("uint8", 9, 4, 2, KV_HEADS, 64, 68),
        "block_offsets": Fake("int32", SEQUENCES, 2, 5),
        "kv_format": KVFormat("saw_int4", 128),
        "layer": 3,
        "out": Fake("bfloat16", TOKENS, HEADS, 128),
    }


def norm_arguments() -> dict[str, Any]:
    x, residual, y, sum_out = (Fake("bfloat16", TOKENS, 6, 128, address=4096 * i) for i in range(1, 5))
    weight = Fake("float32", 5, 128, address=4096 * 5)
    return {"x": x, "weight": weight, "y": y, "epsilon": 1e-5, "residual": residual, "sum_out": sum_out}


def gate_arguments() -> dict[str, Any]:
    return {name: Fake("float16", TOKENS, 96, address=4096 * i) for i, name in enumerate(("a", "b", "y"), 1)}


def lookup_arguments() -> dict[str, Any]:
    table, out = (Fake("float16", n, 96, address=4096 * n) for n in (320, TOKENS))
    return {"table": table, "rows": Fake("int32", TOKENS), "out": out}


def gemm_arguments() -> dict[str, Any]:
    x, y = Fake("bfloat16", TOKENS, 96, address=4096), Fake("bfloat16", TOKENS, 36, address=4 * 4096)
    weight, gate = (Fake("bfloat16", 36, 96, address=4096 * i) for i in (2, 3))
    return {"x": x, "weight": weight, "gate": gate, "y": y}


def sample_arguments() -> dict[str, Any]:
    kinds = {
        "logits": ("float32", 40, 1001),
        "rows": ("uint8", 96 * SEQUENCES),
        "tokens": ("int32", SEQUENCES),
        "logprobs": ("float64", SEQUENCES),
        "top_tokens": ("int32", SEQUENCES, 20),
        "top_logprobs": ("float64", SEQUENCES, 20),
        "row_ends": ("int32", SEQUENCES),
    }
    return {name: Fake(*kind, address=4096 * i) for i, (name, kind) in enumerate(kinds.items(), 1)}


ARGUMENTS = {
    ops.sample: sample_arguments,
    ops.rms_norm: norm_arguments,
    ops.silu_mul: gate_arguments,
    ops.lookup: lookup_arguments,
    ops.gemm: gemm_arguments,
    ops.rotate_quantize_kv: write_arguments,
    ops.decode_attention: decode_arguments,
    ops.prefill_attention: prefill_arguments,
}


def test_rotate_quantize_kv_launches_with_what_the_arrays_say(fake):
    ops.rotate_quantize_kv(**write_arguments("bfloat16"), stream=77)
    ((name, call),) = fake.calls
    assert name == "rotate_quantize_kv"
    assert (call["num_tokens"], call["num_sequences"], call["num_heads"]) == (TOKENS, SEQUENCES, HEADS)
    assert (call["head_dim"], call["hadamard_order"], call["rotate_v"]) == (128, 128, True)
    assert (call["dtype"], call["cache"], call["stream"], call["device"]) == ("bfloat16", "int4", 77, -1)
    pool = vars(call["pool"])
    assert (pool["layer"], pool["num_kv_heads"], pool["tokens_per_block"], pool["row_bytes"]) == (1, KV_HEADS, 64, 68)
    assert pool["max_blocks_per_seq"] == 5


def test_keys_of_8_bits_are_a_cache_of_their_own(fake):
    """The pool has another shape: from it come the heads and the blocks, and V's rows are the pool's."""
    kv_format = KVFormat("saw_k8v4", 128)
    pool = Fake("uint8", *kv_format.pool_shape(9, 4, KV_HEADS, 64))
    ops.rotate_quantize_kv(**write_arguments(kv_format=kv_format) | {"pool": pool})
    ops.decode_attention(**decode_arguments() | {"pool": pool, "kv_format": kv_format})
    for _, call in fake.calls:
        assert call["cache"] == "key8_value4"
        found = vars(call["pool"])
        assert (found["num_kv_heads"], found["tokens_per_block"], found["row_bytes"]) == (KV_HEADS, 64, 68)
    narrow = write_arguments(kv_format=KVFormat("saw_int4", 128))["pool"]
    with pytest.raises(OpError, match="pool has shape"):
        ops.rotate_quantize_kv(**write_arguments(kv_format=kv_format) | {"pool": narrow})
    other = KVFormat("saw_k8v4", 128, hadamard_order=64)
    with pytest.raises(OpError, match=r"hadamard_order 64, and saw_k8v4 .*: it must be 128"):
        ops.rotate_quantize_kv(**write_arguments(kv_format=other) | {"pool": pool})


def test_optional_tensors_are_null(fake):
    arguments = write_arguments() | dict.fromkeys(("k_out", "v_out", "k_center", "k_frame", "q_frame"))
    ops.rotate_quantize_kv(**arguments)
    ((_, call),) = fake.calls
    assert (call["k_out"], call["v_out"], call["k_center"], call["stream"]) == (0, 0, 0, 0)
    assert (call["k_frame"], call["q_frame"]) == (0, 0)


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_packed_frame_is_the_frame(head_dim):
    """Each number is where the docstring says, in 22 bits: twice the 11 of fp16."""
    frame, _ = random_frames((3,), head_dim)
    packed = ops.pack_frame(frame)
    assert (packed.dtype, packed.shape) == (np.float16, (3, 2, head_dim, head_dim))
    np.testing.assert_allclose(unpack_frame(packed), frame, rtol=2**-22, atol=2**-36)


@pytest.mark.parametrize("value", [7e4, -np.inf, np.nan])
def test_a_frame_beyond_fp16_is_rejected(value):
    frame = np.zeros((1, 64, 64), np.float32)
    frame[0, 3, 4] = value
    with pytest.raises(OpError, match=r"a frame holds a number of magnitude .*: it must be finite and fit float16"):
        ops.pack_frame(frame)


def test_unquantized_cache(fake):
    kv_format = KVFormat("fp16", 64, dtype="bfloat16")
    with pytest.raises(OpError, match="given with kv fp16, which has no frames: leave them out"):
        ops.rotate_quantize_kv(**write_arguments("bfloat16", kv_format))
    frames = {"k_frame": None, "q_frame": None}
    ops.rotate_quantize_kv(**write_arguments("bfloat16", kv_format) | frames)
    assert fake.calls[0][1]["cache"] == "unquantized"
    with pytest.raises(OpError, match="qkv has dtype float16 and kv_format stores rows of bfloat16"):
        ops.rotate_quantize_kv(**write_arguments("float16", kv_format) | frames)


def test_decode_launches_with_what_the_arrays_say(fake):
    ops.decode_attention(**decode_arguments(), window=7, softcap=30.0)
    ((name, call),) = fake.calls
    assert name == "decode_attention"
    assert (call["num_sequences"], call["num_heads"], call["head_dim"]) == (SEQUENCES, HEADS, 128)
    assert (call["window"], call["softcap"], call["sinks"]) == (7, 30.0, 0)
    assert call["softmax_scale"] == pytest.approx(128**-0.5)


def test_prefill_launches_with_what_the_arrays_say(fake):
    ops.prefill_attention(**prefill_arguments(), window=7, sinks=Fake("float32", HEADS))
    ((name, call),) = fake.calls
    assert name == "prefill_attention"
    assert (call["num_tokens"], call["num_sequences"], call["num_heads"]) == (TOKENS, SEQUENCES, HEADS)
    assert (call["window"], call["softcap"], call["cache"], call["dtype"]) == (7, 0.0, "int4", "bfloat16")
    assert call["sinks"] == 0x7F0000000000


BAD_WRITES = {
    "dtype": ({"qkv": Fake("float32", TOKENS, 1536)}, "qkv has dtype float32: it must be float16 or bfloat16"),
    "mixed dtypes": ({"q_out": Fake("bfloat16", TOKENS, HEADS, 128)}, "q_out has dtype bfloat16"),
    "int64 lengths": ({"sequence_length": Fake("int64", SEQUENCES)}, "sequence_length has dtype int64"),
    "rank": ({"qkv": Fake("float16", TOKENS, 12, 128)}, r"qkv has shape \[11, 12, 128\]"),
    "heads": ({"qkv": Fake("float16", TOKENS, 1536 - 128)}, "qkv has 1408 channels"),
    "too narrow": ({"qkv": Fake("float16", TOKENS, 512)}, "qkv has 512 channels"),
    "positions": ({"position_ids": Fake("int32", TOKENS - 1)}, r"position_ids has shape \[10\]: it must be \[11\]"),
    "angles": ({"cos_sin": Fake("float32", 4096, 128)}, r"cos_sin has shape .* \[num_positions, 64, 2\]"),
    "sequences": ({"last_token_ids": Fake("int32", 4)}, r"last_token_ids has shape \[4\]: it must be \[3\]"),
    "table": ({"block_offsets": Fake("int32", 1, SEQUENCES, 2, 5)}, "block_offsets has shape"),
    "row bytes": ({"pool": Fake("uint8", 9, 4, 2, KV_HEADS, 64, 72)}, r"pool has shape .* tokens_per_block, 68\]"),
    "block size": ({"pool": Fake("uint8", 9, 4, 2, KV_HEADS, 48, 68)}, "pool has blocks of 48 tokens"),
    "layer": ({"layer": 4}, "layer is 4: pool has layers 0 to 3"),
    "centre": ({"k_center": Fake("float32", HEADS, 128)}, "k_center has shape"),
    "one frame": ({"q_frame": None}, "q_frame is None: k_frame and q_frame belong together, so give both or neither"),
    "a frame's heads": ({"k_frame": Fake("float16", HEADS, 2, 128, 128)}, r"k_frame has shape .* \[2, 2, 128, 128\]"),
    "a frame's dtype": ({"q_frame": Fake("float32", KV_HEADS, 2, 128, 128)}, "q_frame has dtype float32"),
    "strides": ({"qkv": Fake("float16", TOKENS, 1536, strides=(6144, 2))}, "qkv is not contiguous"),
    "alignment": ({"qkv": Fake("float16", TOKENS, 1536, address=0x1008)}, "qkv begins at address 0x1008"),
    "integers": ({"position_ids": Fake("int32", TOKENS, address=0x1002)}, "position_ids begins at address 0x1002"),
    "no array": ({"qkv": [1, 2]}, "qkv is a list"),
    "numpy": ({"qkv": np.zeros((TOKENS, 1536), np.float16)}, "qkv lies on the CPU"),
    "torch": ({"k_out": torch.zeros(TOKENS, KV_HEADS, 128)}, "k_out lies on the CPU"),
    "stream": ({"stream": "main"}, "stream is a str"),
}


@pytest.mark.parametrize(("change", "message"), BAD_WRITES.values(), ids=BAD_WRITES.keys())
def test_rotate_quantize_kv_rejects(change, message, fake):
    with pytest.raises(OpError, match=message):
        ops.rotate_quantize_kv(**write_arguments() | change)
    assert not fake.calls


def test_norms_launch_with_what_the_arrays_say(fake):
    ops.rms_norm(**norm_arguments(), stream=5)
    ops.rms_norm(**norm_arguments() | {"residual": None, "sum_out": None})
    (_, call), (_, plain) = fake.calls
    assert (call["num_rows"], call["num_heads"], call["num_normed"], call["width"]) == (TOKENS, 6, 5, 128)
    assert [call[name] // 4096 for name in ("x", "residual", "y", "sum", "weight")] == [1, 2, 3, 4, 5]
    assert (call["epsilon"], call["dtype"], call["stream"]) == (1e-5, "bfloat16", 5)
    assert (plain["residual"], plain["sum"]) == (0, 0)


def test_gates_and_lookups_launch_with_what_the_arrays_say(fake):
    ops.silu_mul(**gate_arguments())
    ops.lookup(**lookup_arguments())
    (_, gate), (_, lookup) = fake.calls
    assert ([gate[name] // 4096 for name in ("a", "b", "y")], gate["count"]) == ([1, 2, 3], TOKENS * 96)
    assert (lookup["num_tokens"], lookup["num_rows"], lookup["width"]) == (TOKENS, 320, 96)
    assert (lookup["table"] // 4096, lookup["out"] // 4096) == (320, TOKENS)


def test_a_product_launches_with_what_the_arrays_say(fake):
    ops.gemm(**gemm_arguments(), stream=5)
    ops.gemm(**gemm_arguments() | {"gate": None, "y": Fake("float32", TOKENS, 36)})
    (_, call), (_, plain) = fake.calls
    assert [call[name] // 4096 for name in ("x", "weight", "gate", "y")] == [1, 2, 3, 4]
    assert (call["num_rows"], call["in_features"], call["out_features"]) == (TOKENS, 96, 36)
    assert (call["dtype"], call["wide"], call["stream"]) == ("bfloat16", False, 5)
    assert (plain["gate"], plain["wide"]) == (0, True)


def test_a_choice_launches_with_what_the_arrays_say(fake):
    ops.sample(**sample_arguments(), stream=5)
    ops.sample(**sample_arguments() | {"row_ends": None, "logits": Fake("float32", SEQUENCES, 1001, address=8192)})
    (_, call), (_, plain) = fake.calls
    assert [call[name] // 4096 for name in sample_arguments()] == [1, 2, 3, 4, 5, 6, 7]
    assert (call["num_rows"], call["vocab_size"], call["stream"], call["max_top"]) == (SEQUENCES, 1001, 5, 20)
    assert (plain["row_ends"], plain["logits"]) == (0, 8192)
    arguments = {n: a for n, a in sample_arguments().items() if not n.startswith("top_")}
    ops.sample(**arguments)
    _, without = fake.calls[-1]
    assert (without["top_tokens"], without["top_logprobs"], without["max_top"]) == (0, 0, 0)


BAD_ROWS = {
    "residual without a sum": (ops.rms_norm, {"sum_out": None}, "residual is given and sum_out is not"),
    "sum without a residual": (ops.rms_norm, {"residual": None}, "sum_out is given and residual is not"),
    "more weights than heads": (ops.rms_norm, {"weight": Fake("float32", 7, 128)}, "weight has 7 rows and x has 6"),
    "no weights": (ops.rms_norm, {"weight": Fake("float32", 0, 128)}, "weight has 0 rows"),
    "another sum": (ops.rms_norm, {"sum_out": Fake("float16", TOKENS, 6, 128)}, "sum_out has dtype float16"),
    "another gate": (ops.silu_mul, {"b": Fake("float16", TOKENS, 95)}, r"b has shape \[11, 95\]"),
    "long rows": (ops.lookup, {"rows": Fake("int64", TOKENS)}, "rows has dtype int64"),
    "short rows": (ops.sample, {"rows": Fake("uint8", 95)}, r"rows has shape \[95\]: it must be \[288\]"),
    "one of two": (ops.sample, {"top_logprobs": None}, "top_tokens and top_logprobs go together: give both or neither"),
    "fewer places": (
        ops.sample,
        {"top_logprobs": Fake("float64", SEQUENCES, 19)},
        r"top_logprobs has shape \[3, 19\]: it must be \[3, 20\]",
    ),
    "a large vocabulary": (ops.sample, {"logits": Fake("float32", 40, 1 << 19)}, "a vocabulary of 524288: .* 262144"),
    "few logits": (
        ops.sample,
        {"logits": Fake("float32", SEQUENCES - 1, 9), "row_ends": None},
        "logits has 2 rows and tokens has 3: give a row each, or row_ends",
    ),
    "many rows": (ops.gemm, {"x": Fake("bfloat16", 17, 96), "y": Fake("bfloat16", 17, 36)}, "at most 16 rows"),
    "a gate with a wide y": (ops.gemm, {"y": Fake("float32", TOKENS, 36)}, "y has dtype float32"),
    "another out": (ops.lookup, {"out": Fake("float16", TOKENS, 95)}, r"out has shape .* \[11, 96\]"),
}


@pytest.mark.parametrize(("op", "change", "message"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_operations_on_rows_reject(op, change, message, fake):
    with pytest.raises(OpError, match=message):
        op(**ARGUMENTS[op]() | change)
    assert not fake.calls


BAD_DECODES = {
    "rows of another dtype": (
        {"kv_format": KVFormat("fp16", 128)},
        "q has dtype bfloat16 and kv_format stores rows of float16",
    ),
    "heads": ({"q": Fake("bfloat16", SEQUENCES, 7, 128)}, "num_heads is 7 and num_kv_heads 2"),
    "group": ({"q": Fake("bfloat16", SEQUENCES, 34, 128)}, "num_kv_heads times 1 to 16"),
    "head_dim": ({"q": Fake("bfloat16", SEQUENCES, HEADS, 64)}, r"q has shape .* \[num_sequences, num_heads, 128\]"),
    "out": ({"out": Fake("float16", SEQUENCES, HEADS, 128)}, "out has dtype float16: it must be bfloat16"),
    "workspace": ({"workspace": Fake("uint8", 2999)}, "workspace has 2999 bytes: 3 sequences need the 3000"),
    "sinks": ({"sinks": Fake("float32", 3)}, r"sinks has shape \[3\]: it must be \[8\]"),
    "window": ({"window": 0}, "window is 0"),
    "softcap": ({"softcap": -1.0}, "softcap is -1.0"),
    "scale": ({"softmax_scale": float("nan")}, "softmax_scale is nan"),
}


@pytest.mark.parametrize(("change", "message"), BAD_DECODES.values(), ids=BAD_DECODES.keys())
def test_decode_rejects(change, message, fake):
    with pytest.raises(OpError, match=message):
        ops.decode_attention(**decode_arguments() | change)
    assert not fake.calls


BAD_PREFILLS = {
    "k": ({"k": Fake("bfloat16", TOKENS, HEADS, 128)}, r"k has shape \[11, 8, 128\]: it must be \[11, 2, 128\]"),
    "v": ({"v": Fake("float16", TOKENS, KV_HEADS, 128)}, "v has dtype float16: it must be bfloat16"),
    "tokens": ({"out": Fake("bfloat16", TOKENS - 1, HEADS, 128)}, r"out has shape \[10, 8, 128\]"),
    "sequences": ({"last_token_ids": Fake("int32", 4)}, r"last_token_ids has shape \[4\]: it must be \[3\]"),
    "rows": ({"kv_format": KVFormat("fp16", 128)}, "kv_format stores rows of float16"),
    "group": ({"q": Fake("bfloat16", TOKENS, 34, 128)}, "num_kv_heads times 1 to 16"),
    "window": ({"window": -1}, "window is -1"),
    "alignment": ({"k": Fake("bfloat16", TOKENS, KV_HEADS, 128, address=0x1008)}, "k begins at address 0x1008"),
}


@pytest.mark.parametrize(("change", "message"), BAD_PREFILLS.values(), ids=BAD_PREFILLS.keys())
def test_prefill_rejects(change, message, fake):
    with pytest.raises(OpError, match=message):
        ops.prefill_attention(**prefill_arguments() | change)
    assert not fake.calls


def test_workspace_of_heads_that_no_kernel_takes(fake):
    with pytest.raises(OpError, match="head_dim is 80"):
        ops.decode_workspace_bytes(1, 8, 2, 80)
    with pytest.raises(OpError, match="num_heads is 8 and num_kv_heads 0"):
        ops.decode_workspace_bytes(1, 8, 0, 128)


@pytest.mark.parametrize("op", ARGUMENTS)
def test_a_rejected_launch_names_its_configuration(op, fake):
    fake.code = 98
    arguments = ARGUMENTS[op]()
    sizes = ".*head_dim 128, kv saw_int4, hadamard_order 128" if "kv_format" in arguments else ".*11.*(bfloat|float)16"
    sizes = ".*3 rows of 1001 logits" if op is ops.sample else sizes
    with pytest.raises(KernelError, match=rf"{op.__name__} .*cudaError98{sizes}.*: check that the kernels were built"):
        op(**arguments)


def test_without_the_module_the_error_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "saw_trtllm._C", None)
    monkeypatch.delattr("saw_trtllm._C", raising=False)
    with pytest.raises(BackendUnavailableError, match="build_scripts/kernels"):
        ops.rotate_quantize_kv(**write_arguments())


@pytest.mark.parametrize(
    ("shape", "strides", "contiguous"),
    [
        ((2, 3), None, True),
        ((2, 3), (3, 1), True),
        ((2, 3), (1, 2), False),
        ((1, 3), (99, 1), True),
        ((2, 0), (7, 7), True),
        ((2, 3), (4, 1), False),
    ],
)
def test_contiguity(shape, strides, contiguous):
    in_bytes = None if strides is None else tuple(4 * s for s in strides)
    assert device_array.DeviceArray.of("x", Fake("float32", *shape, strides=in_bytes)).contiguous is contiguous


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (None, 0),
        (5, 5),
        (SimpleNamespace(cuda_stream=6), 6),
        (SimpleNamespace(ptr=7), 7),
        (SimpleNamespace(__cuda_stream__=lambda: (0, 8)), 8),
    ],
)
def test_streams(stream, handle):
    assert device_array.stream_handle(stream) == handle


def test_arrays_on_two_gpus():
    arrays = [device_array.DeviceArray(n, 0, (1,), "int32", True, d) for n, d in (("a", 0), ("b", None), ("c", 1))]
    with pytest.raises(OpError, match="c lies on GPU 1 and a on GPU 0"):
        device_array.common_device(arrays)
    assert device_array.common_device(arrays[:2]) == 0
    assert device_array.common_device([None, arrays[1]]) == -1


def test_the_header_and_the_format_are_one():
    header = (ROOT / "plugins/include/saw/common/pool.h").read_text()

    def constant(name: str) -> float:
        expression = re.search(rf"{name} = ([^;]+);", header)[1]
        return eval(re.sub(r"0x1p-(\d+)f", r"2.0**-\1", expression))

    assert constant("kFormatVersion") == format.FORMAT_VERSION
    assert constant("kMinScale") == format.MIN_SCALE
    assert constant("kTailBytes") == format.ROW_TAIL_BYTES
    for head_dim in format.HEAD_DIMS:
        kv_format = KVFormat("saw_k8v4", head_dim)
        for name, row_bytes in (("int4", kv_format.row_bytes), ("int8", kv_format.k_row_bytes)):
            row = re.search(rf"{name}_row_bytes\(int head_dim\) \{{ return ([^;]+);", header)[1]
            expression = row.replace("head_dim", str(head_dim)).replace("kTailBytes", str(format.ROW_TAIL_BYTES))
            assert eval(expression.replace("/", "//")) == row_bytes


def test_the_built_module_has_the_same_rows():
    module = pytest.importorskip("saw_trtllm._C", reason="saw_trtllm._C is not built")
    assert module.FORMAT_VERSION == format.FORMAT_VERSION
    for head_dim in format.HEAD_DIMS:
        assert module.row_bytes(module.CacheType.int4, head_dim) == KVFormat("int4", head_dim).row_bytes
        assert module.row_bytes(module.CacheType.unquantized, head_dim) == KVFormat("fp16", head_dim).row_bytes
        wide = KVFormat("saw_k8v4", head_dim)
        assert module.row_bytes(module.CacheType.key8_value4, head_dim) == wide.row_bytes
        assert module.key_row_bytes(module.CacheType.key8_value4, head_dim) == wide.k_row_bytes
