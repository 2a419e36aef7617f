"""Runs a network that :mod:`.tensorrt` recorded, in fp32 PyTorch, for one step of prefills without history.

In such a step attention reads only the step's own K and V, which are not quantized: the outputs are the model's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from saw_trtllm.backends.reference.rotate_quantize_kv import apply_frame
from saw_trtllm.format import ROTATED, hadamard
from tests.support.fakes import tensorrt as trt
from tests.support.frames import unpack_frame
from tests.support.packed_weights import unpack_weight

_ELEMENTWISE = {
    "SUM": torch.add,
    "SUB": torch.sub,
    "PROD": torch.mul,
    "POW": torch.pow,
    "MAX": torch.maximum,
    "MIN": torch.minimum,
    "FLOOR_DIV": torch.floor_divide,
}
_UNARY = {"SQRT": torch.sqrt, "EXP": torch.exp, "SIGMOID": torch.sigmoid, "TANH": torch.tanh}
_REDUCE = {"SUM": torch.sum, "AVG": torch.mean}


def execute(
    network: trt.INetworkDefinition, inputs: dict[str, torch.Tensor], plugins: dict[str, Callable] | None = None
) -> dict[str, torch.Tensor]:
    """The network's outputs by name; floats are fp32 whatever the network says, integers int64.

    ``plugins`` take the place of those here: by name, from fields and inputs to outputs.
    """
    values = {id(t): inputs[t.name] for t in network._inputs if t.name in inputs}
    todo = [t.producer for t in network._outputs]
    while todo:
        layer = todo[-1]
        needed = [t for t in layer._inputs if t is not None and id(t) not in values]
        if needed:
            assert all(t.producer is not None for t in needed), [t.name for t in needed]
            todo += [t.producer for t in needed]
            continue
        todo.pop()
        arguments = [None if t is None else values[id(t)] for t in layer._inputs]
        results = _run(layer, arguments, plugins or {})
        for output, result in zip(layer._outputs, results, strict=True):
            values[id(output)] = result
    return {t.name: values[id(t)] for t in network._outputs}


def _run(layer, x, own):
    if isinstance(layer, trt.PluginLayer):
        theirs = {"WeightOnlyGroupwiseQuantMatmul": _groupwise_matmul, "Fp8RowwiseGemm": _row_wise_gemm}
        theirs |= {"RmsnormQuantization": _quantized_norm, "QuantizePerToken": lambda layer, x: _quantize_tokens(x)}
        if layer.plugin.plugin_type in theirs:
            return theirs[layer.plugin.plugin_type](layer, *x)
        plugins = {"SawRotateQuantizeKV": _write, "SawInt4PagedAttention": _attention}
        plugins |= {"SawGemm": lambda fields, x: [_gemm(fields, *x)], "SawLookup": lambda fields, x: [_lookup(*x)]}
        plugins |= {"SawQuantizedGemm": lambda fields, x: [_quantized_gemm(fields, *x)]}
        plugins |= {"SawRmsNorm": lambda fields, x: _rms_norm(fields, *x)}
        plugins |= {"SawSiluMul": lambda fields, x: [torch.nn.functional.silu(x[0]) * x[1]]}
        return (plugins | own)[layer.plugin.plugin_type](layer.plugin.fields, x)
    return [getattr(_Layers, layer.type.name.lower())(layer, *x)]


def _lookup(rows, table):
    has = (rows >= 0) & (rows < len(table))
    return table[rows * has] * has[:, None]


class _Layers:
    @staticmethod
    def constant(layer):
        value = torch.from_numpy(layer.weights.numpy().copy()).reshape(layer.shape)
        if layer.weights.dtype == trt.fp8:
            value = value.view(torch.float8_e4m3fn)
        return value.float() if value.is_floating_point() else value.long()

    @staticmethod
    def shape(layer, x):
        return torch.tensor(x.shape)

    @staticmethod
    def gather(layer, x, indices):
        if layer.mode == trt.GatherMode.ELEMENT:
            return torch.gather(x, layer.axis, indices)
        taken = x.index_select(layer.axis, indices.reshape(-1))
        return taken.reshape(*x.shape[: layer.axis], *indices.shape, *x.shape[layer.axis + 1 :])

    @staticmethod
    def concatenation(layer, *x):
        return torch.cat(x, layer.axis)

    @staticmethod
    def shuffle(layer, x, dims=None):
        if layer.first_transpose is not None:
            x = x.permute(*layer.first_transpose)
        dims = layer.reshape_dims if dims is None else dims.tolist()
        if dims is not None:
            x = x.reshape([x.shape[i] if d == 0 and layer.zero_is_placeholder else d for i, d in enumerate(dims)])
        return x if layer.second_transpose is None else x.permute(*layer.second_transpose)

    @staticmethod
    def slice(layer, x, starts=None, sizes=None):
        starts = layer.start if starts is None else starts.tolist()
        sizes = layer.shape if sizes is None else sizes.tolist()
        for dim, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            x = x.narrow(dim, start, size)
        return x

    @staticmethod
    def elementwise(layer, a, b):
        if layer.op.name == "DIV":
            return a / b if a.is_floating_point() else a // b
        return _ELEMENTWISE[layer.op.name](a, b)

    @staticmethod
    def unary(layer, x):
        return _UNARY[layer.op.name](x)

    activation = unary

    @staticmethod
    def identity(layer, x):
        return x

    @staticmethod
    def cast(layer, x):
        return x.float() if layer.to_type in (trt.float32, trt.float16, trt.bfloat16) else x.long()

    @staticmethod
    def quantize(layer, x, scale):
        return to_e4m3(x / scale)

    @staticmethod
    def dequantize(layer, x, scale):
        return x * scale

    @staticmethod
    def reduce(layer, x):
        dims = [i for i in range(x.ndim) if layer.axes >> i & 1]
        return _REDUCE[layer.op.name](x, dim=dims, keepdim=layer.keep_dims)

    @staticmethod
    def matrix_multiply(layer, a, b):
        a, b = (x if op.name == "NONE" else x.transpose(-1, -2) for x, op in ((a, layer.op0), (b, layer.op1)))
        return a @ b


def _rotate(x, order):
    return (x.unflatten(-1, (-1, order)) @ torch.from_numpy(hadamard(order))).flatten(-2)


def _quantized_gemm(fields, x, values, scales):
    shape = fields["out_features"], fields["in_features"]
    weight = unpack_weight(fields["weight_type"], values.numpy(), scales.numpy(), shape)
    return x @ torch.from_numpy(weight).to(x.dtype).T


def to_e4m3(x):
    """The nearest numbers that e4m3 has, in the dtype of ``x``."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)


def hopper_codes(words, out, inputs):
    """INT4 codes ``[out, in]`` out of the order of TensorRT-LLM's mixed product on Hopper.

    Of 32 inputs a thread has 8 in a word, those of four tensor cores' steps, even ones first.
    """
    data = torch.from_numpy(words.copy()).view(torch.uint8).flatten()
    nibbles = torch.stack([data & 15, data >> 4], -1).reshape(-1, 8)
    in_order = torch.empty_like(nibbles)
    in_order[:, [0, 2, 4, 6, 1, 3, 5, 7]] = nibbles
    thread, pair, half = torch.meshgrid(torch.arange(4), torch.arange(4), torch.arange(2), indexing="ij")
    rows = (2 * thread + 8 * pair + half).flatten()  # of 32, in the order in which they lie there
    codes = torch.empty(out, inputs, dtype=torch.uint8)
    codes.view(out, -1, 32)[..., rows] = in_order.reshape(out, -1, 32)
    return codes


def _groupwise_matmul(layer, x, *rest):
    algo, at = int(layer.plugin.fields["quant_algo"]), 1
    if algo & 4:
        x, rest, at = x * rest[0], rest[1:], 2
    words, scales = layer._inputs[at].producer.weights.numpy(), rest[1]
    codes = hopper_codes(words, scales.shape[1], x.shape[1]).float()
    group = int(layer.plugin.fields["group_size"])
    weight = (codes.T - 8) * scales.repeat_interleave(group, 0)
    if algo & 2:
        weight += rest[2].repeat_interleave(group, 0)
    y = x @ weight
    return [y + rest[-1] if algo & 1 else y]


def _quantize_tokens(x):
    scale = x.abs().amax(-1, keepdim=True) / 448
    return [to_e4m3(x / scale), scale]


def _quantized_norm(layer, x, weight, bias, scale):
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + float(layer.plugin.fields["eps"]))
    return _quantize_tokens(x * scale * weight + bias)


def _row_wise_gemm(layer, x, weight, token_scale, channel_scale):
    return [(x @ weight.T) * token_scale * channel_scale]


def _gemm(fields, x, weight, *gate):
    if gate:
        return torch.nn.functional.silu(x @ weight.T) * (x @ gate[0].T)
    return x.float() @ weight.float().T if fields["output_dtype"] == "float32" else x @ weight.T


def _rms_norm(fields, x, weight, *residual):
    x = sum(residual, x)
    heads, normed = fields["num_heads"], fields["num_normed"]
    wide = x.unflatten(-1, (heads, -1))[:, :normed].float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + fields["epsilon"])
    y = torch.cat([(wide * scale * weight).flatten(1).to(x.dtype), x[:, normed * fields["hidden_size"] :]], 1)
    return [y, x][: 1 + fields["use_residual"]]


def frames(x):
    """K's and Q's, the write plugin's last inputs, as they were before they were packed."""
    return [torch.from_numpy(unpack_frame(frame.numpy())).float() for frame in x[-2:]]


def _write(fields, x):
    qkv, position_ids, last_token_ids, *_ = x
    D, H, Hkv = fields["head_dim"], fields["num_heads"], fields["num_kv_heads"]
    q, k, v = qkv.unflatten(-1, (-1, D)).split([H, Hkv, Hkv], dim=1)
    cos, sin = x[7].reshape(-1, D // 2, 2)[position_ids].unsqueeze(1).unbind(-1)
    q, k = (
        torch.cat(
            [a[..., : D // 2] * cos - a[..., D // 2 :] * sin, a[..., D // 2 :] * cos + a[..., : D // 2] * sin], -1
        )
        for a in (q, k)
    )
    if fields["use_k_center"]:
        k = k - x[8]
    order = fields["hadamard_order"]
    if fields["use_k_frame"]:
        k_frame, q_frame = frames(x)
        k, q = (apply_frame(a.float(), frame) for a, frame in ((k, k_frame), (q, q_frame)))
    elif fields["kv"] in ROTATED:
        q, k = _rotate(q, order), _rotate(k, order)
    if fields["rotate_v"]:
        v = _rotate(v, order)
    return [*(a.flatten(1) for a in (q, k, v)), torch.zeros(len(last_token_ids), Hkv, dtype=torch.int64)]


def _attention(fields, x):
    q, k, v, _, request_types, last_token_ids, sequence_length, *_, windows = x
    D, H, Hkv = fields["head_dim"], fields["num_heads"], fields["num_kv_heads"]
    q, k, v = (a.unflatten(-1, (-1, D)) for a in (q, k, v))
    k, v = (a.repeat_interleave(H // Hkv, dim=1) for a in (k, v))
    ends = last_token_ids.tolist()
    starts = [0, *ends[:-1]]
    assert not request_types.any()
    assert sequence_length.tolist() == [e - s for s, e in zip(starts, ends, strict=True)]
    given = [w for w in (fields["window"], int(windows[fields["layer_idx"]])) if w > 0]
    scale = fields["softmax_scale"] or D**-0.5
    outputs = []
    for start, end in zip(starts, ends, strict=True):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
        if fields["softcap"]:
            scores = fields["softcap"] * torch.tanh(scores / fields["softcap"])
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & (distance < min(given, default=end))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]).flatten(1))
    return [torch.cat(outputs)]
