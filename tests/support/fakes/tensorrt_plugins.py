# ruff: noqa: F403, F405
"""Part of :mod:`.tensorrt`: plugins. This project's take what their pages in plugins/tensorrt say, and no more."""

from __future__ import annotations

import math

import numpy as np

from saw_trtllm.format import KV_NAMES, ROTATED
from tests.support.fakes.tensorrt_layers import ILayer
from tests.support.fakes.tensorrt_types import *


class PluginField:
    def __init__(self, name="", data=None, type=PluginFieldType.UNKNOWN):
        assert isinstance(data, np.ndarray), f"field {name}: TensorRT takes arrays only"
        self.name, self.data, self.type, self.size = name, data.copy(), type, data.size


class PluginFieldCollection(list):
    pass


class IPluginV2:
    def __init__(self, plugin_type, plugin_namespace, fields):
        self.plugin_type, self.plugin_namespace, self.plugin_version = plugin_type, plugin_namespace, "1"
        self.fields = fields

    @property
    def num_outputs(self):
        return 2 if self.plugin_type in ("RmsnormQuantization", "QuantizePerToken") else 1

    def outputs(self, inputs):
        shape, dtype = list(inputs[0].shape), inputs[0].dtype
        if self.plugin_type == "GPTAttention":
            shape[-1] = int(self.fields["num_heads"]) * int(self.fields["head_size"])
        elif self.plugin_type == "WeightOnlyGroupwiseQuantMatmul":
            assert {x.dtype for x in inputs} == {dtype}, "a quantized product takes all in one dtype"
            weight = inputs[2 if self.fields["quant_algo"] & 4 else 1]
            assert weight.shape[0] == shape[-1]
            shape[-1] = 4 * weight.shape[1]  # a 16-bit number has four codes
        elif self.plugin_type == "Fp8RowwiseGemm":
            assert [x.dtype for x in inputs] == [fp8, fp8, float32, float32]
            (out, columns), dtype = inputs[1].shape, float16
            assert (columns, tuple(inputs[3].shape)) == (shape[-1], (out,))
            shape[-1] = out
        elif self.num_outputs == 2:
            return [(shape, fp8), ([*shape[:-1], 1], float32)]
        return [(shape, dtype)]


class IPluginV2DynamicExt(IPluginV2):
    pass


class IPluginV3(IPluginV2):
    pass


class IPluginCreator:
    """Of any plugin of TensorRT-LLM."""

    def __init__(self, name, namespace):
        self.name, self.plugin_version, self.plugin_namespace = name, "1", namespace

    def create_plugin(self, name, field_collection):
        return IPluginV2DynamicExt(self.name, self.plugin_namespace, {f.name: f.data for f in field_collection})


class IPluginCreatorV3One(IPluginCreator):
    """Of a plugin of saw_trtllm, with the fields and inputs of docs/plugins.md."""

    def create_plugin(self, name, field_collection, phase):
        assert isinstance(field_collection, PluginFieldCollection)
        assert phase == TensorRTPhase.BUILD
        try:
            return SawPlugin(self.name, _parse_fields(self.name, field_collection))
        except (KeyError, ValueError):
            return None  # what TensorRT gives when a creator throws or rejects


_INT, _FLOAT, _TEXT = PluginFieldType.INT32, PluginFieldType.FLOAT32, PluginFieldType.CHAR
_COMMON = {
    **{name: (_INT, None) for name in ("layer_idx", "num_heads", "num_kv_heads", "head_dim", "tokens_per_block")},
    **{name: (_TEXT, None) for name in ("dtype", "kv")},
}
#: Fields of each plugin: type and default, None where it is required.
FIELDS = {
    "SawRotateQuantizeKV": _COMMON
    | {"hadamard_order": (_INT, None), "rotate_v": (_INT, 0)}
    | {"range_factor": (_FLOAT, 1.0), "use_k_center": (_INT, 0), "use_k_frame": (_INT, 0), "use_q_frame": (_INT, 0)},
    "SawInt4PagedAttention": _COMMON
    | {"softmax_scale": (_FLOAT, 0.0), "softcap": (_FLOAT, 0.0), "window": (_INT, 0), "use_sinks": (_INT, 0)},
    "SawGemm": {name: (_TEXT, None) for name in ("dtype", "output_dtype")}
    | {name: (_INT, None) for name in ("in_features", "out_features")}
    | {"use_gate": (_INT, 0)},
    "SawQuantizedGemm": {name: (_TEXT, None) for name in ("dtype", "weight_type")}
    | {name: (_INT, None) for name in ("in_features", "out_features", "group_size")}
    | {"quantize_input": (_INT, 0)},
    "SawLookup": {"dtype": (_TEXT, None), "hidden_size": (_INT, None), "vocab_size": (_INT, None)},
    "SawRmsNorm": {"dtype": (_TEXT, None), "hidden_size": (_INT, None)}
    | {"epsilon": (_FLOAT, None), "use_residual": (_INT, 0), "num_heads": (_INT, 1), "num_normed": (_INT, 1)},
    "SawSiluMul": {"dtype": (_TEXT, None), "hidden_size": (_INT, None)},
    "SawAllReduce": {"dtype": (_TEXT, None), "hidden_size": (_INT, None), "num_ranks": (_INT, None)}
    | {"use_norm": (_INT, 0), "epsilon": (_FLOAT, 0.0)},
    "SawAllGather": {name: (_INT, None) for name in ("in_features", "out_features", "num_ranks")},
}
PLUGIN_INPUTS = {
    "SawRotateQuantizeKV": (
        *(("dtype", 2), (int32, 1), (int32, 1), (int32, 1), (int32, 4), (int64, 2), (int32, 2), (float32, None)),
    ),
    "SawInt4PagedAttention": (
        *(("dtype", 2), ("dtype", 2), ("dtype", 2), (int32, 2), (int32, 1), (int32, 1), (int32, 1), (int32, 4)),
        *((int64, 2), (int32, 2), (int32, 1)),
    ),
    "SawGemm": (("dtype", 2), ("dtype", 2)),
    "SawQuantizedGemm": (("dtype", 2), (int32, None), (float32, 4)),
    "SawLookup": ((int32, 1), ("dtype", 2)),
    "SawRmsNorm": (("dtype", 2), (float32, 2)),
    "SawSiluMul": (("dtype", 2), ("dtype", 2)),
    "SawAllReduce": (("dtype", 2),),
    "SawAllGather": ((float32, 2),),
}


def _parse_fields(plugin, fields):
    known = FIELDS[plugin]
    values = {name: default for name, (_, default) in known.items()}
    for field in fields:
        kind, _ = known[field.name]
        if field.type != kind:
            raise ValueError(field.name)
        values[field.name] = field.data.tobytes().decode() if kind == _TEXT else field.data.reshape(-1)[0].item()
    if None in values.values():
        raise ValueError("a field is missing")
    if values.get("num_ranks", 2) < 2:
        raise ValueError("a field is out of range")
    if plugin == "SawAllGather":
        if not 1 <= values["out_features"] <= values["num_ranks"] * values["in_features"]:
            raise ValueError("a field is out of range")
        return values
    if "kv" not in values:
        if values["dtype"] not in ("float16", "bfloat16") or values.get("output_dtype") not in (
            *(None, "float32", values["dtype"]),
        ):
            raise ValueError("a field is out of range")
        return values
    order, rotated = values.get("hadamard_order", 1), values["kv"] in ROTATED
    valid = (
        values["head_dim"] in (64, 96, 128, 256)
        and values["tokens_per_block"] in (16, 32, 64, 128)
        and values["dtype"] in ("float16", "bfloat16")
        and values["kv"] in KV_NAMES
        and values["num_heads"] % values["num_kv_heads"] == 0
        and values["num_heads"] // values["num_kv_heads"] <= 16
        and 0 < values.get("range_factor", 1) <= 1
        and values.get("use_k_frame", 0) == values.get("use_q_frame", 0) <= (values["kv"] != "fp16")
        and (plugin != "SawRotateQuantizeKV" or (order >= 16 and values["head_dim"] % order == 0) == rotated)
    )
    if not valid:
        raise ValueError("a field is out of range")
    return values


class SawPlugin(IPluginV3):
    def __init__(self, plugin_type, fields):
        super().__init__(plugin_type, "saw", fields)
        self.dtype = {"float16": float16, "bfloat16": bfloat16}.get(fields.get("dtype"), float32)

    @property
    def num_outputs(self):
        counts = {"SawRotateQuantizeKV": 4, "SawRmsNorm": 1 + self.fields.get("use_residual", 0)}
        counts["SawAllReduce"] = 1 + self.fields.get("use_norm", 0)
        return counts.get(self.plugin_type, 1)

    def outputs(self, inputs):
        f, rows = self.fields, inputs[0].shape[0]
        expected = list(PLUGIN_INPUTS[self.plugin_type])
        if f.get("use_k_center") or f.get("use_sinks"):
            expected.append((float32, None))
        if f.get("use_k_frame"):
            expected += [(float16, 4)] * 2
        if f.get("use_norm"):
            expected += [(float32, 2), ("dtype", 2)]
        if f.get("use_residual") or f.get("use_gate"):
            expected.append(("dtype", 2))
        assert len(inputs) == len(expected), (self.plugin_type, len(inputs))
        for i, (x, (dtype, rank)) in enumerate(zip(inputs, expected, strict=True)):
            assert x.dtype == (self.dtype if dtype == "dtype" else dtype), (self.plugin_type, i, x.dtype)
            assert rank in (None, len(x.shape)), (self.plugin_type, i, x.shape)
        if self.plugin_type == "SawGemm":
            assert {tuple(x.shape) for x in inputs[1:]} == {(f["out_features"], f["in_features"])}
            assert inputs[0].shape[1] == f["in_features"]
            return [([rows, f["out_features"]], float32 if f["output_dtype"] == "float32" else self.dtype)]
        if self.plugin_type == "SawAllGather":
            assert inputs[0].shape[1] == f["in_features"]
            return [([rows, f["out_features"]], float32)]
        if self.plugin_type == "SawQuantizedGemm":
            assert inputs[0].shape[1] == f["in_features"]
            assert inputs[2].shape[2] == 128 // f["group_size"]
            return [([rows, f["out_features"]], self.dtype)]
        if self.plugin_type == "SawLookup":
            assert tuple(inputs[1].shape) == (f["vocab_size"], f["hidden_size"])
            return [([rows, f["hidden_size"]], self.dtype)]
        if "hidden_size" in f:
            width = f["hidden_size"] * f.get("num_heads", 1)
            assert {x.shape[-1] for x in inputs if x.dtype == self.dtype} == {width}, self.plugin_type
            if self.plugin_type == "SawRmsNorm":
                assert tuple(inputs[1].shape) == (f["num_normed"], f["hidden_size"])
            return [([rows, width], self.dtype)] * self.num_outputs
        width, kv_width = f["num_heads"] * f["head_dim"], f["num_kv_heads"] * f["head_dim"]
        if self.plugin_type == "SawInt4PagedAttention":
            assert [x.shape[-1] for x in inputs[:3]] == [width, kv_width, kv_width]
            return [([rows, width], self.dtype)]
        assert inputs[0].shape[1] == width + 2 * kv_width
        assert math.prod(inputs[7].shape) % f["head_dim"] == 0
        if f["use_k_center"]:
            assert tuple(inputs[8].shape) == (f["num_kv_heads"], f["head_dim"])
        for frame in inputs[8 + f["use_k_center"] :]:
            assert tuple(frame.shape) == (f["num_kv_heads"], 2, f["head_dim"], f["head_dim"])
        counters = [inputs[2].shape[0], f["num_kv_heads"]]
        return [
            *(([rows, w], self.dtype) for w in (width, kv_width, kv_width)),
            (counters, int32),
        ]


class PluginLayer(ILayer):
    def __init__(self, network, inputs, plugin):
        self.plugin = plugin
        self.num_declared_outputs = plugin.num_outputs
        super().__init__(network, inputs)

    def infer(self, index):
        return *self.plugin.outputs(self._inputs)[index], None


class IPluginV2Layer(PluginLayer):
    type = LayerType.PLUGIN_V2


class IPluginV3Layer(PluginLayer):
    type = LayerType.PLUGIN_V3
