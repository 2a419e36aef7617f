"""A TensorRT network being defined: tensors that know their dtype, and the few operations that a decoder is made of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np

from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.errors import EngineError
from saw_trtllm.ops import PackedShape
from saw_trtllm.plugins.library import (
    ALL_GATHER,
    ALL_REDUCE,
    GEMM,
    LOOKUP,
    QUANTIZED_GEMM,
    RMS_NORM,
    SILU_MUL,
)


class Tensor:
    """A tensor of a :class:`Graph`: TensorRT's ``handle``, and NumPy's name of the ``dtype``.

    The operators want both sides of one dtype and rank; a dimension of 1 is repeated.
    """

    def __init__(self, graph: Graph, handle: Any, dtype: str) -> None:
        self.graph, self.handle, self.dtype = graph, handle, dtype

    def __add__(self, other: Tensor) -> Tensor:
        return self.graph.elementwise("SUM", self, other)

    def __sub__(self, other: Tensor) -> Tensor:
        return self.graph.elementwise("SUB", self, other)

    def __mul__(self, other: Tensor) -> Tensor:
        return self.graph.elementwise("PROD", self, other)

    def __truediv__(self, other: Tensor) -> Tensor:
        return self.graph.elementwise("DIV", self, other)


class Graph:
    """A network, layer by layer.

    It goes by the rules of a strongly typed network, and tells a TensorRT that has none the type of each layer.
    Constants are read from memory when the engine is built: the graph keeps them.

    Parameters
    ----------
    tensorrt : TensorRT
    network : tensorrt.INetworkDefinition
    use_plugins : bool
        Whether what a decoder is mostly made of are our plugins, or TensorRT's own layers.
    refittable : bool
        Whether the engine's named constants can be given to it later.
    """

    def __init__(self, tensorrt: TensorRT, network: Any, use_plugins: bool = False, refittable: bool = False) -> None:
        self.tensorrt = tensorrt
        self.network = network
        self._use_plugins = use_plugins
        self._refittable = refittable
        self._trt = tensorrt.trt
        self._scope = ""
        self._names: dict[str, int] = {}
        self._arrays: list[np.ndarray] = []

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Name the layers that are added inside, for TensorRT's log and profiles."""
        outer, self._scope = self._scope, f"{self._scope}{name}."
        try:
            yield
        finally:
            self._scope = outer

    # -- ends

    def input(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        """Declare an input; -1 is a dynamic dimension."""
        return Tensor(self, self.network.add_input(name, self.tensorrt.dtype(dtype), tuple(shape)), dtype)

    def output(self, x: Tensor, name: str) -> None:
        """Make a tensor an output of the engine."""
        x.handle.name = name
        self.tensorrt.mark_output(self.network, x.handle, x.dtype)

    def constant(self, array: np.ndarray, name: str | None = None) -> Tensor:
        """A tensor that is part of the engine; a ``name`` is its own, whatever the scope."""
        array = np.ascontiguousarray(array)
        self._arrays.append(array)
        weights = self.tensorrt.weights(array)
        layer = self.network.add_constant(array.shape, weights)
        if name is not None and self._refittable:
            self.tensorrt.make_refittable(self.network, weights, name)
        name = self._scope + "constant" if name is None else name
        # Of 16-bit constants it does not matter what a weakly typed TensorRT keeps them in; of fp32 ones it does.
        pin = array.dtype == np.float32
        return self._named(name, layer, array.dtype.name, pin)

    def scalar(self, value: float, like: Tensor) -> Tensor:
        """A constant of another tensor's dtype and rank."""
        array = np.full((1,) * len(like.handle.shape), value, np.float32)
        return self.constant(array.astype(getattr(ml_dtypes, like.dtype, like.dtype)))

    # -- operations

    def elementwise(self, operation: str, a: Tensor, b: Tensor) -> Tensor:
        """``a`` and ``b`` under one of TensorRT's ElementWiseOperations."""
        if a.dtype != b.dtype:
            raise TypeError(f"{operation} of {a.dtype} and {b.dtype}")
        layer = self.network.add_elementwise(a.handle, b.handle, getattr(self._trt.ElementWiseOperation, operation))
        return self._tensor(operation.lower(), layer, a.dtype, pin=a.dtype != "int32")

    def cast(self, x: Tensor, dtype: str) -> Tensor:
        """``x`` rounded to a dtype."""
        if x.dtype == dtype:
            return x
        return self._tensor("cast", self.network.add_cast(x.handle, self.tensorrt.dtype(dtype)), dtype, pin=False)

    def gather(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows of a matrix: ``[n, width]`` and int32 ``[m]`` to ``[m, width]``."""
        return self._tensor("gather", self.network.add_gather(x.handle, rows.handle, 0), x.dtype)

    def embedding(self, weight: Tensor, rows: Tensor, partial: bool = False) -> Tensor:
        """:meth:`gather` from a weight; one that is ``partial`` gives zeros for rows that it does not have."""
        if not (self._use_plugins or partial):
            return self.gather(weight, rows)
        size, width = weight.handle.shape
        fields = {"dtype": weight.dtype, "vocab_size": size, "hidden_size": width}
        return self.plugin(LOOKUP, fields, [rows, weight], [weight.dtype])[0]

    def linear(self, x: Tensor, weight: Tensor, dtype: str | None = None) -> Tensor:
        """``x · weightᵀ``: ``[n, inputs]`` and ``[outputs, inputs]`` to ``[n, outputs]``, of ``dtype`` if given."""
        dtype = x.dtype if dtype is None else dtype
        if not self._use_plugins:
            op = self._trt.MatrixOperation
            layer = self.network.add_matrix_multiply(x.handle, op.NONE, weight.handle, op.TRANSPOSE)
            return self.cast(self._tensor("linear", layer, x.dtype), dtype)
        given = dtype if dtype == "float32" else x.dtype
        return self.cast(self._product(x, [weight], given), dtype)

    def fuses_gate(self, activation: str) -> bool:
        """Whether :meth:`gated_linear` is to be had, for an activation."""
        return self._use_plugins and activation == "silu"

    def gated_linear(self, x: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
        """``silu(x · weightᵀ) · (x · gateᵀ)``: ``[n, inputs]`` and ``[outputs, inputs]`` to ``[n, outputs]``."""
        return self._product(x, [weight, gate], x.dtype, use_gate=1)

    def _product(self, x: Tensor, weights: Sequence[Tensor], dtype: str, **fields: int) -> Tensor:
        outputs, inputs = weights[0].handle.shape
        sizes = {"dtype": x.dtype, "in_features": inputs, "out_features": outputs, "output_dtype": dtype}
        return self.plugin(GEMM, sizes | fields, [x, *weights], [dtype])[0]

    def quantized_linear(
        self, x: Tensor, values: Tensor, scales: Tensor, packed: PackedShape, quantize_input: bool = False
    ) -> Tensor:
        """``x · weightᵀ`` of a packed weight: ``[n, inputs]`` to ``[n, outputs]`` of x's dtype, always our plugin.

        With ``quantize_input`` many rows are rounded to e4m3 before, each with a scale of its own.
        """
        fields: dict[str, int | float | str] = {"dtype": x.dtype, "weight_type": packed.kind}
        fields |= {"quantize_input": int(quantize_input)}
        fields |= {"in_features": packed.in_features, "out_features": packed.out_features, "group_size": packed.group}
        return self.plugin(QUANTIZED_GEMM, fields, [x, values, scales], [x.dtype])[0]

    def rms_norm(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``x`` (with a residual ``x + residual``), and that over its RMS times ``weight``.

        The norm is computed in float32 and rounded once; ``x`` is ``[n, width]``, ``weight`` float32 ``[1, width]``.
        """
        if self._use_plugins:
            fields: dict[str, int | float | str] = {
                "dtype": x.dtype,
                "hidden_size": weight.handle.shape[1],
                "epsilon": float(epsilon),
            }
            others = [] if residual is None else [residual]
            fields["use_residual"] = len(others)
            y, *sums = self.plugin(RMS_NORM, fields, [x, weight, *others], [x.dtype] * (1 + len(others)))
            return (sums or [x])[0], y
        x = x if residual is None else x + residual
        wide = self.cast(x, "float32")
        square = self.mean(wide * wide, 1) + self.constant(np.full((1, 1), epsilon, np.float32))
        return x, self.cast(wide / self.sqrt(square) * weight, x.dtype)

    def norm_heads(
        self, x: Tensor, weights: np.ndarray, num_heads: int, num_normed: int, epsilon: float, name: str
    ) -> Tensor:
        """:meth:`rms_norm` over each of the first ``num_normed`` heads of a row.

        ``weights`` is float32 ``[num_normed, width]``; without our plugins ``[num_heads, width]``, 1 for the others.
        """
        width = weights.shape[1]
        if self._use_plugins:
            fields: dict[str, int | float | str] = {"dtype": x.dtype, "hidden_size": width, "epsilon": float(epsilon)}
            fields |= {"num_heads": num_heads, "num_normed": num_normed}
            return self.plugin(RMS_NORM, fields, [x, self.constant(weights, name)], [x.dtype])[0]
        # The others are divided by 1 and multiplied by 1: that is fused with the rest, where taking them apart and
        # joining them again would be copies.
        taken = np.repeat(np.array([1, 0], np.float32), [num_normed, num_heads - num_normed]).reshape(1, -1, 1)
        wide = self.cast(self.reshape(x, (-1, num_heads, width)), "float32")
        square = self.mean(wide * wide, 2) + self.constant(np.full((1, 1, 1), epsilon, np.float32))
        square = square * self.constant(taken) + self.constant(1 - taken)
        wide = wide / self.sqrt(square) * self.constant(weights[None], name)
        return self.reshape(self.cast(wide, x.dtype), (-1, num_heads * width))

    def gated(self, x: Tensor, gate: Tensor, activation: str = "silu") -> Tensor:
        """``activation(x) · gate``, all ``[n, width]``."""
        if activation == "gelu_pytorch_tanh":
            # In fp32: the cube of 41 is beyond float16.
            return self.cast(self.gelu(self.cast(x, "float32")) * self.cast(gate, "float32"), x.dtype)
        if not self._use_plugins:
            return self.silu(x) * gate
        return self.plugin(SILU_MUL, {"dtype": x.dtype, "hidden_size": x.handle.shape[1]}, [x, gate], [x.dtype])[0]

    def all_reduce(self, x: Tensor, num_ranks: int) -> Tensor:
        """The sum of ``[n, width]`` over all ranks."""
        if num_ranks == 1:
            return x
        fields = {"dtype": x.dtype, "hidden_size": x.handle.shape[1], "num_ranks": num_ranks}
        return self.plugin(ALL_REDUCE, fields, [x], [x.dtype])[0]

    def norm_of_sum(
        self, x: Tensor, weight: Tensor, epsilon: float, residual: Tensor, num_ranks: int
    ) -> tuple[Tensor, Tensor]:
        """:meth:`rms_norm` of the sum of ``x`` over all ranks, with a residual."""
        if num_ranks == 1 or not self._use_plugins:
            return self.rms_norm(residual, weight, epsilon, self.all_reduce(x, num_ranks))
        fields: dict[str, int | float | str] = {"dtype": x.dtype, "hidden_size": x.handle.shape[1]}
        fields |= {"num_ranks": num_ranks, "use_norm": 1, "epsilon": float(epsilon)}
        y, added = self.plugin(ALL_REDUCE, fields, [x, weight, residual], [x.dtype] * 2)
        return added, y

    def all_gather(self, x: Tensor, width: int, num_ranks: int) -> Tensor:
        """The first ``width`` columns of all ranks' ``[n, columns]`` side by side, in float32."""
        if num_ranks == 1:
            return x
        fields = {"in_features": x.handle.shape[1], "out_features": width, "num_ranks": num_ranks}
        return self.plugin(ALL_GATHER, fields, [self.cast(x, "float32")], ["float32"])[0]

    def mean(self, x: Tensor, axis: int) -> Tensor:
        """Mean over an axis from 0, which is kept with length 1."""
        layer = self.network.add_reduce(x.handle, self._trt.ReduceOperation.AVG, 1 << axis, True)
        return self._tensor("mean", layer, x.dtype)

    def sqrt(self, x: Tensor) -> Tensor:
        """The square root."""
        return self._tensor("sqrt", self.network.add_unary(x.handle, self._trt.UnaryOperation.SQRT), x.dtype)

    def tanh(self, x: Tensor) -> Tensor:
        """The hyperbolic tangent."""
        layer = self.network.add_activation(x.handle, self._trt.ActivationType.TANH)
        return self._tensor("tanh", layer, x.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        """``x · Φ(x)`` by its approximation with tanh."""
        inner = (x + x * x * x * self.scalar(0.044715, x)) * self.scalar(math.sqrt(2 / math.pi), x)
        return x * self.scalar(0.5, x) * (self.tanh(inner) + self.scalar(1.0, x))

    def silu(self, x: Tensor) -> Tensor:
        """``x · sigmoid(x)``."""
        layer = self.network.add_activation(x.handle, self._trt.ActivationType.SIGMOID)
        return x * self._tensor("sigmoid", layer, x.dtype)

    def reshape(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """The same elements in another shape; -1 is what is left."""
        layer = self.network.add_shuffle(x.handle)
        layer.reshape_dims = tuple(shape)
        return self._tensor("reshape", layer, x.dtype)

    def plugin(
        self, name: str, fields: Mapping[str, int | float | str], inputs: Sequence[Tensor], dtypes: Sequence[str]
    ) -> list[Tensor]:
        """A layer that is one of our plugins, with outputs of ``dtypes``."""
        layer = self.tensorrt.add_plugin(self.network, name, fields, [x.handle for x in inputs])
        self._name(self._scope + name, layer)
        return [Tensor(self, layer.get_output(i), dtype) for i, dtype in enumerate(dtypes)]

    def _tensor(self, name: str, layer: Any, dtype: str, pin: bool = True) -> Tensor:
        return self._named(self._scope + name, layer, dtype, pin)

    def _named(self, name: str, layer: Any, dtype: str, pin: bool) -> Tensor:
        self._name(name, layer)
        if pin:
            self.tensorrt.pin(layer, dtype)
        return Tensor(self, layer.get_output(0), dtype)

    def _name(self, name: str, layer: Any) -> None:
        if layer is None:
            raise EngineError(f"TensorRT {self.tensorrt.version} does not take the layer {name}: see its log")
        count = self._names[name] = self._names.get(name, 0) + 1
        layer.name = name if count == 1 else f"{name}_{count}"
