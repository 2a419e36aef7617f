"""The TensorRT plugins, driven through both interfaces without TensorRT: its headers are enough.

The kernels are stand-ins that write down what they are called with, so no GPU is needed either.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from ctypes import CDLL, c_int, c_size_t
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from saw_trtllm.format import FORMAT_VERSION, HEAD_DIMS, KVFormat, hadamard_orders
from tests.support import plugin_library as lib
from tests.support.plugin_library import (
    ALL_GATHER,
    ALL_REDUCE,
    ATTENTION,
    BF16,
    FLOAT,
    GEMM,
    HALF,
    INT32,
    INT64,
    LINEAR,
    LOOKUP,
    NAMES,
    QUANTIZED_GEMM,
    RMS_NORM,
    SILU_MUL,
    WRITE,
)

if lib.missing():
    pytest.skip(lib.missing(), allow_module_level=True)

H, HKV, D, BLOCK = 8, 2, 128, 32
MAX_BLOCKS = 7
COMMON = {
    "layer_idx": 1,
    "num_heads": H,
    "num_kv_heads": HKV,
    "head_dim": D,
    "tokens_per_block": BLOCK,
    "dtype": "float16",
    "kv": "saw_int4",
}
FIELDS = {
    WRITE: COMMON | {"hadamard_order": 128},
    ATTENTION: COMMON,
    GEMM: {"dtype": "float16", "in_features": 64, "out_features": 24, "output_dtype": "float32"},
    QUANTIZED_GEMM: {
        "dtype": "float16",
        "in_features": 144,
        "out_features": 24,
        "weight_type": "int4",
        "group_size": 64,
    },
    LOOKUP: {"dtype": "float16", "vocab_size": 300, "hidden_size": 64},
    RMS_NORM: {"dtype": "float16", "hidden_size": 64, "epsilon": 0.125},
    SILU_MUL: {"dtype": "float16", "hidden_size": 64},
    ALL_REDUCE: {"dtype": "float16", "hidden_size": 64, "num_ranks": 2},
    ALL_GATHER: {"in_features": 102, "out_features": 203, "num_ranks": 2},
}
OPTIONAL = {
    WRITE: {"rotate_v": 1, "range_factor": 0.875, "use_k_center": 1, "use_k_frame": 1, "use_q_frame": 1},
    ATTENTION: {"softmax_scale": 0.125, "softcap": 30.0, "window": 100, "use_sinks": 1},
    GEMM: {"use_gate": 1, "output_dtype": "float16"},
    QUANTIZED_GEMM: {"quantize_input": 0},
    LOOKUP: {},
    RMS_NORM: {"use_residual": 1, "num_heads": 1, "num_normed": 1},
    SILU_MUL: {},
    ALL_REDUCE: {"use_norm": 1, "epsilon": 0.125},
    ALL_GATHER: {},
}

PLUGINS = [WRITE, ATTENTION]


CASES = [(folder, interface) for folder in lib.include_dirs() for interface in lib.interfaces(folder)]


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    @cache
    def build_(include_dir: Path) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("plugins")
        driver = lib.build_driver(include_dir, folder)
        library = lib.recording_library(include_dir)
        return SimpleNamespace(driver=driver, library=library, creators=lib.creators(driver, library))

    return build_


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{lib.tensorrt_major(case[0])}-{case[1]}")
def case(request, build):
    """The plugins for a TensorRT, and the interface that a test drives."""
    include_dir, interface = request.param
    return build(include_dir), interface


@pytest.fixture
def built(case):
    case[0].driver.take_messages()
    lib.recorded_calls(case[0].library)
    return case[0]


@pytest.fixture
def interface(case):
    return case[1]


@pytest.fixture
def make(built, interface):
    def make_(name: str, **changes: Any) -> Any:
        fields = {k: v for k, v in (FIELDS[name] | changes).items() if v is not None}
        return built.creators[interface, name].create(lib.to_fields(fields))

    return make_


@pytest.fixture
def said(built):
    return lambda: "\n".join(built.driver.take_messages())


def address_type(built) -> int:
    return INT64 if built.driver.TENSORRT[0] >= 10 else INT32


def pointer_shape(built, pools: int) -> list[int]:
    return [pools, 2] if built.driver.TENSORRT[0] >= 10 else [pools, 2, 2]


class StepOf:
    """A step on the host: what lies on a GPU is an address that nobody reads."""

    def __init__(self, prefills: list[int], decodes: int, *, pools: int = 1, layers: int = 3) -> None:
        self.tokens = sum(prefills) + decodes
        self.sequences = len(prefills) + decodes
        self.pools, self.layers = pools, layers
        self.request_types = np.array([0] * len(prefills) + [1] * decodes, np.int32)
        self.pointers = np.arange(1, 2 * pools + 1, dtype=np.int64) * 0x7F0000000000
        self.mapping = np.array([[i % pools, i // pools] for i in range(layers)], np.int32)
        self.windows = np.full(layers, 4096, np.int32)

    def pool_inputs(self, built) -> list[tuple[int, list[int]]]:
        return [
            (0x6000, [self.pools, self.sequences, 2, MAX_BLOCKS]),
            (self.pointers.ctypes.data, pointer_shape(built, self.pools)),
            (self.mapping.ctypes.data, [self.layers, 2]),
        ]

    def inputs(self, built, name: str, optional: bool = False) -> list[tuple[int, list[int]]]:
        if name == WRITE:
            inputs = [
                (0x1000, [self.tokens, (H + 2 * HKV) * D]),
                (0x2000, [self.tokens]),
                (0x3000, [self.sequences]),
                (0x4000, [self.sequences]),
                *self.pool_inputs(built),
                (0x7000, [1, 4096 * D]),
            ]
            constants = [(0x8000, [HKV, D]), (0x8100, [HKV, 2, D, D]), (0x8200, [HKV, 2, D, D])]
            return [*inputs, *constants] if optional else inputs
        inputs = [
            (0x10000, [self.tokens, H * D]),
            (0x20000, [self.tokens, HKV * D]),
            (0x30000, [self.tokens, HKV * D]),
            (0x40000, [self.sequences, HKV]),
            (self.request_types.ctypes.data, [self.sequences]),
            (0x3000, [self.sequences]),
            (0x4000, [self.sequences]),
            *self.pool_inputs(built),
            (self.windows.ctypes.data, [self.layers]),
        ]
        return [*inputs, (0x9000, [H])] if optional else inputs

    def run(self, built, plugin, name: str, *, change=None, optional: bool = False) -> int:
        inputs = self.inputs(built, name, optional)
        for index, value in (change or {}).items():
            inputs[index] = value
        outputs = [0xA0000, 0xB0000, 0xC0000, 0xD0000] if name == WRITE else [0xE0000]
        return plugin.enqueue(inputs, outputs, 0xF0000, 0x55)


def test_creators(built):
    identities = {c.identity() for c in built.creators.values()}
    major = built.driver.TENSORRT[0]
    expected = set()
    for name in NAMES:
        if major >= 10:
            expected.add(("V3", name, str(FORMAT_VERSION), "saw"))
        if major < 10:
            expected.add(("V2", name, str(FORMAT_VERSION), "saw"))
        if major == 10:
            expected.add(("V2", name, f"{FORMAT_VERSION}-v2", "saw"))
    assert identities == expected


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_lists_the_fields_and_the_tensors(name, built, interface, make):
    text = (lib.SOURCES / f"{lib.STEMS[name]}.md").read_text()
    section = {title: re.findall(r"^\| `(\w+)`", body, re.M) for title, body in _sections(text)}
    advertised = [field[0] for field in built.creators[interface, name].fields()]
    assert section["Fields"] == advertised
    # A plugin names its inputs when it is given too few.
    make(name, **OPTIONAL[name]).on_shape_change([])
    plugin = make(name, **OPTIONAL[name])
    with pytest.raises(RuntimeError):
        plugin.output_shapes([])
    (message, *_) = built.driver.take_messages()[-1:]
    assert message.split("connect ")[-1].split(", ") == section["Inputs"]
    assert len(section["Outputs"]) == plugin.num_outputs()


def _sections(text: str) -> list[tuple[str, str]]:
    parts = re.split(r"^## (.+)$", text, flags=re.M)
    return list(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_outputs(head_dim, dtype, built, make):
    if dtype == "bfloat16" and built.driver.TENSORRT[0] < 10:
        pytest.skip("TensorRT 8.6 has no bfloat16")
    activation = HALF if dtype == "float16" else BF16
    order = hadamard_orders(head_dim)[-1]
    write = make(WRITE, dtype=dtype, head_dim=head_dim, hadamard_order=order)
    step = StepOf([5, 3], 4)
    shapes = [shape for _, shape in step.inputs(built, WRITE)]
    kv = HKV * head_dim
    assert write.output_shapes(shapes) == [[12, H * head_dim], [12, kv], [12, kv], [6, HKV]]
    assert write.output_types(len(shapes)) == [activation] * 3 + [INT32]
    attention = make(ATTENTION, dtype=dtype, head_dim=head_dim)
    shapes = [shape for _, shape in step.inputs(built, ATTENTION)]
    assert attention.output_shapes(shapes) == [[12, H * head_dim]]
    assert attention.output_types(len(shapes)) == [activation]


@pytest.mark.parametrize("name", NAMES)
def test_one_combination_of_types(name, built, make):
    plugin = make(name, **OPTIONAL[name])
    count = 2 + (name in (RMS_NORM, GEMM, QUANTIZED_GEMM, ALL_REDUCE)) - (name == ALL_GATHER)
    count = len(StepOf([1], 1).inputs(built, name, optional=True)) if name in PLUGINS else count
    outputs = plugin.num_outputs()
    address = address_type(built)
    wanted = {
        WRITE: [HALF, *[INT32] * 4, address, INT32, FLOAT, FLOAT, HALF, HALF, HALF, HALF, HALF, INT32],
        ATTENTION: [HALF] * 3 + [INT32] * 5 + [address, INT32, INT32, FLOAT, HALF],
        GEMM: [HALF, HALF, HALF, HALF],
        QUANTIZED_GEMM: [HALF, INT32, FLOAT, HALF],
        LOOKUP: [INT32, HALF, HALF],
        RMS_NORM: [HALF, FLOAT, HALF, HALF, HALF],
        SILU_MUL: [HALF, HALF, HALF],
        ALL_REDUCE: [HALF, FLOAT, HALF, HALF, HALF],
        ALL_GATHER: [FLOAT, FLOAT],
    }[name]
    assert len(wanted) == count + outputs
    for position, one in enumerate(wanted):
        taken = [
            (type_, format_)
            for type_ in range(10)
            for format_ in range(3)
            if plugin.supports(position, type_, format_, count, outputs)
        ]
        assert taken == [(one, LINEAR)]


@pytest.mark.parametrize("name", PLUGINS)
def test_an_engine_keeps_every_field(name, built, interface, make):
    plugin = make(name, **OPTIONAL[name])
    data = plugin.serialized()
    again = built.creators[interface, name].deserialize(data)
    assert again.serialized() == data
    assert again.identity() == plugin.identity()
    step = StepOf([5], 2)
    calls = []
    for p in (plugin, plugin.clone(), plugin.attach_to_context(), again, again.clone().attach_to_context()):
        assert step.run(built, p, name, optional=True) == 0
        calls.append(lib.recorded_calls(built.library))
    assert all(c == calls[0] for c in calls)
    assert calls[0]


@pytest.mark.parametrize("name", PLUGINS)
def test_optional_fields_have_defaults(name, built, make):
    """The same engine, whether the defaults are given or not."""
    defaults = {
        WRITE: {"rotate_v": 0, "range_factor": 1.0, "use_k_center": 0, "use_k_frame": 0, "use_q_frame": 0},
        ATTENTION: {"softmax_scale": 0.0, "softcap": 0.0, "window": 0, "use_sinks": 0},
    }[name]
    assert make(name).serialized() == make(name, **defaults).serialized()


BAD_FIELDS = [
    (WRITE, {"num_heads": None}, "field num_heads is missing"),
    (WRITE, {"hadamard_order": None}, "field hadamard_order is missing"),
    (ATTENTION, {"kv": None}, "field kv is missing"),
    (ATTENTION, {"hadamard_order": 128}, "field hadamard_order is unknown: the fields are layer_idx, num_heads"),
    (WRITE, {"format_version": 1}, "field format_version is unknown"),
    (WRITE, {"layer_idx": -1}, "layer_idx is -1"),
    (WRITE, {"num_kv_heads": 0}, "num_kv_heads is 0"),
    (WRITE, {"num_heads": 7}, "num_heads is 7 and num_kv_heads is 2"),
    (ATTENTION, {"num_heads": 34}, "num_kv_heads times 1 to 16"),
    (ATTENTION, {"head_dim": 80}, "head_dim is 80: it must be one of 64, 96, 128, 256"),
    (ATTENTION, {"tokens_per_block": 48}, "tokens_per_block is 48"),
    (WRITE, {"dtype": "float32"}, "dtype is float32: it must be float16 or bfloat16"),
    (WRITE, {"dtype": 1}, r"field dtype has PluginFieldType 5 and length 1: give text"),
    (WRITE, {"num_heads": 8.0}, r"field num_heads has PluginFieldType 1 and length 1: give one INT32"),
    (WRITE, {"range_factor": 1}, "give one FLOAT32"),
    (WRITE, {"kv": "fp8"}, "kv is fp8: it must be one of fp16, int4, saw_int4, saw_k8v4"),
    (WRITE, {"hadamard_order": 1}, "hadamard_order is 1: it must be a power of two from 16 that divides head_dim 128"),
    (WRITE, {"hadamard_order": 48}, "hadamard_order is 48"),
    (
        WRITE,
        {"kv": "saw_k8v4", "hadamard_order": 64},
        "hadamard_order is 64: kv saw_k8v4 has kernels of the largest one alone, so give 128",
    ),
    (WRITE, {"hadamard_order": 256}, "hadamard_order is 256"),
    (WRITE, {"kv": "int4"}, "hadamard_order is 128 and rotate_v 0: kv int4 has no rotation"),
    (WRITE, {"kv": "fp16", "hadamard_order": 1, "rotate_v": 1}, "kv fp16 has no rotation"),
    (WRITE, {"rotate_v": 2}, "rotate_v is 2: it must be 0 or 1"),
    (WRITE, {"use_k_center": -1}, "use_k_center is -1"),
    (WRITE, {"use_k_frame": 2, "use_q_frame": 2}, "use_k_frame is 2: it must be 0 or 1"),
    (WRITE, {"use_k_frame": 1}, "use_k_frame is 1 and use_q_frame 0: a frame of keys and one of queries come together"),
    (
        WRITE,
        {"use_k_frame": 1, "use_q_frame": 1, "kv": "fp16", "hadamard_order": 1},
        "use_k_frame is 1 and use_q_frame 1: kv fp16 has no frames",
    ),
    (WRITE, {"range_factor": 0.0}, "range_factor is 0"),
    (WRITE, {"range_factor": float("nan")}, "range_factor is nan"),
    (ATTENTION, {"softmax_scale": -1.0}, "softmax_scale is -1"),
    (ATTENTION, {"softcap": float("inf")}, "softcap is inf"),
    (ATTENTION, {"window": -4}, "window is -4"),
    (ATTENTION, {"use_sinks": 3}, "use_sinks is 3"),
    (GEMM, {"dtype": "int8"}, "dtype is int8: it must be float16 or bfloat16"),
    (GEMM, {"output_dtype": "bfloat16"}, "output_dtype is bfloat16: it must be float32 or dtype, float16"),
    (GEMM, {"use_gate": 1}, "output_dtype is float32 and use_gate 1: with a gate it must be dtype, float16"),
    (GEMM, {"in_features": 0}, "in_features is 0 and out_features 24: both must be at least 1"),
    (QUANTIZED_GEMM, {"weight_type": "int8"}, "weight_type is int8: it must be int4 or fp8"),
    (QUANTIZED_GEMM, {"group_size": 16}, "group_size is 16: it must be 128, or of int4 32 or 64"),
    (QUANTIZED_GEMM, {"quantize_input": 2}, "quantize_input is 2: it must be 0 or 1"),
    (
        QUANTIZED_GEMM,
        {"quantize_input": 1},
        "quantize_input is 1, weight_type int4 and out_features 24: it must be 0 but of fp8 and a multiple of 16",
    ),
    (QUANTIZED_GEMM, {"weight_type": "fp8"}, "group_size is 64: it must be 128, or of int4 32 or 64"),
    (
        QUANTIZED_GEMM,
        {"in_features": 24},
        "in_features is 24 and out_features 24: they must be multiples of 16 and of 8",
    ),
    (GEMM, {"weight": 1}, "the fields are dtype, in_features, out_features, output_dtype, use_gate"),
    (LOOKUP, {"hidden_size": -1}, "hidden_size is -1: it must be at least 1"),
    (LOOKUP, {"vocab_size": 0}, "vocab_size is 0: it must be at least 1"),
    (RMS_NORM, {"epsilon": -1.0}, "epsilon is -1.0+: it must be finite and at least 0"),
    (RMS_NORM, {"num_heads": 2, "num_normed": 3}, "num_heads is 2 and num_normed 3: num_normed must be from 1 to"),
    (RMS_NORM, {"use_residual": 2}, "use_residual is 2: it must be 0 or 1"),
    (LOOKUP, {"dtype": "float32"}, "dtype is float32"),
    (RMS_NORM, {"epsilon": float("inf")}, "epsilon is inf: it must be finite"),
    # Products of fields, which the kernels count in int.
    (
        WRITE,
        {"num_heads": 1 << 30, "num_kv_heads": 1 << 30},
        f"Q, K and V are {3 << 37}, and must be at most {1 << 30}",
    ),
    (ATTENTION, {"num_heads": 1 << 30, "num_kv_heads": 1 << 26}, "give smaller num_heads, num_kv_heads or head_dim"),
    (ATTENTION, {"num_heads": 1 << 17, "num_kv_heads": 1 << 17, "tokens_per_block": 128}, "the bytes of a block are"),
    (
        WRITE,
        {"num_heads": 1 << 16, "num_kv_heads": 1 << 16, "tokens_per_block": 128, "head_dim": 256, "hadamard_order": 1}
        | {"kv": "fp16"},
        f"the bytes of a block are {1 << 32}",
    ),
    (
        RMS_NORM,
        {"hidden_size": 1 << 20, "num_heads": 1 << 11},
        f"the numbers of a row are {1 << 31}, and must be at most",
    ),
    (ALL_REDUCE, {"num_ranks": 1}, "num_ranks is 1: it must be at least 2"),
    (ALL_REDUCE, {"hidden_size": 0}, "hidden_size is 0: it must be at least 1"),
    (ALL_REDUCE, {"use_norm": 2}, "use_norm is 2"),
    (ALL_REDUCE, {"use_norm": 1, "epsilon": -1.0}, "epsilon is -1.000000: it must be finite and at least 0"),
    (ALL_GATHER, {"out_features": 205}, "num_ranks times in_features at least out_features"),
    (SILU_MUL, {"hidden_size": (1 << 31) - 1}, "the numbers of a row are 2147483647"),
    (LOOKUP, {"hidden_size": (1 << 30) + 1}, "give smaller hidden_size"),
    (GEMM, {"in_features": (1 << 31) - 1}, "give smaller in_features"),
    (GEMM, {"out_features": (1 << 31) - 1}, "give smaller out_features"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_FIELDS)
def test_a_bad_field_is_rejected_with_one_sentence(name, change, message, make, built):
    assert make(name, **change) is None
    (said,) = built.driver.take_messages()
    assert said.startswith(f"{name}: ")
    assert re.search(message, said)


def test_bfloat16_needs_a_tensorrt_that_has_it(built, make, said):
    made = make(WRITE, dtype="bfloat16")
    if built.driver.TENSORRT[0] >= 10:
        assert made is not None
    else:
        assert made is None
        assert "this TensorRT does not have" in said()


def test_fields_that_come_twice_or_empty(built, interface, said):
    creator = built.creators[interface, WRITE]
    fields = lib.to_fields(FIELDS[WRITE])
    assert creator.create([*fields, fields[0]]) is None
    assert "field layer_idx is given twice" in said()
    assert creator.create([("layer_idx", lib.FIELD_INT32, None, 1), *fields[1:]]) is None
    assert "field layer_idx has PluginFieldType 5" in said()
    assert creator.create([]) is None
    assert "field layer_idx is missing" in said()


def test_text_may_end_with_a_zero(built, interface):
    fields = [
        (n, t, data + b"\0", length + 1) if t == lib.FIELD_CHAR else (n, t, data, length)
        for n, t, data, length in lib.to_fields(FIELDS[WRITE])
    ]
    assert built.creators[interface, WRITE].create(fields) is not None


@pytest.mark.parametrize("name", PLUGINS)
def test_an_engine_of_another_library_is_rejected(name, built, interface, make, said):
    creator = built.creators[interface, name]
    data = make(name).serialized()
    last = 3 if name == WRITE else 1  # two of WRITE's fields may be lacking: the test below
    if interface == "V2":
        record = 8, 48  # bytes of the header and of a field
        place = record[0] + 32  # the first field's value, after its name, type and length
        other = data[:place] + struct.pack("<i", 2) + data[place + 4 :]
        unknown = data.replace(b"head_dim", b"head_siz")
        lacking = without_last_fields(data, interface, last)
        for cut in (b"", data[:-1], data + b"\0", b"x" * len(data), data[:4] + b"\xff\xff\xff\x7f" + data[8:]):
            assert creator.deserialize(cut) is None
            assert "are not what this library writes: rebuild the engine" in said()
    else:
        assert [field[0] for field in data[:2]] == ["format_version", "workspace_bytes"]
        other = [(*data[0][:2], struct.pack("<i", 2), 1), *data[1:]]
        unknown = [("head_siz", *f[1:]) if f[0] == "head_dim" else f for f in data]
        lacking = without_last_fields(data, interface, last)
    assert creator.deserialize(lacking) is None
    field = list(OPTIONAL[name])[-last]
    assert f"the engine lacks field {field}: rebuild the engine with this library, or load" in said()
    assert creator.deserialize(other) is None
    assert "the engine stores cache format 2 and this library writes format 1: rebuild the engine" in said()
    assert creator.deserialize(unknown) is None
    assert "field head_siz is unknown: rebuild the engine with this library" in said()


def without_last_fields(data, interface: str, count: int):
    """An engine's fields but for the last ones."""
    if interface == "V2":
        (fields,) = struct.unpack("<i", data[4:8])
        return data[:4] + struct.pack("<i", fields - count) + data[8 : -48 * count]
    return data[:-count]


def test_an_engine_from_before_frames_runs(built, interface, make):
    plugin = make(WRITE, use_k_center=1)
    old = built.creators[interface, WRITE].deserialize(without_last_fields(plugin.serialized(), interface, 2))
    step = StepOf([5], 2)
    calls = []
    for p in (plugin, old):
        assert p.enqueue(step.inputs(built, WRITE, optional=True)[:9], [0xA0000, 0xB0000, 0xC0000, 0xD0000], 0, 0) == 0
        calls.append(lib.recorded_calls(built.library))
    assert calls[0] == calls[1]
    assert (calls[0][0]["k_center"], calls[0][0]["k_frame"], calls[0][0]["q_frame"]) == (0x8000, 0, 0)


@pytest.mark.parametrize(("name", "field"), [(GEMM, "use_gate"), (QUANTIZED_GEMM, "quantize_input")])
def test_an_engine_from_before_a_field_has_its_default(name, field, built, interface, make):
    now = make(name).serialized()
    before = without_last_fields(now, interface, 1)
    assert field in str(now)
    assert field not in str(before)
    assert built.creators[interface, name].deserialize(before).serialized() == now


def with_value(data, interface: str, field: str, value: int):
    """An engine's fields with another value of one."""
    if interface == "V2":
        at = data.index(field.encode()) + 32
        return data[:at] + struct.pack("<i", value) + data[at + 4 :]
    return [(*f[:2], struct.pack("<i", value), 1) if f[0] == field else f for f in data]


@pytest.mark.parametrize("less", [1, None], ids=["smaller", "negative"])
@pytest.mark.parametrize("name", NAMES)
def test_an_engine_with_too_small_a_workspace_is_rejected(name, less, built, interface, make, said):
    """An engine of a smaller GPU, or one with a negative size, which is beyond any as an unsigned number."""
    plugin = make(name)
    needed = plugin.workspace_bytes()
    given = -1 if less is None else needed - less
    other = with_value(plugin.serialized(), interface, "workspace_bytes", given)
    assert built.creators[interface, name].deserialize(other) is None
    assert f"a workspace of {given} bytes and this GPU needs {needed}: rebuild the engine on this GPU" in said()


@pytest.mark.parametrize("version", [0, -1, 1 << 30])
def test_an_engine_of_another_format_is_rejected(version, built, interface, make, said):
    other = with_value(make(WRITE).serialized(), interface, "format_version", version)
    assert built.creators[interface, WRITE].deserialize(other) is None
    assert f"the engine stores cache format {version} and this library writes format 1: rebuild" in said()


def test_an_engine_whose_products_overflow_is_rejected(built, interface, make, said):
    data = make(ATTENTION).serialized()
    for field in ("num_heads", "num_kv_heads"):
        data = with_value(data, interface, field, 1 << 30)
    assert built.creators[interface, ATTENTION].deserialize(data) is None
    assert "the numbers of a token's Q, K and V are" in said()


def test_no_workspace_is_an_error(built, make, said):
    step = StepOf([], 1)
    assert make(ATTENTION).enqueue(step.inputs(built, ATTENTION), [0xE0000], 0, 0) != 0
    assert "no workspace was asked for" in said()


def test_a_host_tensor_that_is_nowhere(built, interface, make, said):
    """While an engine is built it may be so; an engine says it."""
    step = StepOf([5], 1)
    plugin = make(ATTENTION)
    assert step.run(built, plugin, ATTENTION, change={4: (0, [2])}) == 0
    engine = built.creators[interface, ATTENTION].deserialize(plugin.serialized())
    assert step.run(built, engine, ATTENTION, change={4: (0, [2])}) != 0
    assert "input host_request_types is bound to no memory: bind a host address" in said()
    assert not lib.recorded_calls(built.library)


def test_write_launches_with_what_the_tensors_say(built, make):
    step = StepOf([5, 3], 4, pools=2)
    assert step.run(built, make(WRITE, **OPTIONAL[WRITE], layer_idx=2), WRITE, optional=True) == 0
    (call,) = lib.recorded_calls(built.library)
    assert call == {
        "op": "rotate_quantize_kv",
        "qkv": 0x1000,
        "cos_sin": 0x7000,
        "position_ids": 0x2000,
        "last_token_ids": 0x3000,
        "sequence_length": 0x4000,
        "k_center": 0x8000,
        "k_frame": 0x8100,
        "q_frame": 0x8200,
        "q_out": 0xA0000,
        "k_out": 0xB0000,
        "v_out": 0xC0000,
        "decode_counters": 0xD0000,
        **_pool(step, layer=2),
        "num_tokens": 12,
        "num_sequences": 6,
        "num_heads": H,
        "head_dim": D,
        "hadamard_order": 128,
        "rotate_v": 1,
        "range_factor": 0.875,
        "dtype": 0,
        "cache": 0,
        "stream": 0x55,
    }


def _pool(step: StepOf, layer: int, first_sequence: int = 0, kv: str = "saw_int4") -> dict[str, int]:
    pool, place = step.mapping[layer].tolist()
    rows = (pool * step.sequences + first_sequence) * 2 * MAX_BLOCKS
    return {
        "base": int(step.pointers[2 * pool]),
        "block_offsets": 0x6000 + 4 * rows,
        "max_blocks_per_seq": MAX_BLOCKS,
        "layer": place,
        "num_kv_heads": HKV,
        "tokens_per_block": BLOCK,
        "row_bytes": KVFormat(kv, D).row_bytes,
    }


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_gives_prefills_and_decodes_their_part(layer, built, make):
    step = StepOf([5, 3], 4, pools=2)
    plugin = make(ATTENTION, **OPTIONAL[ATTENTION], layer_idx=layer)
    assert step.run(built, plugin, ATTENTION, optional=True) == 0
    prefill, decode = lib.recorded_calls(built.library)
    shared = {
        "sinks": 0x9000,
        "num_heads": H,
        "head_dim": D,
        "window": 100,
        "softmax_scale": 0.125,
        "softcap": 30.0,
        "dtype": 0,
        "cache": 0,
        "stream": 0x55,
    }
    assert prefill == shared | _pool(step, layer) | {
        "op": "prefill_attention",
        "q": 0x10000,
        "k": 0x20000,
        "v": 0x30000,
        "out": 0xE0000,
        "last_token_ids": 0x3000,
        "sequence_length": 0x4000,
        "num_tokens": 8,
        "num_sequences": 2,
    }
    assert decode == shared | _pool(step, layer, first_sequence=2) | {
        "op": "decode_attention",
        "q": 0x10000 + 8 * H * D * 2,
        "out": 0xE0000 + 8 * H * D * 2,
        "sequence_length": 0x4000 + 2 * 4,
        "workspace": 0xF0000,
        "counters": 0x40000 + 2 * HKV * 4,
        "num_sequences": 4,
    }


@pytest.mark.parametrize(
    ("prefills", "decodes", "ops"),
    [
        ([7], 0, ["prefill_attention"]),
        ([], 3, ["decode_attention"]),
        ([1], 1, ["prefill_attention", "decode_attention"]),
    ],
)
def test_attention_launches_only_what_the_step_has(prefills, decodes, ops, built, make):
    assert StepOf(prefills, decodes).run(built, make(ATTENTION), ATTENTION) == 0
    assert [call["op"] for call in lib.recorded_calls(built.library)] == ops


@pytest.mark.parametrize(
    ("of_model", "of_step", "window"), [(0, 4096, 4096), (100, 4096, 100), (5000, 4096, 4096), (100, 0, 100), (0, 0, 0)]
)
def test_the_smaller_window_holds(of_model, of_step, window, built, make):
    step = StepOf([2], 1)
    step.windows[:] = [7, of_step, 9]
    assert step.run(built, make(ATTENTION, window=of_model), ATTENTION) == 0
    assert [call["window"] for call in lib.recorded_calls(built.library)] == [window, window]


@pytest.mark.parametrize(
    ("kv", "order", "cache"), [("fp16", 1, 1), ("int4", 1, 0), ("saw_int4", 64, 0), ("saw_k8v4", 128, 2)]
)
def test_kv_formats(kv, order, cache, built, make):
    step = StepOf([2], 1)
    assert step.run(built, make(WRITE, kv=kv, hadamard_order=order), WRITE) == 0
    assert step.run(built, make(ATTENTION, kv=kv), ATTENTION) == 0
    for call in lib.recorded_calls(built.library):
        assert call["cache"] == cache
        assert call["row_bytes"] == KVFormat(kv, D).row_bytes
        assert call.get("hadamard_order", order) == order


def test_the_default_scale_is_that_of_the_head(built, make):
    StepOf([], 1).run(built, make(ATTENTION), ATTENTION)
    (call,) = lib.recorded_calls(built.library)
    assert call["softmax_scale"] == pytest.approx(D**-0.5)


def test_the_workspace_holds_no_counters(make):
    """It is not zeroed: the counters are an edge from SawRotateQuantizeKV."""
    assert make(ATTENTION).workspace_bytes() == 4096 + H * D  # the recorder's, for 0 sequences
    assert make(WRITE).workspace_bytes() == 0


BAD_STEPS = [
    (WRITE, {0: (0x1000, [12, H * D])}, "input qkv has shape [12, 1024]: it must be [num_tokens, 1536]"),
    (WRITE, {1: (0x2000, [11])}, "input position_ids has shape [11]"),
    (WRITE, {3: (0x4000, [5])}, "input sequence_length has shape [5]"),
    (WRITE, {4: (0x6000, [6, 2, MAX_BLOCKS])}, "input kv_cache_block_offsets has shape [6, 2, 7]"),
    (WRITE, {4: (0x6000, [2, 6, 2, MAX_BLOCKS])}, "input host_kv_cache_pool_pointers has shape"),
    (ATTENTION, {1: (0x20000, [12, D])}, "input k has shape [12, 128]"),
    (ATTENTION, {3: (0x40000, [6, H])}, "input decode_counters has shape [6, 8]"),
    (ATTENTION, {10: (0x1, [4])}, "input host_max_attention_window_sizes has shape [4]"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_STEPS)
def test_shapes_that_do_not_fit_are_rejected(name, change, message, built, make, said):
    plugin = make(name)
    step = StepOf([5, 3], 4)
    assert step.run(built, plugin, name, change=change) != 0
    assert message in said()
    assert not lib.recorded_calls(built.library)
    shapes = [shape for _, shape in step.inputs(built, name)]
    for index, (_, shape) in change.items():
        shapes[index] = shape
    plugin.configure(shapes)
    assert message in said()
    assert plugin.configure([[-1] * len(shape) for _, shape in step.inputs(built, name)]) == 0
    assert said() == ""


def test_configure_and_shape_change_answer_with_an_error(built, interface, make, said):
    if interface == "V2":
        pytest.skip("V2 has no such answer")
    plugin = make(WRITE)
    shapes = [shape for _, shape in StepOf([5], 1).inputs(built, WRITE)]
    assert plugin.configure(shapes) == plugin.on_shape_change(shapes) == 0
    shapes[1] = [99]
    assert plugin.configure(shapes) != 0
    assert plugin.on_shape_change(shapes) != 0
    assert plugin.configure(shapes[:-1]) != 0
    assert "7 inputs are connected: connect qkv, position_ids, last_token_ids" in said()


def test_optional_inputs_must_be_connected(built, make, said):
    step = StepOf([2], 1)
    shapes = [shape for _, shape in step.inputs(built, WRITE)]
    with pytest.raises(RuntimeError):
        make(WRITE, use_k_center=1).output_shapes(shapes)
    assert "rotary_cos_sin, k_center" in said()
    with pytest.raises(RuntimeError):
        make(WRITE, use_k_frame=1, use_q_frame=1).output_shapes([*shapes, [HKV, 2, D, D]])
    assert "rotary_cos_sin, k_frame, q_frame" in said()


def corrupt(step: StepOf, **changes: Any) -> StepOf:
    for name, (index, value) in changes.items():
        getattr(step, name)[index] = value
    return step


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (ATTENTION, {"request_types": (0, 1)}, "host_request_types is 0 for sequence 1: a step has prefills (0) first"),
        (ATTENTION, {"request_types": (5, 2)}, "host_request_types is 2 for sequence 5"),
        (ATTENTION, {"request_types": (slice(0, 2), 1)}, "12 tokens, 0 prefills and 6 decodes: a decode has one token"),
        (ATTENTION, {"mapping": (1, [1, 0])}, "puts layer 1 in place 0 of pool 1: kv_cache_block_offsets has 1 pools"),
        (WRITE, {"mapping": (1, [-1, 0])}, "of pool -1"),
        (WRITE, {"pointers": (0, 0)}, "host_kv_cache_pool_pointers holds a null address"),
        (ATTENTION, {"windows": (1, -5)}, "host_max_attention_window_sizes is -5 for layer 1"),
    ],
)
def test_host_tensors_that_make_no_step_are_rejected(name, changes, message, built, make, said):
    assert corrupt(StepOf([5, 3], 4), **changes).run(built, make(name), name) != 0
    assert message in said()
    assert not lib.recorded_calls(built.library)


@pytest.mark.parametrize("name", PLUGINS)
def test_a_layer_that_the_host_tensors_lack(name, built, make, said):
    assert StepOf([5], 1, layers=3).run(built, make(name, layer_idx=3), name) != 0
    assert "layer_idx is 3: host_kv_cache_pool_mapping has 3 layers" in said()


@pytest.mark.parametrize("name", PLUGINS)
def test_a_rejected_launch_is_an_error(name, built, make, said):
    lib.recorded_calls(built.library, next_error=98)
    assert StepOf([5], 1).run(built, make(name), name) != 0
    kernel = "rotate_quantize_kv" if name == WRITE else "prefill_attention"
    assert f"{kernel} was not launched: " in said()
    lib.recorded_calls(built.library)


def test_without_tensorrt_registering_says_so(built, interface, said):
    major = built.driver.TENSORRT[0]
    assert not built.driver.Library(str(built.library)).init()
    assert f"load libnvinfer.so.{major} first" in said()


# -- weights that are inputs of plugins

LIBRARIES = ("libcublasLt.so.13", "libcublasLt.so.12")


@pytest.fixture(scope="session")
def cublas_lt(tmp_path_factory):
    """The stand-in's calls, after the next of which it fails if asked to."""
    for name in LIBRARIES:
        try:
            CDLL(name, mode=os.RTLD_NOLOAD)
        except OSError:
            continue
        pytest.skip(f"{name} is loaded already")
    path = lib.build_fake_cublas_lt(tmp_path_factory.mktemp("cublas"))
    CDLL(str(path))
    return lambda status=0: lib.recorded_calls(path, status)


def test_a_product_is_cublas_lts(cublas_lt, built, interface, make, said):
    """Rows are its columns, and the first factor is the weight, transposed; the heuristic is asked once for a size."""
    cublas_lt()
    outputs = {"V2": 24, "V3": 40}[interface]  # both know what one has asked
    made = make(GEMM, out_features=outputs)
    engine = built.creators[interface, GEMM].deserialize(made.serialized()).attach_to_context()
    assert engine.output_shapes([[12, 64], [outputs, 64]]) == [[12, outputs]]
    assert engine.output_types(2) == [FLOAT]
    workspace = engine.workspace_bytes()
    assert workspace == 32 << 20
    for plugin, rows in ((engine, 12), (engine.clone(), 12), (engine, 5)):
        assert plugin.enqueue([(0x1000, [rows, 64]), (0x2000, [outputs, 64])], [0x3000], 0x4000, 0x55) == 0
    first, *products, other, last = cublas_lt()
    assert first == {"op": "heuristic", "compute": 68, "workspace": workspace, "reductions": 2, "alignment": 16}
    assert other == first
    half, single = 2, 0
    common = {"op": "matmul", "transposed": 1, "alpha": 1, "beta": 0, "a": 0x2000, "b": 0x1000, "c": 0x3000}
    common |= {"modes": [0, 0], "scales": [0, 0]}
    common |= {"a_desc": [half, 64, outputs, 64], "workspace": 0x4000, "bytes": workspace, "stream": 0x55, "d": 0x3000}
    for rows, found in ((12, products), (5, [last])):
        sizes = {"b_desc": [half, 64, rows, 64], "d_desc": [single, outputs, rows, outputs], "algo": rows}
        assert found == [common | sizes] * len(found)
    assert len(products) == 2
    assert said() == ""


def test_an_algorithm_serves_a_few_rows_more_or_less(cublas_lt, interface, make):
    outputs = {"V2": 48, "V3": 56}[interface]
    plugin = make(GEMM, out_features=outputs)
    cublas_lt()
    for rows in (31, 32, 33, 34, 993, 1024, 1001):
        assert plugin.enqueue([(0x1000, [rows, 64]), (0x2000, [outputs, 64])], [0x3000], 0x4000, 0x55) == 0
    calls = [(call["algo"], call["b_desc"][2]) if call["op"] == "matmul" else None for call in cublas_lt()]
    small = [None, (31, 31), None, (32, 32), None, (34, 33), (34, 34)]
    assert calls == [*small, None, (1024, 993), (1024, 1024), (1024, 1001), None, (1001, 1001)]


def test_a_product_that_fails(cublas_lt, make, said):
    plugin, weight = make(GEMM), (0x2000, [24, 64])
    assert plugin.enqueue([(0x1000, [13, 64]), weight], [0x3000], 0x4000, 0) != 0
    assert "cuBLASLt has no algorithm for 13 rows of 64 by a weight of [24, 64] (A_STATUS): build" in said()
    assert plugin.enqueue([(0x1008, [1, 64]), weight], [0x3000], 0x4000, 0) != 0
    assert "SawGemm: x, weight, gate or y does not lie on a multiple of 16 bytes" in said()
    assert plugin.enqueue([(0x1000, [1, 60]), weight], [0x3000], 0x4000, 0) != 0
    assert "input x has shape [1, 60]: it must be [num_tokens, 64]" in said()
    cublas_lt(7)
    assert plugin.enqueue([(0x1000, [1, 64]), weight], [0x3000], 0x4000, 0) != 0
    assert "cublasLtMatmul gave A_STATUS" in said()
    cublas_lt()


@pytest.fixture
def nine_rows_are_few(built):
    set_few_rows = CDLL(str(built.library)).saw_set_test_few_rows
    set_few_rows(9)
    yield
    set_few_rows(0)


@pytest.mark.usefixtures("nine_rows_are_few")
def test_few_rows_are_our_kernels(cublas_lt, built, make):
    cublas_lt()
    lib.recorded_calls(built.library)
    tensors = [(0x1000, [9, 64]), (0x2000, [24, 64]), (0x5000, [24, 64])]
    gated = make(GEMM, use_gate=1, output_dtype="float16")
    assert gated.enqueue(tensors, [0x3000], 0x10000, 0x55) == 0
    assert make(GEMM).enqueue(tensors[:2], [0x3000], 0x10000, 0x55) == 0
    same = {"op": "gemm", "x": 0x1000, "weight": 0x2000, "y": 0x3000, "num_rows": 9, "stream": 0x55, "dtype": 0}
    same |= {"in_features": 64, "out_features": 24}
    assert lib.recorded_calls(built.library) == [same | {"gate": 0x5000, "wide": 0}, same | {"gate": 0, "wide": 1}]
    assert cublas_lt() == []


def test_many_rows_with_a_gate_are_two_products_at_a_time(cublas_lt, built, make):
    """The second one in the workspace, which has room for some rows; then the gate, in y's place."""
    width = 1 << 16
    plugin = make(GEMM, use_gate=1, output_dtype="float16", out_features=width)
    lt, slab = 32 << 20, 1024 * width * 2
    assert plugin.workspace_bytes() == lt + slab
    cublas_lt()
    lib.recorded_calls(built.library)
    tensors = [(0x1000, [1027, 64]), (0x2000, [width, 64]), (0x5000, [width, 64])]
    assert plugin.enqueue(tensors, [0x3000], 0x10000, 0x55) == 0
    second, gate, rest = 0x3000 + slab, 0x10000 + lt, 0x1000 + 1024 * 64 * 2
    products = [(call["a"], call["b"], call["d"], call["d_desc"][2]) for call in cublas_lt() if call["op"] == "matmul"]
    assert products[:2] == [(0x2000, 0x1000, 0x3000, 1024), (0x5000, 0x1000, gate, 1024)]
    assert products[2:] == [(0x2000, rest, second, 3), (0x5000, rest, gate, 3)]
    gates = [(call["a"], call["b"], call["y"], call["count"]) for call in lib.recorded_calls(built.library)]
    assert gates == [(0x3000, gate, 0x3000, 1024 * width), (second, gate, second, 3 * width)]


def test_many_rows_are_multiplied_by_a_weight_in_16_bits(cublas_lt, built, make):
    """As much of it at a time as the workspace holds; few rows do without."""
    cublas_lt()
    plugin = make(QUANTIZED_GEMM, in_features=1 << 18, out_features=264, group_size=128)
    assert plugin.workspace_bytes() == (32 << 20) + (256 << 19)
    inputs = [(0x2000, [5, 2048, 4, 2, 32, 4]), (0x3000, [5, 2048, 1, 64])]
    lib.recorded_calls(built.library)
    assert plugin.enqueue([(0x1000, [193, 1 << 18]), *inputs], [0x5000], 0x10000, 0x55) == 0
    slab = 0x10000 + (32 << 20)
    parts = [(call["first_row"], call["num_rows"], call["y"]) for call in lib.recorded_calls(built.library)]
    assert parts == [(0, 256, slab), (256, 8, slab)]
    products = [call for call in cublas_lt() if call["op"] == "matmul"]
    assert [(call["a"], call["a_desc"][2], call["d"], call["d_desc"][1:]) for call in products] == [
        (slab, 256, 0x5000, [256, 193, 264]),
        (slab, 8, 0x5000 + 2 * 256, [8, 193, 264]),
    ]
    for shifted in range(3):
        tensors = [(at + 8 * (i == shifted), dims) for i, (at, dims) in enumerate([(0x1000, [9, 1 << 18]), *inputs])]
        assert plugin.enqueue(tensors, [0x5000], 0x10000, 0x55) != 0, "kernels copy 16 bytes at a time"
    assert plugin.enqueue([(0x1000, [192, 1 << 18]), *inputs], [0x5000], 0x10000, 0x55) == 0
    (few,) = lib.recorded_calls(built.library)
    assert (few["op"], few["num_rows"], few["values"], few["scales"]) == ("quantized_gemm", 192, 0x2000, 0x3000)
    assert cublas_lt() == []


def test_many_rows_in_8_bits_are_multiplied_by_a_weight_in_8_bits(cublas_lt, built, make):
    """As much of both at a time as the workspace holds; in 16 bits where cuBLASLt has no such product."""
    cublas_lt()
    inputs = 1 << 18
    fields = {"weight_type": "fp8", "group_size": 128, "quantize_input": 1}
    plugin = make(QUANTIZED_GEMM, in_features=inputs, out_features=272, **fields)
    slab, rows = 0x10000 + (32 << 20), (64 << 20) // inputs + 1
    codes = slab + 2 * 256 * inputs
    assert plugin.workspace_bytes() == (32 << 20) + 2 * 256 * inputs + rows * (inputs + 4)
    weight = [(0x2000, [5, 2048, 4, 4, 32, 4]), (0x3000, [5, 2048, 1, 64])]
    lib.recorded_calls(built.library)
    assert plugin.enqueue([(0x1000, [300, inputs]), *weight], [0x5000], 0x10000, 0x55) == 0
    scales = {"unpack_rows": slab + 256 * inputs, "quantize_rows": codes + rows * inputs}
    calls = lib.recorded_calls(built.library)
    assert all(call["code_scales"] == scales[call["op"]] for call in calls)
    later = 0x1000 + 2 * rows * inputs
    assert [(call["op"], call.get("x", call.get("first_row")), call["num_rows"], call["codes"]) for call in calls] == [
        ("unpack_rows", 0, 256, slab),
        ("quantize_rows", 0x1000, rows, codes),
        ("quantize_rows", later, 300 - rows, codes),
        ("unpack_rows", 256, 16, slab),
        ("quantize_rows", 0x1000, rows, codes),
        ("quantize_rows", later, 300 - rows, codes),
    ]
    products = [call for call in cublas_lt() if call["op"] == "matmul"]
    e4m3, of_each_row = 28, 3
    for call, out, count in zip(products, (256, 256, 16, 16), (rows, 300 - rows) * 2, strict=True):
        assert (call["a_desc"], call["b_desc"]) == ([e4m3, inputs, out, inputs], [e4m3, inputs, count, inputs])
        assert call["modes"] == [of_each_row] * 2
        assert call["scales"] == [scales["unpack_rows"], scales["quantize_rows"]]
        y = 0x5000 + 2 * (272 * rows * (count != rows) + 256 * (out == 16))
        assert (call["d"], call["d_desc"][1:]) == (y, [out, count, 272])
    assert plugin.enqueue([(0x1000, [200, inputs]), *weight], [0x5000], 0x10000, 0x55) == 0
    assert [call["op"] for call in lib.recorded_calls(built.library)] == ["dequantize"] * 2
    assert [call["modes"] for call in cublas_lt() if call["op"] == "matmul"] == [[0, 0]] * 2


def test_without_cublas_lt_a_plugin_does_not_start(built, interface):
    script = f"""
import ctypes, sys, types
for name in {LIBRARIES}:
    try: ctypes.CDLL(name)
    except OSError: continue
    sys.exit("there is one")
import importlib.util
from tests.support import plugin_library as lib
spec = importlib.util.spec_from_file_location({built.driver.__name__!r}, {built.driver.__file__!r})
driver = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driver)
plugin = lib.creators(driver, {str(built.library)!r})[{interface!r}, lib.GEMM].create(lib.to_fields({FIELDS[GEMM]}))
print(plugin.attach_to_context(), *driver.take_messages(), sep="\\n")
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LD_")}
    environment = kept | {"PYTHONPATH": os.pathsep.join([*sys.path])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if done.stderr.startswith("there is one"):
        pytest.skip("cuBLASLt is on the loader's path")
    assert done.stdout.splitlines() == [
        "None",
        "neither libcublasLt.so.13 nor libcublasLt.so.12 can be loaded: pip install nvidia-cublas-cu12, "
        "or add the library's folder to LD_LIBRARY_PATH",
    ], done.stderr


SMALL = [
    (LOOKUP, {}, [[7], [300, 64]], {"op": "lookup", "table": 2, "rows": 1, "out": 9, "num_tokens": 7, "num_rows": 300}),
    (RMS_NORM, {}, [[7, 64], [1, 64]], {"op": "rms_norm", "x": 1, "weight": 2, "residual": 0, "y": 9, "sum": 0}),
    (
        *(RMS_NORM, {"use_residual": 1}, [[7, 64], [1, 64], [7, 64]]),
        {"op": "rms_norm", "x": 1, "weight": 2, "residual": 3, "y": 9, "sum": 10},
    ),
    (
        *(RMS_NORM, {"hidden_size": 16, "num_heads": 4, "num_normed": 3}, [[7, 64], [3, 16]]),
        {"op": "rms_norm", "x": 1, "weight": 2, "residual": 0, "y": 9, "sum": 0, "num_heads": 4, "num_normed": 3}
        | {"width": 16},
    ),
    (SILU_MUL, {}, [[7, 64], [7, 64]], {"op": "silu_mul", "a": 1, "b": 2, "y": 9, "count": 448, "dtype": 0}),
]


@pytest.mark.parametrize(("name", "fields", "shapes", "expected"), SMALL)
def test_a_small_plugin_launches_with_what_the_tensors_say(name, fields, shapes, expected, built, make, said):
    plugin = make(name, **fields)
    count = 1 + ("use_residual" in fields)
    assert plugin.output_shapes(shapes) == [[7, 64]] * count
    assert plugin.output_types(len(shapes)) == [HALF] * count
    bound = [(i + 1, shape) for i, shape in enumerate(shapes)]
    assert plugin.enqueue(bound, [9, 10][:count], 0, 0x55) == 0
    (call,) = lib.recorded_calls(built.library)
    sizes = {"num_rows": 7, "epsilon": 0.125, "dtype": 0, "num_heads": 1, "num_normed": 1} if name == RMS_NORM else {}
    sizes |= {"width": 64} if name != SILU_MUL else {}
    assert call == sizes | expected | {"stream": 0x55}
    assert plugin.enqueue([(1, [7, 63]), *bound[1:]], [9, 10][:count], 0, 0x55) != 0
    assert f"{name}: input " in said()


# -- between ranks


@pytest.fixture
def set_ranks(built):
    """Tells the plugins of a rank among so many, whose sums of so many bytes go by our kernel."""
    function = CDLL(str(built.library)).saw_set_test_ranks
    function.argtypes = [c_int, c_int, c_size_t]
    yield function
    function(0, 0, 0)


def of_engine(built, interface, plugin, name):
    """A plugin as a runtime has it, from an engine."""
    return built.creators[interface, name].deserialize(plugin.serialized()).attach_to_context()


def test_a_small_sum_is_the_kernels(built, interface, make, set_ranks):
    set_ranks(1, 2, 7 * 64 * 2)
    plugin = of_engine(built, interface, make(ALL_REDUCE), ALL_REDUCE)
    assert plugin.output_shapes([[7, 64]]) == [[7, 64]]
    assert plugin.enqueue([(1, [7, 64])], [9], 0, 0x55) == 0
    (call,) = lib.recorded_calls(built.library)
    assert call == {"op": "all_reduce", "rank": 1, "x": 1, "y": 9, "count": 448, "dtype": 0, "stream": 0x55}


def test_a_norm_after_a_small_sum_is_of_the_same_kernel(built, interface, make, set_ranks):
    """After a sum of two GPUs and more by NCCL, or one that has no room in a block, it is that of SawRmsNorm."""
    set_ranks(1, 2, 7 * 64 * 2)
    plugin = of_engine(built, interface, make(ALL_REDUCE, use_norm=1, epsilon=0.125), ALL_REDUCE)
    assert plugin.output_shapes([[7, 64], [1, 64], [7, 64]]) == [[7, 64]] * 2
    assert plugin.enqueue([(1, [7, 64]), (2, [1, 64]), (3, [7, 64])], [9, 10], 0, 0x55) == 0
    (call,) = lib.recorded_calls(built.library)
    rows = {"x": 1, "weight": 2, "residual": 3, "y": 9, "sum": 10, "num_rows": 7, "width": 64, "epsilon": 0.125}
    assert call == {"op": "all_reduce_norm", "rank": 1, "dtype": 0, "stream": 0x55} | rows


@pytest.mark.parametrize("name", [ALL_REDUCE, ALL_GATHER])
def test_ranks_that_the_runtime_did_not_give(name, built, interface, make, set_ranks, said):
    """And a group of another size. While an engine is built nobody asks for them."""
    shape = [7, FIELDS[name].get("in_features", 64)]
    made = make(name)
    assert made.enqueue([(1, shape)], [9], 0x77, 0x55) == 0
    plugin = of_engine(built, interface, made, name)
    for size in (1, 4):
        set_ranks(0, 0 if size == 1 else size, 1 << 20)
        assert plugin.enqueue([(1, shape)], [9], 0x77, 0x55) != 0
        assert f"{name}: the engine is split over 2 ranks and the runtime gave GPU 0 a group of {size}" in said()
    assert lib.recorded_calls(built.library) == []


def test_a_gather_has_room_for_a_row_at_least(built, make):
    small, large = make(ALL_GATHER), make(ALL_GATHER, in_features=20_000_000, out_features=40_000_000)
    row = 2 * 102 * 4
    assert small.workspace_bytes() == (64 << 20) // row * row
    assert large.workspace_bytes() == 2 * 20_000_000 * 4
    assert small.output_shapes([[7, 102]]) == [[7, 203]]
