"""Part of :mod:`.tensorrt`: enumerations, weights and tensors."""

from __future__ import annotations

import ctypes
from enum import Enum

import numpy as np


class _Enum(Enum):
    """As pybind11's enums: an integer on demand, ``Type.MEMBER`` as text."""

    def __int__(self):
        return self.value

    __index__ = __int__

    def __str__(self):
        return f"{type(self).__name__}.{self.name}"


def words(text: str) -> list[str]:
    return text.split()


def _enum(name: str, members: str) -> type:
    return _Enum(name, {m: i for i, m in enumerate(members.split())})


DataType = _enum("DataType", "FLOAT HALF INT8 INT32 BOOL UINT8 FP8 BF16 INT64 INT4 FP4")
float32, float16, int8, int32, bool, uint8, fp8, bfloat16, int64, int4, fp4 = DataType
NUMPY = {
    float32: np.float32,
    float16: np.float16,
    int8: np.int8,
    fp8: np.uint8,
    int32: np.int32,
    bool: np.bool_,
    bfloat16: np.uint16,
    int64: np.int64,
}
LAYER_TYPES = """
CONVOLUTION CAST ACTIVATION POOLING LRN SCALE SOFTMAX DECONVOLUTION CONCATENATION ELEMENTWISE PLUGIN UNARY
PADDING SHUFFLE REDUCE TOPK GATHER MATRIX_MULTIPLY RAGGED_SOFTMAX CONSTANT IDENTITY PLUGIN_V2 SLICE SHAPE
PARAMETRIC_RELU RESIZE TRIP_LIMIT RECURRENCE ITERATOR LOOP_OUTPUT SELECT FILL QUANTIZE DEQUANTIZE
CONDITION CONDITIONAL_INPUT CONDITIONAL_OUTPUT SCATTER EINSUM ASSERTION ONE_HOT NON_ZERO GRID_SAMPLE NMS
REVERSE_SEQUENCE NORMALIZATION PLUGIN_V3 SQUEEZE UNSQUEEZE CUMULATIVE DYNAMIC_QUANTIZE
"""
LayerType = _enum("LayerType", LAYER_TYPES)
ElementWiseOperation = _enum(
    "ElementWiseOperation", "SUM PROD MAX MIN SUB DIV POW FLOOR_DIV AND OR XOR EQUAL GREATER LESS"
)
COMPARISONS = (ElementWiseOperation.EQUAL, ElementWiseOperation.GREATER, ElementWiseOperation.LESS)
UnaryOperation = _enum("UnaryOperation", "EXP LOG SQRT RECIP ABS NEG SIN COS NOT ROUND SIGN")
ReduceOperation = _enum("ReduceOperation", "SUM PROD MAX MIN AVG")
ActivationType = _enum("ActivationType", "RELU SIGMOID TANH CLIP SOFTPLUS")
MatrixOperation = _enum("MatrixOperation", "NONE TRANSPOSE VECTOR")
GatherMode = _enum("GatherMode", "DEFAULT ELEMENT ND")
ScatterMode = _enum("ScatterMode", "ELEMENT ND")
SampleMode = _enum("SampleMode", "STRICT_BOUNDS WRAP CLAMP FILL REFLECT")
TopKOperation = _enum("TopKOperation", "MAX MIN")
FillOperation = _enum("FillOperation", "LINSPACE RANDOM_UNIFORM")
PoolingType = _enum("PoolingType", "MAX AVERAGE")
InterpolationMode = _enum("InterpolationMode", "NEAREST LINEAR CUBIC")
ResizeCoordinateTransformation = _enum("ResizeCoordinateTransformation", "ALIGN_CORNERS ASYMMETRIC HALF_PIXEL")
DimensionOperation = _enum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV")
PluginFieldType = _enum("PluginFieldType", "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 CHAR DIMS UNKNOWN")
NetworkDefinitionCreationFlag = _enum("NetworkDefinitionCreationFlag", "EXPLICIT_BATCH STRONGLY_TYPED")
BuilderFlag = _enum(
    "BuilderFlag",
    "FP16 BF16 INT8 FP8 REFIT REFIT_INDIVIDUAL STRIP_PLAN WEIGHT_STREAMING SPARSE_WEIGHTS MONITOR_MEMORY "
    "OBEY_PRECISION_CONSTRAINTS",
)
ProfilingVerbosity = _enum("ProfilingVerbosity", "LAYER_NAMES_ONLY NONE DETAILED")
TensorLocation = _enum("TensorLocation", "DEVICE HOST")
TensorFormat = _enum("TensorFormat", "LINEAR")
TripLimit = _enum("TripLimit", "COUNT WHILE")
LoopOutput = _enum("LoopOutput", "LAST_VALUE CONCATENATE REVERSE")
TensorRTPhase = _enum("TensorRTPhase", "BUILD RUNTIME")
ExecutionContextAllocationStrategy = _enum("ExecutionContextAllocationStrategy", "STATIC USER_MANAGED")


def nptype(dtype):
    return NUMPY[dtype]


class ILogger:
    def __init__(self, *args):
        pass


class Logger(ILogger):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
    min_severity = WARNING

    def log(self, severity, message):
        pass


class Dims(tuple):
    """As TensorRT's: a sequence of dimensions."""


class Weights:
    """``Weights(dtype, address, count)`` or ``Weights(array)``."""

    def __init__(self, dtype, address=None, count=None):
        if isinstance(dtype, np.ndarray):
            self._array = dtype
            self.dtype = next(k for k, v in NUMPY.items() if np.dtype(v) == dtype.dtype)
        else:
            self.dtype = dtype
            raw = (ctypes.c_char * (count * np.dtype(NUMPY[dtype]).itemsize)).from_address(address)
            self._array = np.frombuffer(raw, NUMPY[dtype])

    def numpy(self):
        return self._array


class ITensor:
    """A tensor of a network. ``value`` is what is known of an integer tensor: -1 stands for a dynamic dimension."""

    def __init__(self, name, shape=None, dtype=None, producer=None, index=0):
        self.name = name
        self._shape, self._dtype, self._value = shape, dtype, None
        self.producer, self.index = producer, index
        self.is_network_input = producer is None
        self.location = TensorLocation.DEVICE
        self.is_network_output = False
        self.dimension_names = {}
        self._known = producer is None

    def _infer(self):
        if not self._known:
            self._shape, self._dtype, self._value = self.producer.infer(self.index)
            self._known = True

    @property
    def shape(self):
        self._infer()
        return Dims(self._shape)

    @shape.setter
    def shape(self, shape):
        self._infer()
        self._shape = tuple(shape)

    @property
    def dtype(self):
        self._infer()
        return self._dtype

    @dtype.setter
    def dtype(self, dtype):
        self._infer()
        self._dtype = dtype

    @property
    def value(self):
        self._infer()
        return self._value

    def set_dimension_name(self, index, name):
        self.dimension_names[index] = name
