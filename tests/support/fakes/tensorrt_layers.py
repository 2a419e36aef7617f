# ruff: noqa: F403, F405
"""Part of :mod:`.tensorrt`: the layers, each with the shape, type and known value of its output."""

from __future__ import annotations

import math

import numpy as np

from tests.support.fakes.tensorrt_types import *


class ILayer:
    type = None
    num_declared_outputs = 1

    def __init__(self, network, inputs):
        self.name = f"(Unnamed Layer* {network.num_layers}) [{type(self).__name__}]"
        self.metadata = ""
        self._inputs = list(inputs)
        self._outputs = [
            ITensor(f"{self.name}_output", producer=self, index=i) for i in range(self.num_declared_outputs)
        ]

    @property
    def num_inputs(self):
        return len(self._inputs)

    @property
    def num_outputs(self):
        return len(self._outputs)

    def get_input(self, index):
        return self._inputs[index] if index < len(self._inputs) else None

    def get_output(self, index):
        return self._outputs[index]

    def set_input(self, index, tensor):
        assert isinstance(tensor, ITensor), tensor
        self._inputs += [None] * (index + 1 - len(self._inputs))
        self._inputs[index] = tensor

    def infer(self, index):
        x = self._inputs[0]
        return x.shape, x.dtype, None


def _layer(name, kind=None):
    """A layer class of the API that no test needs."""
    cls = type(name, (ILayer,), {"type": None if kind is None else LayerType[kind]})
    globals()[name] = cls
    return cls


for _name in words(
    "IConvolutionLayer IPoolingLayer ILRNLayer IScaleLayer ISoftMaxLayer IDeconvolutionLayer IPaddingLayer "
    "ITopKLayer IRaggedSoftMaxLayer IParametricReLULayer IResizeLayer ITripLimitLayer IRecurrenceLayer "
    "IIteratorLayer ILoopOutputLayer IFillLayer IConditionLayer "
    "IIfConditionalInputLayer IIfConditionalOutputLayer IAssertionLayer IScatterLayer IEinsumLayer "
    "IGridSampleLayer IOneHotLayer INonZeroLayer INMSLayer IReverseSequenceLayer INormalizationLayer "
    "ISelectLayer"
):
    _layer(_name)


class IConstantLayer(ILayer):
    type = LayerType.CONSTANT

    def __init__(self, network, shape, weights):
        self.shape, self.weights = tuple(shape), weights
        super().__init__(network, [])

    def infer(self, index):
        whole = self.weights.dtype in (int32, int64)
        value = self.weights.numpy().reshape(self.shape) if whole and math.prod(self.shape) < 100 else None
        return self.shape, self.weights.dtype, value


class IShapeLayer(ILayer):
    type = LayerType.SHAPE

    def infer(self, index):
        shape = self._inputs[0].shape
        return (len(shape),), int64, np.array(shape)


class IGatherLayer(ILayer):
    type = LayerType.GATHER
    axis, mode, num_elementwise_dims = 0, GatherMode.DEFAULT, 0

    def infer(self, index):
        data, indices = self._inputs
        if self.mode == GatherMode.ELEMENT:
            shape = indices.shape
            known = data.value is not None and indices.value is not None
            value = np.take_along_axis(data.value, indices.value, self.axis) if known else None
            return shape, data.dtype, value
        assert self.mode == GatherMode.DEFAULT
        assert self.num_elementwise_dims == 0
        return data.shape[: self.axis] + indices.shape + data.shape[self.axis + 1 :], data.dtype, None


class IConcatenationLayer(ILayer):
    type = LayerType.CONCATENATION
    axis = 0

    def infer(self, index):
        shapes = [x.shape for x in self._inputs]
        assert len({len(s) for s in shapes}) == 1
        assert len({x.dtype for x in self._inputs}) == 1, "concatenation of different types"
        sizes = [s[self.axis] for s in shapes]
        shape = list(shapes[0])
        shape[self.axis] = -1 if -1 in sizes else sum(sizes)
        known = all(x.value is not None for x in self._inputs)
        value = np.concatenate([x.value for x in self._inputs], self.axis) if known else None
        return shape, self._inputs[0].dtype, value


class IShuffleLayer(ILayer):
    type = LayerType.SHUFFLE
    reshape_dims = None
    second_transpose = None
    first_transpose = None
    zero_is_placeholder = True

    def infer(self, index):
        x = self._inputs[0]
        dims = self.reshape_dims
        if len(self._inputs) > 1:
            dims = self._inputs[1].value
            assert dims is not None, f"{self.name}: a shape that is not known"
        shape = list(x.shape)
        if self.first_transpose is not None:
            shape = [shape[i] for i in self.first_transpose]
        if dims is not None:
            shape = [shape[i] if d == 0 and self.zero_is_placeholder else int(d) for i, d in enumerate(dims)]
            if -1 not in x.shape and shape.count(-1) == 1:
                shape[shape.index(-1)] = math.prod(x.shape) // -math.prod(shape)
            if -1 not in x.shape and -1 not in shape:
                assert math.prod(shape) == math.prod(x.shape), (self.name, x.shape, shape)
        if self.second_transpose is not None:
            shape = [shape[i] for i in self.second_transpose]
        moved = self.first_transpose or self.second_transpose
        value = None if x.value is None or moved else x.value.reshape(shape)
        return shape, x.dtype, value


class ISliceLayer(ILayer):
    type = LayerType.SLICE
    mode = SampleMode.STRICT_BOUNDS

    def __init__(self, network, inputs, start, shape, stride):
        self.start, self.shape, self.stride = start, shape, stride
        super().__init__(network, inputs)

    def infer(self, index):
        sizes = self.get_input(2)
        shape = self.shape if sizes is None else sizes.value
        assert shape is not None, f"{self.name}: sizes that are not known"
        return [int(s) for s in shape], self._inputs[0].dtype, None


class IElementWiseLayer(ILayer):
    type = LayerType.ELEMENTWISE

    def __init__(self, network, inputs, op):
        self.op = op
        super().__init__(network, inputs)

    def infer(self, index):
        a, b = self._inputs
        assert len(a.shape) == len(b.shape), (self.name, a.shape, b.shape)
        assert a.dtype == b.dtype, f"{self.name}: {a.dtype} and {b.dtype} in a strongly typed network"
        shape = [y if x == 1 else x for x, y in zip(a.shape, b.shape, strict=True)]
        for x, y in zip(a.shape, b.shape, strict=True):
            assert 1 in (x, y) or -1 in (x, y) or x == y, (self.name, a.shape, b.shape)
        value = None
        if a.value is not None and b.value is not None:
            known = (a.value != -1) & (b.value != -1)
            ops = {ElementWiseOperation.SUM: np.add, ElementWiseOperation.PROD: np.multiply}
            ops |= {ElementWiseOperation.SUB: np.subtract, ElementWiseOperation.FLOOR_DIV: np.floor_divide}
            ops |= {ElementWiseOperation.DIV: np.floor_divide}
            value = np.where(known, ops[self.op](a.value, b.value), -1) if self.op in ops else None
        return shape, bool if self.op in COMPARISONS else a.dtype, value


class IUnaryLayer(ILayer):
    type = LayerType.UNARY

    def __init__(self, network, inputs, op):
        self.op = op
        super().__init__(network, inputs)


class IActivationLayer(IUnaryLayer):
    type = LayerType.ACTIVATION


class IIdentityLayer(ILayer):
    type = LayerType.IDENTITY


class ICastLayer(ILayer):
    type = LayerType.CAST

    def __init__(self, network, inputs, to_type):
        self.to_type = to_type
        super().__init__(network, inputs)

    def infer(self, index):
        return self._inputs[0].shape, self.to_type, self._inputs[0].value


class IQuantizeLayer(ICastLayer):
    type = LayerType.QUANTIZE

    def infer(self, index):
        assert self.to_type == fp8
        assert math.prod(self._inputs[1].shape) == 1  # its scale
        return super().infer(index)


class IDequantizeLayer(IQuantizeLayer):
    type = LayerType.DEQUANTIZE

    def infer(self, index):
        assert self._inputs[0].dtype == fp8
        return self._inputs[0].shape, self.to_type, None


class IReduceLayer(ILayer):
    type = LayerType.REDUCE

    def __init__(self, network, inputs, op, axes, keep_dims):
        self.op, self.axes, self.keep_dims = op, axes, keep_dims
        super().__init__(network, inputs)

    def infer(self, index):
        x = self._inputs[0]
        shape = [1 if self.axes >> i & 1 else s for i, s in enumerate(x.shape)]
        return [s for i, s in enumerate(shape) if self.keep_dims or not self.axes >> i & 1], x.dtype, None


class IMatrixMultiplyLayer(ILayer):
    type = LayerType.MATRIX_MULTIPLY

    def __init__(self, network, inputs, ops):
        self.op0, self.op1 = ops
        super().__init__(network, inputs)

    def infer(self, index):
        a, b = self._inputs
        (m, k), (k2, n) = (
            x.shape[-2:] if op == MatrixOperation.NONE else x.shape[:-3:-1] for x, op in ((a, self.op0), (b, self.op1))
        )
        assert len(a.shape) == len(b.shape), (self.name, a.shape, b.shape)
        assert k == k2, (self.name, a.shape, b.shape)
        assert a.dtype == b.dtype, self.name
        batch = [y if x == 1 else x for x, y in zip(a.shape[:-2], b.shape[:-2], strict=True)]
        return [*batch, m, n], a.dtype, None
